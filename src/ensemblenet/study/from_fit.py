"""A study made of a configuration of `fit`: did it help on these data?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ensemblenet.recipe import Conversion
from ensemblenet.study.settings import OF_CONVERSION
from ensemblenet.training.optimization import Optimization

__all__ = ["study_settings"]

_METHODS = ["base", "codistillation"]
_TAUGHT = [*_METHODS, "teacher"]
_AROUND = 3.0  # learning rate and weight decay are tuned between a third and three times those of the file
_TUNED = ("lr", "weight_decay")
_OF_OPTIMIZATION = ("optimizer", "warmup", "layer_decay")
# of the trainer, and the values that change nothing
_OF_TRAINER: dict[str, tuple[Any, ...]] = {
    "gradient_clip_val": (None, 0),
    "accumulate_grad_batches": (None, 1),
    "max_steps": (None, -1),
    "max_time": (None,),
    "limit_train_batches": (None, 1.0),
    "overfit_batches": (None, 0),
    "callbacks": (None, []),
}


def study_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a study of the base and the conversion that a configuration of `fit` names.

    Args:
        config: of `fit`, as plain data.

    Returns:
        Settings for [`ensemblenet.study.settings.study_of`][] and for the run; and the names of what decides a run of
        `fit` and has no counterpart in a study.

    Example:
        >>> model = {"base": {"class_path": "a.Net"}, "conversion": {"num_heads": 3}, "label_smoothing": 0.1}
        >>> settings, left_out = study_settings({"model": model, "data": {"class_path": "a.Data"}, "name": "mine"})
        >>> settings["num_heads"], settings["methods"], left_out
        (3, ['base', 'codistillation'], ['model.label_smoothing'])
    """
    model, trainer = config["model"] or {}, config.get("trainer") or {}
    conversion = asdict(Conversion()) | (model.get("conversion") or {})
    optimization = asdict(Optimization()) | (model.get("optimization") or {})
    teacher_weight = model.get("teacher_weight")
    if teacher_weight is None and model.get("teacher"):
        teacher_weight = 1.0
    settings = {
        "name": f"compare-{config.get('name') or 'fit'}",
        "base": model.get("base"),
        "data": config.get("data"),
        "methods": _TAUGHT if teacher_weight else _METHODS,
        "teacher_weight": teacher_weight or None,
        "temperature": model.get("teacher_temperature"),
        "task": model.get("task"),
        "weight": None if (weight := model.get("codistillation_weight")) == "auto" else weight,
        **{name: conversion[name] for name in OF_CONVERSION if model.get("conversion") and conversion[name] != "auto"},
        "epochs": trainer.get("max_epochs"),
        **{name: optimization[name] for name in _OF_OPTIMIZATION},
        "seeds": 3,
        "tuning": {"trials": 4, **{name: _around(optimization[name]) for name in _TUNED}},
        "device": _device(str(trainer.get("accelerator") or "auto")),
        "precision": "bf16" if "bf16" in str(trainer.get("precision")) else "32",
    }
    settings["tuning"] = {name: value for name, value in settings["tuning"].items() if value is not None}
    return {name: value for name, value in settings.items() if value is not None}, list(_left_out(config))


def _around(value: float) -> list[float] | None:
    return [float(value) / _AROUND, float(value) * _AROUND] if float(value) > 0 else None


def _device(accelerator: str) -> str:
    if accelerator in ("auto", "gpu"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return accelerator


def _left_out(config: Mapping[str, Any]) -> Iterator[str]:
    model, trainer = config["model"], config.get("trainer") or {}
    for group, known, defaults in (
        ("conversion", (*OF_CONVERSION, "seed"), asdict(Conversion())),
        ("optimization", (*_TUNED, *_OF_OPTIMIZATION), asdict(Optimization())),
    ):
        given = model.get(group) or {}
        yield from (
            f"model.{group}.{name}"
            for name, value in given.items()
            if (name not in known and value != defaults.get(name)) or (name, value) == ("num_heads", "auto")
        )
    yield from (f"model.{name}" for name in ("label_smoothing", "mixing", "teacher") if model.get(name))
    yield from ["model.loss"] if model.get("loss") not in (None, "cross_entropy") else []
    yield from (f"trainer.{name}" for name, idle in _OF_TRAINER.items() if trainer.get(name) not in idle)
    yield from ["ema"] if config.get("ema") is not None else []
