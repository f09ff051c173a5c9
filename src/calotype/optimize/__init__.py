"""How networks compute, not what: steps outside of them, each with a name, chosen by a table, undone with no trace."""

from calotype.optimize.table import STEPS, Optimized, chosen

__all__ = ["STEPS", "Optimized", "chosen"]
