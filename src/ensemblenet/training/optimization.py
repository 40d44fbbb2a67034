"""The optimizer and the learning rate's course, shared by every way to train."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ensemblenet.conversion.split import find_cuts
from ensemblenet.conversion.trace import Output, trace
from ensemblenet.errors import TrainingError, did_you_mean
from ensemblenet.inputs import Tree

__all__ = ["Optimization", "build_optimizer", "build_schedule", "check_optimizers", "layer_depths"]


@dataclass(frozen=True)
class Optimization:
    """How weights are updated.

    Args:
        optimizer: "adamw", "sgd" with Nesterov momentum, or another name of `timm.optim.list_optimizers()`, such as
            "lamb".
        lr: the highest learning rate, reached after the warmup; a cosine takes it to 0 from there.
        weight_decay: as the optimizer has it: decoupled from the gradient in AdamW, part of it in SGD.
        momentum: of optimizers that have one; AdamW does not read it.
        warmup: the share of all steps in which the learning rate rises in a line.
        decay_all: also decay what has one dimension: biases and the parameters of normalisations.
        layer_decay: the learning rate of each layer as a share of that of the layer above it, so that the trunk learns
            least and the classifier at the full rate; below 1 for fine-tuning, such as 0.75.
        options: further arguments of timm's optimizer, such as `betas`; "adamw" and "sgd" take none.
    """

    optimizer: str = "adamw"
    lr: float = 0.01
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 0.05
    decay_all: bool = False
    layer_decay: float = 1.0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, valid, wanted in [
            ("lr", self.lr > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]"),
        ]:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}.")
        if self.optimizer not in _OPTIMIZERS:
            _check_timm_has(self.optimizer)
        elif self.options:
            raise ValueError(f"optimizer {self.optimizer} takes no options, got {self.options}.")


def build_optimizer(network: nn.Module, settings: Optimization, depths: Mapping[str, int] | None = None) -> Optimizer:
    """An optimizer of the network's parameters.

    Args:
        network: a base, or a conversion of it.
        settings: its `layer_decay` needs depths.
        depths: of the base's parameters, from [`layer_depths`][ensemblenet.training.optimization.layer_depths].

    Raises:
        ValueError: the optimizer does not take the options.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> [group["weight_decay"] for group in build_optimizer(network, Optimization()).param_groups]
        [0.05, 0.0]
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 or settings.decay_all else 0.0
            groups[_lr(name, settings, depths), -decay].append(parameter)
    made = [{"params": groups[lr, decay], "lr": lr, "weight_decay": -decay} for lr, decay in sorted(groups)]
    return _OPTIMIZERS.get(settings.optimizer, _of_timm)(made, settings)


def check_optimizers(network: nn.Module, optimizers: Iterable[Optimizer], others: Iterable[nn.Parameter] = ()) -> None:
    """Refuse to train where a trainable parameter is not in an optimizer exactly once.

    Whatever replaces a network or its optimizer after the other was made would leave it untrained, in silence.
    Parameters that are shared count once.

    Args:
        network: what will be trained, sharded or wrapped or neither.
        optimizers: all that will train it.
        others: further parameters that an optimizer may hold.

    Raises:
        TrainingError: it names the first parameter that is in none, or twice; or an optimizer holds one of another
            network.

    Example:
        >>> base = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(base.parameters())
        >>> check_optimizers(base, [optimizer])
        >>> check_optimizers(nn.Linear(2, 2), [optimizer])
        Traceback (most recent call last):
            ...
        ensemblenet.errors.TrainingError: The parameter weight is trainable, but in no optimizer: it would stay as it...
    """
    held = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    times = Counter(map(id, held))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not times[id(parameter)]:
            raise TrainingError(
                f"The parameter {name} is trainable, but in no optimizer: it would stay as it is. {_REMEDY}"
            )
        if times[id(parameter)] > 1:
            raise TrainingError(f"The parameter {name} is in the optimizers {times[id(parameter)]} times. {_REMEDY}")
    known = {id(parameter) for parameter in (*network.parameters(), *others)}
    for parameter in held:
        if id(parameter) not in known:
            shape = tuple(parameter.shape)
            raise TrainingError(f"An optimizer holds a parameter {shape} that is not the network's. {_REMEDY}")


_REMEDY = (
    "What replaces or unfreezes parts of a network must do so before its optimizer is made, as in a callback's setup."
)


def layer_depths(base: nn.Module, example_inputs: Tree, output: Output = None) -> dict[str, int]:
    """How deep each parameter of a network lies: 0 is at the input.

    Networks of timm say so themselves. Of others each part between two split points that has a matrix is a layer, in
    the order in which the input flows through them; what has none, such as a normalisation, is of the layer before it.

    Args:
        base: the network.
        example_inputs: for it, see [`ensemblenet.convert`][].
        output: which tensor of what it returns, see there.

    Raises:
        ConversionError: the network is not timm's, and cannot be traced.

    Example:
        >>> import timm
        >>> depths = layer_depths(timm.create_model("test_vit"), torch.zeros(2, 3, 160, 160))
        >>> depths["patch_embed.proj.weight"], depths["blocks.0.norm1.weight"], depths["head.weight"]
        (0, 1, 7)
        >>> layer_depths(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(2, 4))
        {'0.weight': 0, '0.bias': 0, '1.weight': 0, '1.bias': 0, '3.weight': 1, '3.bias': 1}
    """
    if (matcher := getattr(base, "group_matcher", None)) is not None:
        from timm.models import group_parameters  # slow to import

        return group_parameters(base, matcher(coarse=False), reverse=True)
    traced = trace(base, example_inputs, output)
    depths: dict[str, int] = {}
    depth = -1
    for nodes in (*(cut.trunk for cut in find_cuts(traced)), list(traced.graph.nodes)):  # each with all before it
        read = [pair for node in nodes for pair in traced.parameters.get(node, {}).items()]
        layer = {name: parameter for name, parameter in read if name not in depths}
        depth += any(parameter.ndim > 1 for parameter in layer.values())
        depths |= dict.fromkeys(layer, max(depth, 0))
    return depths


def _lr(name: str, settings: Optimization, depths: Mapping[str, int] | None) -> float:
    """The learning rate of a parameter of the base, or of its namesake in trunk or heads."""
    if not depths or settings.layer_decay == 1:
        return settings.lr
    own = name.removeprefix("network.")  # of a method of a study, which may have more than a network
    known = own if own in depths else re.sub(r"^(trunk|head|heads\.\d+)\.", "", own)
    top = max(depths.values())
    return settings.lr * settings.layer_decay ** (top - depths.get(known, top))


def _adamw(groups: list[dict[str, Any]], settings: Optimization) -> Optimizer:
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def _sgd(groups: list[dict[str, Any]], settings: Optimization) -> Optimizer:
    momentum = settings.momentum
    sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    # PyTorch has no fused step of SGD for sharded parameters, as it has of AdamW
    return torch.optim.SGD(groups, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=not sharded)


def _of_timm(groups: list[dict[str, Any]], settings: Optimization) -> Optimizer:
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]  slow to import

    options = settings.options or {}
    try:
        return create_optimizer_v2(groups, settings.optimizer, settings.lr, momentum=settings.momentum, **options)
    except (TypeError, ImportError, AssertionError) as error:  # it asserts that there is a GPU where it needs one
        raise ValueError(f"timm's optimizer {settings.optimizer} cannot be made with {options}: {error}") from error


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optimization], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}


def _check_timm_has(name: str) -> None:
    from timm.optim import get_optimizer_info, list_optimizers  # pyright: ignore[reportPrivateImportUsage]  slow

    known = [*_OPTIMIZERS, *list_optimizers()]
    if name not in known:
        raise ValueError(
            f"There is no optimizer {name!r}: take adamw, sgd or a name of timm.optim.list_optimizers()."
            + did_you_mean(name, known)
        )
    if get_optimizer_info(name).second_order:
        raise ValueError(f"The optimizer {name!r} needs second derivatives, which training does not compute.")


def build_schedule(optimizer: Optimizer, steps: int, settings: Optimization) -> LambdaLR:
    """The learning rate's course over a run: a linear warmup, then a cosine to 0.

    Args:
        optimizer: what to schedule.
        steps: optimizer steps of the whole run.
        settings: its `warmup` is the share of the steps that warm up.
    """
    warmup = math.ceil(settings.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return LambdaLR(optimizer, factor)
