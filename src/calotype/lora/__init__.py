"""Adapters of every common format as values, and a stack of them on a model: merged into its weights, or live."""

from calotype.lora.deltas import Decomposed, Delta, Difference, Hadamard, Kronecker, LoRA, LowRank
from calotype.lora.formats import load_lora
from calotype.lora.stack import Stack

__all__ = [
    "Decomposed",
    "Delta",
    "Difference",
    "Hadamard",
    "Kronecker",
    "LoRA",
    "LowRank",
    "Stack",
    "load_lora",
]
