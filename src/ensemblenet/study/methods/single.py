"""Single networks: the base, a narrower one within the budget, and one head of the conversion."""

from __future__ import annotations

from ensemblenet.study.task import Method, Setup, Source, TrainingTask, codistilled

__all__ = ["BASE", "HEAD_ALONE", "NARROW"]


def _base(source: Source, setup: Setup) -> TrainingTask:
    return codistilled(source.make_base(), 0.0, setup.task)


def _narrow(source: Source, setup: Setup) -> TrainingTask:
    return codistilled(source.convert(setup, num_heads=1, split_at="input").head(0), 0.0, setup.task)


def _head_alone(source: Source, setup: Setup) -> TrainingTask:
    return codistilled(source.convert(setup).head(0), 0.0, setup.task)


BASE = Method("base", "base", "the network as the user brings it", _base, several=False)
NARROW = Method(
    "narrow", "narrower base", "one narrower network within the conversion's budget", _narrow, several=False
)
HEAD_ALONE = Method(
    "head_alone",
    "one head alone",
    "the conversion's trunk and one head, trained as a single network",
    _head_alone,
    several=False,
)
