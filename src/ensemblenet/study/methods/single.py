"""Single networks: the base, a narrower one within the budget, and one head of the conversion."""

from __future__ import annotations

from dataclasses import replace

from ensemblenet.conversion.convert import convert_alone
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.study.task import Method, Setup, Source, codistilled

__all__ = ["BASE", "HEAD_ALONE", "NARROW", "RESHAPED"]


def _reshaped(source: Source, setup: Setup) -> EnsembleNet:
    wanted = replace(setup.conversion, seed=source.seed)
    return convert_alone(wanted, source.make_base(), source.example, setup.task, source.calibration or None)[1]


BASE = Method(
    "base",
    "base",
    "the network as the user brings it",
    lambda source, setup: codistilled(source.base(setup), 0.0, setup.task),
    several=False,
)
NARROW = Method(
    "narrow",
    "narrower base",
    "one narrower network within the conversion's budget",
    lambda source, setup: codistilled(
        source.convert(setup, num_heads=1, split_at="input", shape="narrow", width=None, depth=None).head(0),
        0.0,
        setup.task,
    ),
    several=False,
    freezes=False,
)
RESHAPED = Method(
    "reshaped",
    "shorter, wider base",
    "one network of few blocks, as wide as the conversion's budget allows",
    lambda source, setup: codistilled(_reshaped(source, setup).head(0), 0.0, setup.task),
    several=False,
    freezes=False,
)
HEAD_ALONE = Method(
    "head_alone",
    "one head alone",
    "the conversion's trunk and one head, trained as a single network",
    lambda source, setup: codistilled(source.convert(setup).head(0), 0.0, setup.task),
    several=False,
    freezes=False,
)
