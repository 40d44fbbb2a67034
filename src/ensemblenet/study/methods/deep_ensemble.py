"""Deep ensembles: networks that share nothing, each with a loss of its own; trained at once, yet independently."""

from __future__ import annotations

from torch import nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.study.task import Method, Setup, Source, TrainingTask, codistilled

__all__ = ["BASES", "NARROW"]


def _bases(source: Source, setup: Setup) -> TrainingTask:
    assert setup.conversion.num_heads != "auto", "studies say how many heads each method has"
    bases = [source.base(setup) for _ in range(setup.conversion.num_heads)]
    return codistilled(EnsembleNet(nn.Identity(), bases, task=setup.task), 1.0, setup.task)


NARROW = Method(
    "deep_ensemble",
    "deep ensemble, narrow",
    "narrow networks trained independently, within the budget",
    lambda source, setup: codistilled(source.convert(setup, split_at="input"), 1.0, setup.task),
    freezes=False,
)
BASES = Method(
    "deep_ensemble_of_bases",
    "deep ensemble, {num_heads} bases",
    "bases trained independently, at {num_heads} times the cost: the ceiling",
    _bases,
    inherits=False,
    freezes=False,
)
