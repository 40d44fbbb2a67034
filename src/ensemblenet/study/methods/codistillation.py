"""Co-distillation, this project's method, and its two special cases: joint training and independent heads."""

from __future__ import annotations

from ensemblenet.study.task import Method, codistilled

__all__ = ["CODISTILLATION", "INDEPENDENT", "JOINT"]

JOINT = Method(
    "joint",
    "joint, λ = 0",
    "the loss of the ensemble alone",
    lambda source, setup: codistilled(source.convert(setup), 0.0, setup.task),
)
INDEPENDENT = Method(
    "independent",
    "independent heads, λ = 1",
    "every head's own loss",
    lambda source, setup: codistilled(source.convert(setup), 1.0, setup.task),
)
CODISTILLATION = Method(
    "codistillation",
    "co-distillation, λ = {weight}",
    "the ensemble's loss and λ times its divergence from the heads (this project)",
    lambda source, setup: codistilled(source.convert(setup), setup.weight, setup.task),
)
