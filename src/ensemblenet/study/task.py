"""A network and its loss as one module, and how a method makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.conversion.classifier import with_classes
from ensemblenet.conversion.convert import convert_as
from ensemblenet.cost import Cost, measure_cost
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import TrainingError
from ensemblenet.functional import Task, codistillation, combine_heads
from ensemblenet.inputs import Tree, call
from ensemblenet.recipe import Conversion
from ensemblenet.training.module import head_outputs

__all__ = ["Loss", "Method", "Setup", "Source", "TrainingTask", "codistilled", "pooled", "run_once"]

# called with head outputs (K, N, C), targets, and the share of all training steps that are done
Loss = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Setup:
    """The settings of a method; methods of single networks do not read all of them.

    Args:
        conversion: of the base; K is also the number of networks of a method that shares no trunk.
        weight: lambda of co-distillation.
        task: "multiclass" or "multilabel".
        teacher_weight: of the base's distillation into the heads, for methods that the base teaches.
        temperature: of that distillation.

    Raises:
        TrainingError: a teacher's weight or a temperature that is not above 0.

    Example:
        >>> Setup(Conversion(num_heads=2)).weight
        2.0
    """

    conversion: Conversion = field(default_factory=lambda: Conversion(num_heads=4, budget=0.95))
    weight: float = 2.0
    task: Task = "multiclass"
    teacher_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("teacher_weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} must be a finite number above 0, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Source:
    """Makes a method's networks.

    Args:
        make_base: returns a fresh base.
        example: inputs of the base, shape (N, *) with N of at least 2, or a tuple or a dictionary of tensors.
        seed: the seed of all weights that are drawn.
        teacher: the trained base of that seed, for methods that it teaches; None where costs alone are asked.
        calibration: batches of training data, by which heads inherit from a base that begins with trained weights.

    Example:
        >>> base = lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> Source(base, torch.zeros(2, 4)).convert(Setup(Conversion(num_heads=2))).num_heads
        2
    """

    make_base: Callable[[], nn.Module]
    example: Tree
    seed: int = 0
    teacher: nn.Module | None = None
    calibration: Sequence[Any] = ()

    def base(self, setup: Setup) -> nn.Module:
        """A base as it is trained: where the task is another one, with a fresh classifier."""
        base, wanted = self.make_base(), setup.conversion
        if wanted.num_classes is None:
            return base
        return with_classes(base, self.example, wanted.num_classes, wanted.output, self.seed)[0]

    def convert(self, setup: Setup, **options: Any) -> EnsembleNet:
        """Convert a base.

        Args:
            setup: has the options of the conversion; its seed is this source's.
            options: those that differ from the setup's, such as `split_at="input"`.

        Raises:
            ConversionError: the base cannot be converted so.
        """
        wanted = replace(setup.conversion, seed=self.seed, **options)
        return convert_as(wanted, self.make_base(), self.example, setup.task, calibration=self.calibration or None)


class TrainingTask(nn.Module):
    """A network and its loss as one module, and what the network predicts.

    Args:
        network: an `EnsembleNet`, or a plain network, which counts as one head.
        objective: the loss, called with head outputs (K, N, C), targets and the share of training that is done.
        students: the heads that the method would deploy alone; None means all.

    Attributes:
        depths: of the base's parameters, for learning rates by depth.

    Shape:
        - input: whatever the network takes.
        - output: head outputs (K, N, C), and the prediction (N, C).

    Example:
        >>> task = TrainingTask(nn.Linear(4, 3), lambda z, y, progress: codistillation(z, y, 1.0))
        >>> [tuple(outputs.shape) for outputs in task(torch.zeros(5, 4))]
        [(1, 5, 3), (5, 3)]
    """

    def __init__(self, network: nn.Module, objective: Loss, students: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.students = students
        self.depths: Mapping[str, int] | None = None

    def loss(self, x: Tree, target: Tensor, progress: float) -> Tensor:
        """The loss of a batch; `progress` is the share of all training steps that are done."""
        return self.objective(head_outputs(self.network, x), target, progress)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The outputs of all heads, and the prediction."""
        outputs = head_outputs(self.network, kwargs or args)
        return outputs, combine_heads(outputs)

    def training_only(self) -> int:
        """Parameters that prediction does not need."""
        return 0

    def cost(self, example: Tree) -> Cost:
        """The cost of a prediction."""
        total = measure_cost(self, example)
        return replace(total, parameters=total.parameters - self.training_only())


@dataclass(frozen=True)
class Method:
    """One way to turn a base into a prediction.

    Args:
        key: its name in a study's settings.
        title: its name in tables; `{weight}` and `{num_heads}` are filled in.
        summary: a short description, with its authors.
        make: makes the untrained network with its loss.
        several: True if it has several heads or networks.
        tasks: the tasks that its loss is defined for.
        taught: True if it learns from the trained base, whose training then comes first.
        inherits: False if its networks would differ in nothing but the weights that they begin with.
        freezes: True if it trains heads behind a trunk that can be frozen.

    Example:
        >>> mine = Method("mine", "mine", "", lambda source, setup: codistilled(source.make_base(), 0.0, setup.task))
        >>> type(mine.build(Source(lambda: nn.Linear(4, 3), torch.zeros(2, 4)), Setup()).network).__name__
        'Linear'
    """

    key: str
    title: str
    summary: str
    make: Callable[[Source, Setup], TrainingTask]
    several: bool = True
    tasks: tuple[Task, ...] = ("multiclass", "multilabel")
    taught: bool = False
    inherits: bool = True
    freezes: bool = True

    def cannot(self, conversion: Conversion) -> str | None:
        """Why the method cannot begin as a conversion does; None where it can.

        Example:
            >>> mine = Method("mine", "mine", "", codistilled, freezes=False)
            >>> mine.cannot(Conversion()), mine.cannot(Conversion(init="inherit", freeze="trunk"))
            (None, 'it has no trunk of its own to freeze')
        """
        if conversion.init == "inherit" and not self.inherits:
            return "its networks would all begin as one trained base, and stay alike"
        if conversion.freeze is not None and not self.freezes:
            return "it has no trunk of its own to freeze"
        return None

    def build(self, source: Source, setup: Setup) -> TrainingTask:
        """The untrained network with its loss, which depends on the source's seed alone."""
        torch.manual_seed(source.seed)
        return self.make(source, setup)

    def name(self, setup: Setup) -> str:
        """The title for a setup.

        Example:
            >>> method = Method("mine", "{num_heads} heads, λ = {weight}", "", codistilled)
            >>> method.name(Setup(Conversion(num_heads=2), weight=3.0))
            '2 heads, λ = 3'
        """
        return self.title.format(weight=f"{setup.weight:g}", num_heads=setup.conversion.num_heads)


def codistilled(network: nn.Module, weight: float, task: Task) -> TrainingTask:
    """A network with the co-distillation loss; for a single network it is the plain loss.

    Example:
        >>> task = codistilled(nn.Identity(), 0.0, "multiclass")
        >>> round(task.loss(torch.zeros(5, 4), torch.tensor([0, 1, 2, 3, 0]), progress=0.0).item(), 4)
        1.3863
    """
    return TrainingTask(network, lambda outputs, target, progress: codistillation(outputs, target, weight, task))


# -- for methods whose gates or projections read a network's features


def pooled(features: Tensor) -> Tensor:
    """Features (N, C, *) averaged over positions, shape (N, C).

    Example:
        >>> pooled(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """
    return features.flatten(2).mean(2) if features.ndim > 2 else features


@torch.no_grad()
def run_once(network: nn.Module, example: Tree) -> None:
    """A forward pass for its hooks, in evaluation mode; the network is left in training mode."""
    call(network.eval(), example)
    network.train()
