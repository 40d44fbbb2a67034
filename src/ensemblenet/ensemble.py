"""EnsembleNet: one trunk, K heads, one prediction.

Shapes: N examples, K heads, C outputs (classes, labels or regression targets), * further output dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ensemblenet.cost import Cost, measure_call
from ensemblenet.families import Family, FamilyModel
from ensemblenet.functional import Combine, Task, combine_heads

if TYPE_CHECKING:
    from ensemblenet.recipe import Recipe

__all__ = ["EnsembleNet", "SingleHead", "as_tuple", "combining_cost"]


class _OnTrunk(nn.Module):
    """A network on a trunk, which may be frozen."""

    trunk: nn.Module
    trunk_is_frozen: bool

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen trunk stays in evaluation mode."""
        super().train(mode)
        if self.trunk_is_frozen:
            self.trunk.eval()
        return self


class EnsembleNet(_OnTrunk, FamilyModel):
    """A shared trunk with K heads whose outputs combine into one prediction.

    [`ensemblenet.convert`][] makes one from a single network; build it by hand for a network that cannot
    be traced.

    Args:
        trunk: maps the inputs to the features that every head reads; or to a tuple of the features and more that
            heads take, which are then called with `head(*tuple)`.
        heads: the K heads; each maps the features to (N, C) or (N, C, *), or to a tuple of such tensors.
        combine: how evaluation turns K outputs into one, see [`ensemblenet.functional.combine_heads`][].
        task: what the outputs mean; only `combine="probabilities"` depends on it.
        balance_gradients: keep the base's gradient scale in the heads. A loss that is a mean over heads sends
            each head 1/K of the gradient that the base would have had, so under SGD heads would learn K times
            slower. With this on, backward multiplies the gradient by K where it enters the heads and divides it
            by K where it leaves them for the trunk; outputs, the loss's value and the trunk's gradient do not
            change. docs/procedure.md has the measurement.
        recipe: how the model was made from its base, if it was converted.
        trunk_cost: what the trunk costs, if known.
        head_cost: what one head costs, if known.
        base_cost: what the base cost, if there was one.
        output_shapes: the shapes (N, C, *) of the tensors that a head gives, if known: their combination counts too.
        trunk_is_frozen: whether the trunk stays in evaluation mode, see
            [`freeze_trunk`][ensemblenet.EnsembleNet.freeze_trunk], which also freezes its parameters.
        family: whose models this one behaves like, see [`ensemblenet.families.FamilyModel`][].

    Attributes:
        checkpoint_activations: activation checkpointing: backward computes the activations of one head after another
            again instead of keeping those of all. It saves memory and costs a second forward pass of the heads. Fused
            heads do not heed it.

    Shape:
        - input: whatever the trunk takes.
        - output: (K, N, C, *) in training mode or with `per_head=True`; else (N, C, *). A tuple of such tensors where
          heads give several.

    Raises:
        TypeError: the trunk or a head is not a module.
        ValueError: no heads, or an unknown `combine` or `task`.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        >>> model = EnsembleNet(trunk, [nn.Linear(16, 3) for _ in range(4)])
        >>> x = torch.randn(5, 8)
        >>> model.train()(x).shape, model.eval()(x).shape
        (torch.Size([4, 5, 3]), torch.Size([5, 3]))
        >>> model.head(2)(x).shape, model.first(2).num_heads
        (torch.Size([5, 3]), 2)
    """

    checkpoint_activations = False

    def __init__(
        self,
        trunk: nn.Module,
        heads: Iterable[nn.Module],
        combine: Combine = "logits",
        *,
        task: Task = "multiclass",
        balance_gradients: bool = True,
        recipe: Recipe | None = None,
        trunk_cost: Cost | None = None,
        head_cost: Cost | None = None,
        base_cost: Cost | None = None,
        output_shapes: Sequence[Sequence[int]] = (),
        trunk_is_frozen: bool = False,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        heads = list(heads)
        for name, module in [("trunk", trunk), *((f"heads[{k}]", head) for k, head in enumerate(heads))]:
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}.")
        if not heads:
            raise ValueError("heads must hold at least one module, got none.")
        combine_heads(torch.zeros(1, 1, 1), combine, task)  # rejects unknown names now, not in the first evaluation
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)
        self.combine: Combine = combine
        self.task: Task = task
        self.balance_gradients = balance_gradients
        self.recipe = recipe
        self.trunk_cost = trunk_cost
        self.head_cost = head_cost
        self.base_cost = base_cost
        self.output_shapes = output_shapes
        self.trunk_is_frozen = trunk_is_frozen
        self.family = family

    @property
    def recompute(self) -> bool:
        """The old name of `checkpoint_activations`."""
        _warn_of_recompute()
        return self.checkpoint_activations

    @recompute.setter
    def recompute(self, value: bool) -> None:
        _warn_of_recompute()
        self.checkpoint_activations = value

    @property
    def num_heads(self) -> int:
        """K, the number of heads."""
        return len(self.heads)

    @property
    def cost(self) -> Cost | None:
        """What the whole model costs, if the costs of its parts are known."""
        if self.trunk_cost is None or self.head_cost is None:
            return None
        return (
            self.trunk_cost
            + self.num_heads * self.head_cost
            + combining_cost(self.output_shapes, self.num_heads, self.combine, self.task)
        )

    def forward(self, *args: Any, per_head: bool = False, **kwargs: Any) -> Any:
        """Run the trunk once and every head on what it gives; see the class for shapes."""
        if self.family is not None and self.family.answers(kwargs):
            return self.family.answer(self, args, kwargs)
        features, *side = as_tuple(self.trunk(*args, **kwargs))
        balance = self.balance_gradients and self.num_heads > 1 and torch.is_grad_enabled()
        if balance:
            features = scale_gradient(features, 1 / self.num_heads)
        stacks = as_tuple(self._run_heads(features, *side))
        if balance:
            stacks = tuple(scale_gradient(outputs, float(self.num_heads)) for outputs in stacks)
        if not (self.training or per_head):
            stacks = tuple(map(self.prediction, stacks))
        return stacks[0] if len(stacks) == 1 else stacks

    def prediction(self, head_outputs: Tensor) -> Tensor:
        """What heads say together, (N, C, *), of what each says, (K, N, C, *); features of heads stand side by side."""
        if self.family is not None and self.family.joined_at is not None:
            return torch.cat(list(head_outputs), self.family.joined_at)
        return combine_heads(head_outputs, self.combine, self.task)

    def _run_heads(self, *given: Any) -> Any:
        """The outputs of all heads, (K, N, C, *); a tuple of such stacks where a head gives several tensors."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            outputs = [_checkpointed(head, *given) for head in self.heads]
        else:
            outputs = [head(*given) for head in self.heads]
        if isinstance(outputs[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return torch.stack(outputs)

    def head(self, k: int) -> SingleHead:
        """The plain network of the trunk and head `k` alone, sharing parameters with this model.

        Raises:
            IndexError: `k` is not in [0, K).
        """
        if not 0 <= k < self.num_heads:
            raise IndexError(f"head index must be in [0, {self.num_heads}), got {k}.")
        return SingleHead(self.trunk, self.heads[k], self.trunk_is_frozen).train(self.training)

    def freeze_trunk(self, frozen: bool = True) -> Self:
        """Train the heads alone: the trunk's parameters get no gradients, and training leaves it in evaluation mode.

        So its dropout is off and its running statistics stay. The trunk then costs a training step its forward pass
        alone: its share of the MACs of the backward pass, and of the activations that are kept for it, is saved.
        What is saved and loaded again is frozen too, and so is what `head` and `first` give. Make optimizers and
        take single heads after it, or after `freeze_trunk(False)`, which lets all parameters of the trunk learn.

        Args:
            frozen: whether it is to be.

        Returns:
            This model.

        Raises:
            ValueError: the trunk has no parameters.

        Example:
            >>> trunk = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
            >>> model = EnsembleNet(trunk, [nn.Linear(16, 3) for _ in range(4)]).freeze_trunk().train()
            >>> model.training, model.trunk.training, trunk[0].weight.requires_grad
            (True, False, False)
        """
        parameters = [own for own in self.trunk.parameters() if own.is_floating_point() or own.is_complex()]
        if not parameters:
            raise ValueError("The trunk has no parameters to freeze: split behind some, by split_at=.")
        for own in parameters:
            own.requires_grad_(not frozen)
        self.trunk_is_frozen = frozen
        if self.recipe is not None:
            self.recipe = replace(self.recipe, freeze="trunk" if frozen else None)
        return self.train(self.training)

    def first(self, k: int) -> EnsembleNet:
        """The multi-headed model of the first `k` heads, sharing parameters with this one.

        Raises:
            ValueError: `k` is not in [1, K].
        """
        if not 1 <= k <= self.num_heads:
            raise ValueError(f"first(k) needs k in [1, {self.num_heads}], got {k}.")
        model = self.with_heads(list(self.heads)[:k])
        model.recipe = self.recipe.with_heads(k) if self.recipe else None
        return model.train(self.training)

    def with_heads(self, heads: Iterable[nn.Module], kind: type[EnsembleNet] | None = None) -> EnsembleNet:
        """A model of the same trunk and options with other heads, or of another class.

        Args:
            heads: its heads.
            kind: its class; None makes an `EnsembleNet`.
        """
        options = {name: getattr(self, name) for name in _OPTIONS}
        return (kind or EnsembleNet)(self.trunk, heads, **options)


def combining_cost(
    output_shapes: Sequence[Sequence[int]], num_heads: int, combine: Combine = "logits", task: Task = "multiclass"
) -> Cost:
    """What it costs to make one prediction of K heads' outputs.

    Args:
        output_shapes: (N, C, *) of each tensor that a head gives.
        num_heads: K.
        combine: how, see [`ensemblenet.functional.combine_heads`][].
        task: what the outputs mean.

    Example:
        >>> combining_cost([(2, 10)], num_heads=3).activations  # a stack and its mean
        40.0
    """
    total = Cost(0, 0.0)
    for shape in output_shapes:
        outputs = [torch.empty(tuple(shape), device="meta") for _ in range(num_heads)]
        total += measure_call(lambda own=outputs: combine_heads(torch.stack(own), combine, task), outputs)
    return total


class SingleHead(_OnTrunk):
    """A trunk and one head: a plain network.

    Args:
        trunk: of a multi-headed model.
        head: one of its heads.
        trunk_is_frozen: whether the trunk stays in evaluation mode.

    Example:
        >>> SingleHead(nn.Linear(8, 16), nn.Linear(16, 3))(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, trunk_is_frozen: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.trunk_is_frozen = trunk_is_frozen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the head on what the trunk gives."""
        return self.head(*as_tuple(self.trunk(*args, **kwargs)))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, anything else as a tuple of one: what a trunk gives, as the arguments of a head.

    Example:
        >>> as_tuple(3), as_tuple((3, 4))
        ((3,), (3, 4))
    """
    return value if isinstance(value, tuple) else (value,)


_OPTIONS = (
    *("combine", "task", "balance_gradients", "recipe", "trunk_cost", "head_cost", "base_cost", "output_shapes"),
    *("trunk_is_frozen", "family"),
)


def _warn_of_recompute() -> None:
    text = "EnsembleNet.recompute is now EnsembleNet.checkpoint_activations."
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def _checkpointed(head: nn.Module, *given: Any) -> Any:
    """A head's output under activation checkpointing; backward draws the same random numbers again."""
    return checkpoint(head, *given, use_reentrant=False, context_fn=lambda: (nullcontext(), _StatisticsAtRest(head)))


class _StatisticsAtRest:
    """A context in which normalisations leave their running statistics as they are."""

    def __init__(self, module: nn.Module) -> None:
        layers: list[Any] = [layer for layer in module.modules() if getattr(layer, "track_running_stats", False)]
        self.states = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]

    def __enter__(self) -> None:
        # keep running statistics attached; otherwise checkpointing sees other saved tensors
        for layer, _, _ in self.states:
            layer.momentum, layer.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for layer, momentum, count in self.states:
            layer.momentum, layer.num_batches_tracked = momentum, count


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The tensor itself, with its gradient multiplied by `factor` in backward."""
    return _ScaleGradient.apply(x, factor)  # pyright: ignore[reportReturnType]
