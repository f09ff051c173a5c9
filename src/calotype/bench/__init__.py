"""calotype and its peers on the same weights: each draws in a process of its own, in turn."""
