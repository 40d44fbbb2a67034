"""The command `test`."""

from ensemblenet.evaluation.scoring import test

__all__ = ["test"]
