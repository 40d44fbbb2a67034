"""Co-distillation, this project's method, and its two special cases: joint training and independent heads."""

from __future__ import annotations

from ensemblenet.study.task import Method, Setup, Source, TrainingTask, codistilled

__all__ = ["CODISTILLATION", "INDEPENDENT", "JOINT"]


def _joint(source: Source, setup: Setup) -> TrainingTask:
    return codistilled(source.convert(setup), 0.0, setup.task)


def _independent(source: Source, setup: Setup) -> TrainingTask:
    return codistilled(source.convert(setup), 1.0, setup.task)


def _codistillation(source: Source, setup: Setup) -> TrainingTask:
    return codistilled(source.convert(setup), setup.weight, setup.task)


JOINT = Method("joint", "joint, λ = 0", "the loss of the ensemble alone", _joint)
INDEPENDENT = Method("independent", "independent heads, λ = 1", "every head's own loss", _independent)
CODISTILLATION = Method(
    "codistillation",
    "co-distillation, λ = {weight}",
    "the ensemble's loss and λ times its divergence from the heads (this project)",
    _codistillation,
)
