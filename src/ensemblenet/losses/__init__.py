"""Losses as modules."""

from ensemblenet.losses.codistillation import CoDistillationLoss

__all__ = ["CoDistillationLoss"]
