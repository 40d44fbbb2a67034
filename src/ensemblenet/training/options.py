"""What `fit` cannot honour of Lightning's options and callbacks: refused before a run begins, with what to use instead.

An option that is taken and then ignored, or that leaves the network untrained, would cost its user a whole run.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from ensemblenet.errors import TrainingError
from ensemblenet.metrics.scores import current_name
from ensemblenet.training.callbacks import AveragedWeights
from ensemblenet.training.optimization import Optimization

__all__ = [
    "REPLACED",
    "check_callbacks",
    "check_replaced",
    "check_trainer",
    "listed",
    "rename_scores",
    "replaced_options",
]

REPLACED = ("optimizer", "lr_scheduler")

_SAME_NAME = ("lr", "weight_decay", "momentum")
_OF_SCHEDULES = {"max_lr": "lr", "pct_start": "warmup"}


def replaced_options(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What arguments give for Lightning's optimizer and schedule, which LightningCLI would build for the base.

    Example:
        >>> replaced_options(["--name", "x", "--optimizer", "Adam", "--optimizer.lr=0.1"])
        {'optimizer': {'class_path': 'Adam', 'lr': 0.1}}
    """
    option = re.compile(rf"--({'|'.join(REPLACED)})(?:\.([\w.]+))?(?:=(.*))?")
    given: dict[str, dict[str, Any]] = defaultdict(dict)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if found := option.fullmatch(argument):
            key, inner, value = found.groups()
            given[key][inner or "class_path"] = _parsed(following if value is None else value)
    return dict(given)


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_replaced(given: Mapping[str, Any]) -> None:
    """Refuse them: such an optimizer would hold the parameters of the base that was converted away.

    Args:
        given: by key, a class's name or `class_path` and its arguments; None where there is none.

    Raises:
        TrainingError: there is one.
    """
    if optimizer := _written(given.get("optimizer")):
        raise TrainingError(f"`optimizer` is no setting of fit: use {_for_optimizer(**optimizer)}.")
    if schedule := _written(given.get("lr_scheduler")):
        values = {_OF_SCHEDULES[name]: value for name, value in schedule.items() if name in _OF_SCHEDULES}
        values = values or {"lr": "LR", "warmup": "SHARE"}
        raise TrainingError(
            "`lr_scheduler` is no setting of fit: the learning rate rises in a line, then falls by a cosine to 0; use "
            f"{_options(values)}."
        )


def _written(given: Any) -> dict[str, Any]:
    """The class's name and arguments, however they were given."""
    values = dict(given) if isinstance(given, Mapping) else {"class_path": given}
    inner = values.pop("init_args", None)
    values |= inner if isinstance(inner, Mapping) else {}
    return {name.removeprefix("init_args."): value for name, value in values.items() if value is not None}


def _for_optimizer(class_path: Any = "", **arguments: Any) -> str:
    name = str(class_path).rpartition(".")[2].lower()
    values: dict[str, Any] = {"optimizer": name} if name else {}
    values |= {key: arguments.pop(key) for key in _SAME_NAME if key in arguments}
    if arguments and name not in ("adamw", "sgd"):
        values["options"] = json.dumps(arguments, default=str)
    try:
        Optimization(name or "adamw")
    except ValueError as error:
        return f"--model.optimization.optimizer NAME. {str(error).removesuffix('.')}"
    return _options(values or {"optimizer": "NAME"})


def _options(values: Mapping[str, Any]) -> str:
    return " ".join(f"--model.optimization.{name} {shlex.quote(str(value))}" for name, value in values.items())


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse what leads to a run that trains nothing, what such a run ignores, and numbers that Lightning cannot use.

    Args:
        options: of Lightning's Trainer, by name.

    Raises:
        TrainingError: one cannot be honoured.

    Example:
        >>> from inspect import signature
        >>> from lightning.pytorch import Trainer
        >>> defaults = {name: parameter.default for name, parameter in signature(Trainer).parameters.items()}
        >>> check_trainer(defaults)
        >>> check_trainer(defaults | {"limit_test_batches": 0})
        Traceback (most recent call last):
            ...
        ensemblenet.errors.TrainingError: trainer.limit_test_batches must be above 0, got 0: a run ends with its test.
    """
    for name, least, reason in (
        ("accumulate_grad_batches", 1, ""),
        ("check_val_every_n_epoch", 1, "; for no validation, use --trainer.limit_val_batches 0"),
        ("gradient_clip_val", 0, ""),
        ("log_every_n_steps", 0, ""),
    ):
        if _is_number(value := options[name]) and value < least:
            raise TrainingError(f"trainer.{name} must be at least {least}, got {value}{reason}.")
    for name, reason in (
        ("limit_train_batches", "for the untrained network, use --trainer.max_epochs 0"),
        ("limit_test_batches", "a run ends with its test"),
        ("val_check_interval", "for no validation, use --trainer.limit_val_batches 0"),
    ):
        if _is_number(value := options[name]) and value <= 0:
            raise TrainingError(f"trainer.{name} must be above 0, got {value}: {reason}.")
    for name, ignored, instead in (
        ("enable_checkpointing", False, "A run keeps its last checkpoint, to go on from there"),
        ("logger", False, "A run keeps its logs in its own folder, for `ensemblenet report`"),
        ("barebones", True, "A run logs and keeps checkpoints, and --trainer.profiler says what takes time"),
    ):
        if options[name] is ignored:
            raise TrainingError(f"trainer.{name} cannot be {str(ignored).lower()}. {instead}; leave it out.")
    for name, instead in (
        ("default_root_dir", "a run's files lie in its own folder: use --runs"),
        ("limit_predict_batches", "fit predicts nothing: use `ensemblenet predict`"),
        ("model_registry", "a run uploads nothing: use `ensemblenet.push_to_hub`"),
    ):
        if options[name] is not None:
            raise TrainingError(f"trainer.{name} would be ignored; {instead}.")
    if options["gradient_clip_algorithm"] is not None and not options["gradient_clip_val"]:
        raise TrainingError("trainer.gradient_clip_algorithm would be ignored; give --trainer.gradient_clip_val too.")
    for unit in ("epochs", "steps"):
        least, most = options[f"min_{unit}"], options[f"max_{unit}"]
        if least is not None and most is not None and 0 <= most < least:
            raise TrainingError(f"trainer.min_{unit} {least} is more than trainer.max_{unit} {most}.")
    if options["max_time"] is not None and any(
        isinstance(callback, Timer) for callback in listed(options["callbacks"])
    ):
        raise TrainingError("trainer.max_time would be ignored beside the callback Timer; give one of them.")
    if any(isinstance(plugin, CheckpointIO) for plugin in listed(options["plugins"])):
        raise TrainingError("trainer.plugins cannot hold a CheckpointIO: a run writes its checkpoints in its own way.")


def listed(chosen: Any) -> list[Any]:
    """What an option of the Trainer names: nothing, one, or several."""
    if chosen is None or isinstance(chosen, bool):
        return []
    return list(chosen) if isinstance(chosen, Sequence) else [chosen]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_INSTEAD: dict[type[Callback], str] = {
    BaseFinetuning: "freeze parameters where the base is made, or train lower layers less with "
    "--model.optimization.layer_decay",
    BasePredictionWriter: "fit predicts nothing: use `ensemblenet predict`",
    BatchSizeFinder: "the learning rate is planned for a fixed number of steps: use --data.init_args.batch_size",
    GradientAccumulationScheduler: "the learning rate is planned for a fixed number of steps: use "
    "--trainer.accumulate_grad_batches",
    LearningRateFinder: "use --model.optimization.lr",
    ModelPruning: "heads that run as one do not see its masks: prune the trained model that `ensemblenet.load` gives",
    OnExceptionCheckpoint: "a run goes on from its own last checkpoint: use --checkpoint_steps",
    SpikeDetection: "a run with it cannot be resumed; fit stops by itself at a loss that is not finite",
    StochasticWeightAveraging: "it would replace the learning rate's course: use --ema 0.999",
    WeightAveraging: "it would average from the untrained weights on: use --ema 0.999",
}


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that do nothing in a run of `fit`, or that take away what it promises.

    Args:
        callbacks: the user's.

    Raises:
        TrainingError: one cannot be honoured.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> check_callbacks([EarlyStopping("val/accuracy", mode="max")])
        >>> check_callbacks([LearningRateFinder()])
        Traceback (most recent call last):
            ...
        ensemblenet.errors.TrainingError: fit does not take LearningRateFinder: use --model.optimization.lr.
    """
    for callback in callbacks:
        name = type(callback).__name__
        for kind, instead in _INSTEAD.items():
            if isinstance(callback, kind) and not isinstance(callback, AveragedWeights):
                raise TrainingError(f"fit does not take {name}: {instead}.")
        if not any(_overrides(callback, hook) for hook in _HOOKS):
            raise TrainingError(f"fit does not take {name}: it has nothing to do in training or testing.")


def rename_scores(callbacks: Sequence[Mapping[str, Any]]) -> None:
    """Let callbacks watch and write scores by today's names, where they name them as version 0.1 did.

    Args:
        callbacks: the user's, each `class_path` and `init_args`, which are changed.

    Example:
        >>> stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/divergence"}}
        >>> rename_scores([stop])
        >>> stop["init_args"]
        {'monitor': 'val/divergence'}
    """
    for callback in callbacks:
        arguments = callback.get("init_args") or {}
        for key, place in (("monitor", ".+"), ("filename", r"\{.+?\}")):
            old = arguments.get(key) or ""
            if (new := re.sub(place, lambda found: current_name(found[0]), old)) != old:
                warnings.warn(f"{key} {old} is now {new}.", DeprecationWarning, stacklevel=2)
                arguments[key] = new


_HOOKS = [name for name in dir(Callback) if name.startswith(("on_", "setup", "teardown")) and "predict" not in name]


def _overrides(callback: Callback, hook: str) -> bool:
    return hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)
