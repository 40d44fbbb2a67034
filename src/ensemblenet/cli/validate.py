"""The command `validate`."""

from ensemblenet.evaluation.scoring import validate

__all__ = ["validate"]
