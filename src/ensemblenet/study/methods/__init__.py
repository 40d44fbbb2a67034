"""The methods that `compare` trains: each is a network, a loss, and a way to predict; one file holds one method.

Every multi-headed network comes from `convert`, and so does every narrower single one. Modules that a method needs
beside the network, a gate or projections, are small and made in its file. A method of your own is one more file, and
its name in the list below.
"""

from __future__ import annotations

from ensemblenet._moved import renamed
from ensemblenet.study.methods import (
    co_training,
    codistillation,
    deep_ensemble,
    dml,
    kdcl,
    okddip,
    one,
    single,
    teacher,
)
from ensemblenet.study.task import Method, Setup, Source, TrainingTask

__all__ = ["METHODS", "Method", "Setup", "Source", "TrainingTask"]

METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        single.BASE,
        single.NARROW,
        single.RESHAPED,
        single.HEAD_ALONE,
        codistillation.JOINT,
        codistillation.INDEPENDENT,
        codistillation.CODISTILLATION,
        teacher.METHOD,
        one.METHOD,
        dml.METHOD,
        okddip.METHOD,
        kdcl.METHOD,
        co_training.METHOD,
        deep_ensemble.NARROW,
        deep_ensemble.BASES,
    )
}

__getattr__ = renamed(__name__, {"Contender": "TrainingTask"})
