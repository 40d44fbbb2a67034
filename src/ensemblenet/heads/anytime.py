"""Predict with as many heads as each example needs.

Shapes: N examples, K heads, C outputs, * further output dimensions; k heads have run so far, n examples go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.errors import EnsembleNetError
from ensemblenet.functional import Task, combine_heads
from ensemblenet.inputs import Tree, call, num_examples

__all__ = ["Anytime", "AnytimeError", "StopRule", "confident", "heads_agree", "predict_anytime", "settled"]

StopRule = Callable[[Tensor], Tensor]


class AnytimeError(EnsembleNetError, ValueError):
    """A model that cannot stop early for single examples, or a stop rule that does not answer for each."""


@dataclass(frozen=True)
class Anytime:
    """Predictions, and how many heads and MACs they took.

    Attributes:
        outputs: shape (N, C, *): for each example the combination of its first heads.
        heads_used: how many, shape (N,), integers from 1 to K.
        macs: multiply-adds, the mean over examples; None if the costs of the model's parts are not known.

    Example:
        >>> Anytime(torch.zeros(2, 3), torch.tensor([1, 4]), None).heads_used.double().mean().item()
        2.5
    """

    outputs: Tensor
    heads_used: Tensor
    macs: float | None


def heads_agree(task: Task = "multiclass") -> StopRule:
    """A stop rule: two heads or more have run, and all of them predict the same.

    Args:
        task: "multiclass" compares their most likely classes, "multilabel" which labels have positive logits. All
            positions of a dense output must agree.

    Example:
        >>> z = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[4.0, 0.0], [1.0, 0.0]]])
        >>> heads_agree()(z), heads_agree()(z[:1])
        (tensor([ True, False]), tensor([False, False]))
    """

    def rule(head_outputs: Tensor) -> Tensor:
        says = head_outputs > 0 if task == "multilabel" else head_outputs.argmax(2, keepdim=True)
        same = (says == says[0]).all(0).flatten(1).all(1)
        return same & (len(head_outputs) > 1)

    return rule


def confident(threshold: float) -> StopRule:
    """A stop rule: the mean of the logits so far gives one class such a probability, at every position.

    Example:
        >>> confident(0.9)(torch.tensor([[[4.0, 0.0], [1.0, 0.0]]]))
        tensor([ True, False])
    """

    def rule(head_outputs: Tensor) -> Tensor:
        best = head_outputs.float().mean(0).softmax(1).amax(1, keepdim=True)
        return (best >= threshold).flatten(1).all(1)

    return rule


def settled(window: int = 1, tolerance: float = 0.05) -> StopRule:
    """A stop rule: the last heads have changed little, whether the prediction is confident or not.

    Over the last `window` heads, at every position, the most likely class of the mean of the logits so far stayed the
    same, and its probability within a range of `tolerance`.

    Args:
        window: how many heads must have changed little, at least 1; so `window + 1` heads run at least.
        tolerance: the range, in [0, 1].

    Raises:
        AnytimeError: a window or a tolerance that cannot be.

    Example:
        >>> z = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[2.1, 0.0], [9.0, 0.0]]])
        >>> settled()(z), settled()(z[:1])
        (tensor([ True, False]), tensor([False, False]))
    """
    if window < 1 or not 0 <= tolerance <= 1:
        raise AnytimeError(
            f"settled needs a window of at least 1 head and a tolerance in [0, 1], got {window}, {tolerance:g}."
        )

    def rule(head_outputs: Tensor) -> Tensor:
        k = len(head_outputs)
        if k <= window:
            return torch.zeros(head_outputs.shape[1], dtype=torch.bool, device=head_outputs.device)
        means = torch.stack([head_outputs[:count].float().mean(0) for count in range(k - window, k + 1)])
        best, classes = means.softmax(2).max(2, keepdim=True)
        stays = (classes == classes[-1]).all(0) & (best.amax(0) - best.amin(0) <= tolerance)
        return stays.flatten(1).all(1)

    return rule


@torch.no_grad()
def predict_anytime(model: EnsembleNet, x: Tree, stop: StopRule | None = None) -> Anytime:
    """Run the trunk once, then the heads in their order, for each example until a rule says stop.

    A head runs on the examples that are left. The output of an example that stopped after k heads is that of
    `model.first(k)`. Several heads run as one can be faster than the few that are needed: measure it on your machine.

    Args:
        model: in evaluation mode; whether its heads are fused makes no difference.
        x: inputs, shape (N, *), or a tuple or a dictionary of tensors.
        stop: from the outputs of the heads so far, (k, n, C, *), to booleans of shape (n,); None takes
            [`ensemblenet.heads.anytime.heads_agree`][] for the model's task.
            [`ensemblenet.heads.anytime.confident`][] and [`ensemblenet.heads.anytime.settled`][] are others.

    Raises:
        AnytimeError: the model is in training mode, its trunk does not give one row for each example, or the rule
            does not return one boolean for each.

    Example:
        >>> from torch import nn
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(4)]).eval()
        >>> result = predict_anytime(model, torch.randn(5, 8), confident(0.5))
        >>> result.outputs.shape, result.heads_used.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    if model.training:
        raise AnytimeError("predict_anytime needs a model in evaluation mode; call model.eval().")
    stop = stop or heads_agree(model.task)
    given = as_tuple(call(model.trunk, x))
    size = num_examples(x)
    if any(not isinstance(value, Tensor) or len(value) != size for value in given):
        shapes = ", ".join(str(tuple(value.shape) if isinstance(value, Tensor) else value) for value in given)
        raise AnytimeError(
            f"The trunk gives {shapes} for {size} examples, not a row for each; split the base elsewhere."
        )
    left = torch.arange(size, device=given[0].device)  # (n,): the rows that go on
    heads_used = torch.full_like(left, model.num_heads)
    ended: list[tuple[Tensor, Tensor]] = []
    so_far: list[Tensor] = []  # k outputs (n, C, *)
    for k, head in enumerate(model.heads, start=1):
        so_far.append(head(*given))
        outputs = torch.stack(so_far)
        stops = _checked(stop(outputs), left) if k < model.num_heads else torch.ones_like(left, dtype=torch.bool)
        if stops.any() or len(left) == 0:
            heads_used[left[stops]] = k
            ended.append((left[stops], combine_heads(outputs[:, stops], model.combine, model.task)))
            left, given = left[~stops], tuple(value[~stops] for value in given)
            so_far = [output[~stops] for output in so_far]
        if len(left) == 0:
            break
    rows, values = (torch.cat(parts) for parts in zip(*ended, strict=True))
    return Anytime(values[rows.argsort()], heads_used, _mean_macs(model, heads_used))


def _checked(stops: Tensor, left: Tensor) -> Tensor:
    if stops.dtype != torch.bool or stops.shape != left.shape:
        raise AnytimeError(
            f"The rule must return booleans of shape {tuple(left.shape)}, got {stops.dtype} of shape "
            f"{tuple(stops.shape)}."
        )
    return stops


def _mean_macs(model: EnsembleNet, heads_used: Tensor) -> float | None:
    if model.trunk_cost is None or model.head_cost is None or len(heads_used) == 0:
        return None
    return model.trunk_cost.macs + heads_used.double().mean().item() * model.head_cost.macs
