"""The settings of a study, as plain data: `Study`, its `Variant`s of methods, and their `Tuning`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from scipy.stats import qmc

from ensemblenet.cost import Budget
from ensemblenet.errors import TrainingError, did_you_mean
from ensemblenet.functional import Task
from ensemblenet.recipe import Conversion, Criterion, Freeze, Init, Shape
from ensemblenet.study.methods import METHODS
from ensemblenet.study.task import Setup
from ensemblenet.study.trials import Phase, Precision, Trial
from ensemblenet.training.optimization import Optimization

__all__ = ["OF_CONVERSION", "Candidate", "Study", "Tuning", "Variant", "study_of", "tuning_points"]

# what of a conversion is a setting of a study
OF_CONVERSION = (
    *("num_heads", "budget", "split_at", "min_width", "shape", "width", "depth"),
    *("init", "importance", "num_classes", "freeze"),
)
_TUNING_SEED = 1000  # no test run has it


def _check_at_least_1(name: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise TrainingError(f"{name} must be at least 1, got {number}.")


@dataclass(frozen=True)
class Tuning:
    """The search for learning rate and weight decay, the same for every method.

    Args:
        trials: the number of pairs that each method tries.
        lr: the least and the largest learning rate.
        weight_decay: the least and the largest weight decay.
        epochs: the length of a trial, if it is shorter than a test run; None takes the study's.

    Raises:
        TrainingError: a number out of its range.

    Example:
        >>> Tuning(trials=4, lr=(0.005, 0.05), epochs=10)
        Tuning(trials=4, lr=(0.005, 0.05), weight_decay=(0.01, 1.0), epochs=10)
    """

    trials: int = 8
    lr: tuple[float, float] = (1e-3, 1e-1)
    weight_decay: tuple[float, float] = (1e-2, 1.0)
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "epochs"):
            _check_at_least_1(f"tuning.{name}", getattr(self, name))
        for name, (low, high) in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if not 0 < low <= high:
                raise TrainingError(f"tuning.{name} must be two numbers above 0, the smaller first, got {low}, {high}.")


def tuning_points(tuning: Tuning) -> list[tuple[float, float]]:
    """Pairs of learning rate and weight decay that cover the ranges evenly, on a logarithmic scale.

    They are the Halton sequence without its corner, so they depend on nothing but the ranges: every method tries the
    same ones, none is luckier, and more trials keep the first ones.

    Example:
        >>> [(round(lr, 4), round(decay, 4)) for lr, decay in tuning_points(Tuning(2, (0.001, 0.1), (0.01, 1.0)))]
        [(0.01, 0.0464), (0.0032, 0.2154)]
    """
    sequence = qmc.Halton(2, scramble=False).fast_forward(1).random(tuning.trials)
    ranges = (tuning.lr, tuning.weight_decay)
    return [
        tuple(low * (high / low) ** share for share, (low, high) in zip(point.tolist(), ranges, strict=True))
        for point in sequence
    ]


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own, where they differ from the study's.

    Args:
        method: a key of `ensemblenet.study.methods.METHODS`.
        name: its name in tables; None takes the method's title.
        num_heads: K.
        budget: share of the base's parameters and MACs, or an `ensemblenet.Budget`.
        split_at: a split point.
        weight: lambda of co-distillation.
        teacher_weight: of the base's distillation, for `teacher`.
        temperature: of that distillation.
        init: how heads begin.
        lr: a fixed learning rate; with `weight_decay` it replaces tuning.
        weight_decay: a fixed weight decay.
        seeds: the number of test runs.

    Raises:
        TrainingError: only one of `lr` and `weight_decay`, or no seed.

    Example:
        >>> setup = Variant("codistillation", name="2 heads", num_heads=2).setup(Setup(weight=3.0))
        >>> setup.conversion.num_heads, setup.conversion.budget, setup.weight
        (2, 0.95, 3.0)
    """

    method: str
    name: str | None = None
    num_heads: int | None = None
    budget: float | Budget | None = None
    split_at: str | None = None
    weight: float | None = None
    teacher_weight: float | None = None
    temperature: float | None = None
    init: Init | None = None
    lr: float | None = None
    weight_decay: float | None = None
    seeds: int | None = None

    def __post_init__(self) -> None:
        _check_at_least_1(f"seeds of {self.name or self.method}", self.seeds)
        if (self.lr is None) != (self.weight_decay is None):
            raise TrainingError(f"{self.name or self.method} needs both lr and weight_decay, or neither to tune them.")

    def setup(self, shared: Setup) -> Setup:
        """The study's setup with this variant's own settings."""

        def own(*names: str) -> dict[str, Any]:
            return {name: value for name in names if (value := getattr(self, name)) is not None}

        conversion = replace(shared.conversion, **own("num_heads", "budget", "split_at", "init"))
        return replace(shared, conversion=conversion, **own("weight", "teacher_weight", "temperature"))


@dataclass(frozen=True)
class Candidate:
    """One method of a study, with all that it is trained with.

    Args:
        method: a key of `METHODS`.
        setup: its network and loss.
        seeds: the number of test runs.
        fixed: its optimization, where that is not tuned.
    """

    method: str
    setup: Setup
    seeds: int
    fixed: Optimization | None = None


@dataclass(frozen=True)
class Study:
    """Which methods are compared on which base and data, as plain data.

    Args:
        base: `class_path` and `init_args` of the network.
        data: `class_path` and `init_args` of the data module.
        methods: keys of methods, or variants; None takes all. The first must be the base.
        task: "multiclass" or "multilabel".
        num_heads: K.
        budget: the most that a conversion may cost, as a share of the base's parameters and MACs, or a share for each
            cost, as in [`ensemblenet.Budget`][].
        split_at: the split point, for methods that share a trunk.
        min_width: the least width of heads; this, `shape`, `width` and `depth` are as in [`ensemblenet.convert`][].
        shape: how heads become cheaper.
        width: the width of heads.
        depth: the share of blocks that heads keep.
        init: how heads begin: "inherit" gives them the base's weights, "fresh" draws them anew; None inherits where
            `base` names `weights`. The base itself begins as it is made, and with trained weights is trained on.
        importance: what heads inherit, as in [`ensemblenet.convert`][].
        num_classes: of another task: the base and all heads get fresh classifiers.
        freeze: "trunk" trains the heads of conversions alone; the base is trained in full.
        weight: lambda of co-distillation.
        teacher_weight: of the trained base's distillation into every head, for the method `teacher`.
        temperature: of that distillation.
        epochs: passes over the training examples; the last epoch counts.
        optimizer: the optimizer of all methods.
        warmup: the share of all steps in which the learning rate rises.
        layer_decay: of the learning rate by depth, see [`ensemblenet.training.optimization.Optimization`][].
        seeds: the number of test runs of each method.
        tuning: the search for learning rate and weight decay.
        device: the device to train on, such as "cpu" or "cuda".
        precision: "bf16" trains and measures under bfloat16 autocast, "32" in float32.
        devices: how many of them, with a process each, train one network together, by Lightning's DDP; each takes
            batches of the data's size.

    Raises:
        TrainingError: a number out of its range.

    Example:
        >>> spec = {"class_path": "ensemblenet.models.MNIST1DNet"}, {"class_path": "ensemblenet.data.MNIST1D"}
        >>> list(Study(*spec, methods=["base", "codistillation", Variant("joint", name="joint")]).candidates())
        ['base', 'co-distillation, λ = 2', 'joint']
    """

    base: dict[str, Any]
    data: dict[str, Any]
    methods: Sequence[str | Variant] | None = None
    task: Literal["multiclass", "multilabel"] = "multiclass"
    num_heads: int = 4
    budget: float | Budget = 0.95
    split_at: str = "auto"
    min_width: float | None = None
    shape: Shape = "auto"
    width: float | None = None
    depth: float | None = None
    init: Init | None = None
    importance: Criterion | None = None
    num_classes: int | None = None
    freeze: Freeze | None = None
    weight: float = 2.0
    teacher_weight: float = 1.0
    temperature: float = 1.0
    epochs: int = 40
    optimizer: Literal["adamw", "sgd"] = "adamw"
    warmup: float = Optimization.warmup
    layer_decay: float = Optimization.layer_decay
    seeds: int = 5
    tuning: Tuning = Tuning()
    device: str = "cpu"
    precision: Precision = "32"
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "num_heads", "devices"):
            _check_at_least_1(name, getattr(self, name))
        if self.devices > 1 and self.device not in ("cpu", "cuda"):
            raise TrainingError(
                f"devices {self.devices} needs device cpu or cuda, without a number; got {self.device}."
            )

    @property
    def begins(self) -> Init:
        """How heads begin, where `init` does not say it."""
        return self.init or ("fresh" if (self.base.get("init_args") or {}).get("weights") is None else "inherit")

    def optimization(self, lr: float, weight_decay: float) -> Optimization:
        """The optimization of all methods, with a learning rate and a weight decay.

        Raises:
            TrainingError: a number out of its range.
        """
        try:
            return Optimization(
                self.optimizer, lr=lr, weight_decay=weight_decay, warmup=self.warmup, layer_decay=self.layer_decay
            )
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def candidates(self) -> dict[str, Candidate]:
        """The methods by the names that tables give them.

        Raises:
            TrainingError: an unknown method, one that cannot begin as asked, two of one name, or the first is not the
                base.
        """
        task: Task = self.task
        asked: dict[str, Any] = {name: getattr(self, name) for name in OF_CONVERSION} | {"init": self.begins}
        conversion = Conversion(**asked)
        shared = Setup(conversion, self.weight, task, self.teacher_weight, self.temperature)
        found: dict[str, Candidate] = {}
        able = [key for key, one in METHODS.items() if task in one.tasks and not one.cannot(conversion)]
        for choice in self.methods or able:
            variant = Variant(choice) if isinstance(choice, str) else choice
            if variant.method not in METHODS:
                raise TrainingError(
                    f"methods must be among {', '.join(METHODS)}; got {variant.method!r}."
                    + did_you_mean(variant.method, METHODS)
                )
            setup = variant.setup(shared)
            name = variant.name or METHODS[variant.method].name(setup)
            if why := METHODS[variant.method].cannot(setup.conversion):
                start = "a frozen trunk" if setup.conversion.freeze else "trained weights"
                raise TrainingError(f"{variant.method} cannot begin with {start}: {why}. Leave it out of methods.")
            if name in found:
                raise TrainingError(f"methods has {name!r} twice; give one of them a name of its own.")
            fixed = None
            if variant.lr is not None and variant.weight_decay is not None:
                fixed = self.optimization(variant.lr, variant.weight_decay)
            found[name] = Candidate(variant.method, setup, variant.seeds or self.seeds, fixed)
        if next(iter(found.values())).method != "base":
            raise TrainingError("methods must begin with base: all others are compared with it.")
        return found

    def trials(self, phase: Phase, settings: Mapping[str, Sequence[Optimization]], halved: bool = False) -> list[Trial]:
        """The trials of a phase: each candidate with each of its settings, tuned with one seed, tested with all.

        Args:
            phase: "tune" or "test".
            settings: by the candidates' names.
            halved: whether the validation data is halved, for want of a test split.
        """
        tuned = phase == "tune"
        epochs = (tuned and self.tuning.epochs) or self.epochs
        return [
            Trial(
                name,
                candidate.method,
                candidate.setup,
                self.base,
                self.data,
                phase,
                seed,
                setting,
                epochs,
                self.device,
                self.precision,
                halved,
                devices=self.devices,
            )
            for name, candidate in self.candidates().items()
            for setting in settings.get(name, ())
            for seed in ([_TUNING_SEED] if tuned else range(candidate.seeds))
        ]

    def cells(self, phase: Phase, settings: Mapping[str, Sequence[Optimization]]) -> list[Trial]:
        """The old name of [`trials`][ensemblenet.study.settings.Study.trials]."""
        warnings.warn("Study.cells is now Study.trials.", DeprecationWarning, stacklevel=2)
        return self.trials(phase, settings)

    def entrants(self) -> dict[str, tuple[str, Setup]]:
        """The old form of [`candidates`][ensemblenet.study.settings.Study.candidates]."""
        warnings.warn("Study.entrants is now Study.candidates.", DeprecationWarning, stacklevel=2)
        return {name: (candidate.method, candidate.setup) for name, candidate in self.candidates().items()}


def study_of(settings: Mapping[str, Any]) -> Study:
    """The study that plain data describe, such as a YAML file of `configs/compare` or a run's `config.yaml`.

    Args:
        settings: the arguments of [`Study`][ensemblenet.study.settings.Study], variants and tuning as dictionaries;
            other keys, which belong to the run, are ignored.

    Example:
        >>> spec = {"base": {"class_path": "a.Net"}, "data": {"class_path": "a.Data"}, "name": "my-run"}
        >>> study_of(spec | {"methods": ["base", {"method": "joint"}], "tuning": {"lr": [0.01, 0.1]}}).tuning.lr
        (0.01, 0.1)
    """
    known = {field.name for field in fields(Study)}
    given = _with_budget({key: value for key, value in settings.items() if key in known})
    if given.get("methods"):
        methods = given["methods"]
        given["methods"] = [Variant(**_with_budget(item)) if isinstance(item, Mapping) else item for item in methods]
    if "tuning" in given:
        ranges = {name: tuple(given["tuning"][name]) for name in ("lr", "weight_decay") if name in given["tuning"]}
        given["tuning"] = Tuning(**(given["tuning"] | ranges))
    return Study(**given)


def _with_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose budget, if it is of several shares, is one."""
    budget = settings.get("budget")
    return {**settings, **({"budget": Budget.of(budget)} if isinstance(budget, Mapping) else {})}
