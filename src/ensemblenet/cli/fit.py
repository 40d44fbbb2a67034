"""The command `fit`."""

from ensemblenet.training.fit import fit

__all__ = ["fit"]
