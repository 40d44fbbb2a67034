"""The co-distillation loss as pure functions of tensors, in one file, since all share the shapes and tasks named here.

Shapes: K heads, N examples, C outputs (classes, labels or regression targets), * further output dimensions.
A *position* is one entry of (N, *): what one class index describes.

Every task's loss is a negative log-likelihood with the canonical link, `l(z, y) = A(z) - <z, y> + const`:

| task | distribution | A(z) | l(z, y) at one position |
|---|---|---|---|
| multiclass | categorical | logsumexp(z) | softmax cross-entropy |
| multilabel | C times Bernoulli | sum of softplus(z) | sigmoid cross-entropy, summed over labels |
| regression | Gaussian of variance 1 | sum of z^2 / 2 | (z - y)^2 / 2, summed over outputs |

For such a loss the heads' mean loss exceeds the loss of their mean by a divergence that no target enters:
mean_k l(z_k, y) - l(zbar, y) = mean_k A(z_k) - A(zbar) = mean_k KL(pbar || p_k) >= 0.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemblenet._moved import renamed

__all__ = [
    "ClassifierTask",
    "Combine",
    "Reduction",
    "Task",
    "codistillation",
    "combine_heads",
    "divergence",
    "head_spread",
]

Task = Literal["multiclass", "multilabel", "regression"]
ClassifierTask = Literal["multiclass", "multilabel"]
Combine = Literal["logits", "probabilities"]
Reduction = Literal["mean", "sum", "none"]

# by the names that autograd gives the steps of a backward pass
_SQUASHED = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid", "LogSigmoidBackward0": "logsigmoid"}
_LOGARITHMS = {"LogSoftmaxBackward0": "log_softmax"}
_RESHAPED = re.compile(
    r"(View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Transpose|Permute|T|Select|Slice|ToCopy|Clone|Alias)Backward\d$"
)

# Named here because torch.compile does not trace get_args.
_TASKS, _COMBINES, _REDUCTIONS = get_args(Task), get_args(Combine), get_args(Reduction)

__getattr__ = renamed(__name__, {"agreement": "divergence"})

_ASK_FOR_HEADS = (
    "A combined prediction has no head dimension: ask the model for all heads by model.train() or "
    "model(x, per_head=True)."
)


def combine_heads(head_outputs: Tensor, combine: Combine = "logits", task: Task = "multiclass") -> Tensor:
    """Turn the outputs of K heads into one prediction, of the form that a single network gives.

    Args:
        head_outputs: logits or regression outputs, shape (K, N, C) or (K, N, C, *).
        combine: "logits" takes the mean of the outputs. "probabilities" takes the mean of the heads'
            probabilities and returns it as logits: its logarithm (multiclass) or its log-odds (multilabel).
            For regression, and for a single head, both are the mean of the outputs.
        task: what the outputs mean.

    Returns:
        Shape (N, C) or (N, C, *), in the dtype of `head_outputs`; probabilities are averaged in float32 or
        float64.

    Raises:
        ValueError: unknown `combine` or `task`, or no class dimension to take probabilities over.

    Example:
        >>> z = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]])
        >>> combine_heads(z)
        tensor([[1., 2.]])
        >>> bool(combine_heads(z, "probabilities").exp().allclose(z.softmax(2).mean(0)))
        True
    """
    _check_choice("combine", combine, _COMBINES)
    _check_choice("task", task, _TASKS)
    if combine == "logits" or task == "regression" or len(head_outputs) == 1:
        return head_outputs.mean(0)
    z = _full_precision(head_outputs)
    if task == "multilabel":
        return (_log_mean_exp(F.logsigmoid(z)) - _log_mean_exp(F.logsigmoid(-z))).to(head_outputs.dtype)
    _check_has_heads(z)
    return _log_mean_exp(z.log_softmax(2)).to(head_outputs.dtype)


def head_spread(head_outputs: Tensor, task: Task = "multiclass") -> Tensor:
    """How far heads differ: the standard deviation over them of what they say of each class, label or output.

    Args:
        head_outputs: logits or regression outputs, shape (K, N, C) or (K, N, C, *).
        task: "multiclass" and "multilabel" compare probabilities, "regression" the outputs.

    Returns:
        Shape (N, C) or (N, C, *), float32 or float64; 0 for a single head.

    Example:
        >>> head_spread(torch.tensor([[[0.0, 0.0]], [[0.0, 99.0]]]))
        tensor([[0.2500, 0.2500]])
    """
    _check_choice("task", task, _TASKS)
    z = _full_precision(head_outputs)
    said = {"multiclass": lambda: z.softmax(2), "multilabel": z.sigmoid, "regression": lambda: z}[task]()
    return said.std(0, correction=0)


def codistillation(
    head_outputs: Tensor,
    target: Tensor,
    weight: float,
    task: Task = "multiclass",
    *,
    combine: Combine = "logits",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    example_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    teacher_logits: Tensor | None = None,
    teacher_weight: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """The loss of the ensemble plus `weight` times a distillation of the ensemble into its heads.

    With z_k the outputs of head k, zbar their mean, p_k and pbar the distributions that these predict:

        L = l(zbar, y) + weight * mean_k KL(pbar || p_k)
          = (1 - weight) * l(zbar, y) + weight * mean_k l(z_k, y)

    The lines are equal for every target and all options below. The first is what is computed, because the
    second cancels badly at large weights; in float32 (float64 stays float64), under autocast too. Weight 0
    trains the ensemble jointly, 1 trains the heads independently on their trunk, more than 1 distils the
    ensemble into its heads. No gradient is stopped: the ensemble is no fixed teacher.

    With `combine="probabilities"` the mean of the p_k, q, takes the place of pbar:
    L = l(log q, y) + weight * mean_k KL(q || p_k). Then the second line does not hold, and weight 1 does not
    make the heads independent.

    A trained teacher, such as the base, adds `teacher_weight` times its distillation into every head, at a temperature
    T (Hinton, Vinyals and Dean 2015, arXiv 1503.02531); with p^T the distribution of outputs divided by T:

        T^2 * mean_k KL(teacher^T || p_k^T)

    For multilabel it is the sum over labels, each a distribution of two outcomes; for regression, where T drops out,
    half the squared error to the teacher's values. Every head is taught, and not their mean: at T = 1 that is the
    distillation into the mean plus mean_k KL(pbar || p_k), so that each head stays useful alone, where a taught mean
    would leave the heads free to drift apart. No gradient goes to the teacher. Class and example weights and
    `ignore_index` count for its term as they do for the divergence; label smoothing does not. It costs a forward pass
    of the teacher for each batch.

    Args:
        head_outputs: logits or regression outputs, shape (K, N, C) or (K, N, C, *).
        target: multiclass: class indices, an integer tensor of shape (N,) or (N, *), or probabilities, a
            floating-point tensor of shape (N, C) or (N, C, *). Multilabel: multi-hot or soft labels, and
            regression: values, both of shape (N, C) or (N, C, *).
        weight: the co-distillation weight, at least 0.
        task: what the outputs mean, and so the loss l. One head gives exactly `F.cross_entropy(z, y)`
            (multiclass), `F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1).mean()`
            (multilabel) or `F.mse_loss(z, y, reduction="none").sum(1).mean() / 2` (regression).
        combine: how the heads make one prediction, see [`ensemblenet.functional.combine_heads`][].
        label_smoothing: in [0, 1]. Multiclass: as `F.cross_entropy` has it. Multilabel: moves labels by this
            share of the way to 1/2. Regression has none.
        class_weight: shape (C,). Multiclass: as `F.cross_entropy` has it. Else the weight of each label or
            output in the sum over them.
        ignore_index: the class index of positions that do not count; other targets have none.
        example_weight: shape (N,), the weight of each example.
        reduction: "none" gives every position's loss, "sum" adds them up. "mean" divides the sum by what
            `F.cross_entropy` divides it by: for class indices the class weights of the positions that count,
            else the number of positions. Example weights enter that divisor too: an example of weight 2 is
            an example seen twice. Where nothing counts, the mean is NaN.
        teacher_logits: the teacher's outputs for the same inputs, shape (N, C) or (N, C, *); needed where
            `teacher_weight` is above 0, and only there.
        teacher_weight: the weight of the teacher's term, at least 0.
        temperature: T, above 0.

    Returns:
        A scalar, or shape (N,) or (N, *) with reduction "none". Never negative, unless weights or target are.

    Raises:
        TypeError: `head_outputs`, `target` or `teacher_logits` has a dtype that the task cannot use.
        ValueError: a wrong shape, an unknown name, a number out of its range, or a teacher's weight without its logits
            or logits without a weight.

    That ensembling and co-distillation are connected is the claim of Li, Ng, Natsev 2019 (arXiv 1905.09979);
    the formulas here are this project's own derivation.

    Example:
        >>> z, y = torch.randn(4, 8, 10), torch.arange(8)
        >>> loss = codistillation(z, y, weight=2.0)
        >>> heads = torch.stack([F.cross_entropy(z_k, y) for z_k in z]).mean()
        >>> torch.testing.assert_close(loss, (1 - 2.0) * F.cross_entropy(z.mean(0), y) + 2.0 * heads)
    """
    check_options(weight, task, combine, label_smoothing, reduction, teacher_weight, temperature)
    _check_has_heads(head_outputs)
    _check_target(target, head_outputs, task, ignore_index)
    _check_weights(class_weight, example_weight, head_outputs)
    _check_teacher(teacher_logits, teacher_weight, head_outputs)

    z = _full_precision(head_outputs)
    distil = weight > 0 and len(z) > 1
    combined, gap = _with_divergence(z, task, combine) if distil else (combine_heads(z, combine, task), None)
    target = target.long() if _holds_indices(target, task) else target.to(z.dtype)
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    plain_loss = partial(_plain_loss, combined, target, task, class_weight, label_smoothing, ignore_index)

    if len(z) == 1 and example_weight is None and teacher_logits is None:
        return plain_loss(reduction)
    losses = plain_loss("none")
    class_weight = z.new_ones(z.shape[2]) if class_weight is None else class_weight
    distances = [] if gap is None else [weight * gap]
    if teacher_logits is not None:
        teacher = _full_precision(teacher_logits.detach()).to(z.dtype)
        away = _not_below_0(_distance(teacher / temperature, z / temperature, task))
        distances.append(teacher_weight * temperature**2 * away)
    if distances:
        scale = _target_scale(target, task, class_weight, label_smoothing, ignore_index)
        losses = losses + (scale * sum(distances)).sum(1)
    counts = torch.ones_like(losses)
    if not target.is_floating_point():
        counts = _index_weight(target, class_weight, ignore_index)
    if example_weight is not None:
        example_weight = _along(0, example_weight.to(z.dtype), losses.ndim)
        losses, counts = example_weight * losses, example_weight * counts
    if reduction == "mean":
        return losses.sum() / counts.sum()
    return losses.sum() if reduction == "sum" else losses


def divergence(head_outputs: Tensor, task: Task = "multiclass", *, combine: Combine = "logits") -> Tensor:
    """How far the heads are from their ensemble: mean_k KL(pbar || p_k), 0 where all heads predict the same.

    It is what [`ensemblenet.functional.codistillation`][] multiplies by its weight where no class or example
    weights are given: averaged over positions, summed over labels or regression outputs.

    Args:
        head_outputs: logits or regression outputs, shape (K, N, C) or (K, N, C, *).
        task: what the outputs mean.
        combine: how the heads make one prediction; with "probabilities" it is mean_k KL(q || p_k).

    Returns:
        A scalar in nats, at least 0; float32 or float64.

    Raises:
        TypeError: `head_outputs` is no floating-point tensor.
        ValueError: no head dimension, or an unknown `task` or `combine`.

    Example:
        >>> z = torch.randn(4, 8, 10)
        >>> bool(divergence(z) > 0), divergence(z[:1].expand_as(z)).item()
        (True, 0.0)
    """
    _check_has_heads(head_outputs)
    z = _full_precision(head_outputs)
    return _with_divergence(z, task, combine)[1].sum(1).mean()


def _plain_loss(
    z: Tensor,
    target: Tensor,
    task: Task,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """The loss of one prediction (N, C, *)."""
    if task == "multiclass":
        return F.cross_entropy(
            z,
            target,
            class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if task == "multilabel":
        target = target + label_smoothing * (0.5 - target)
        losses = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    else:
        losses = F.mse_loss(z, target, reduction="none") / 2
    if class_weight is not None:
        losses = losses * _along(1, class_weight, z.ndim)
    losses = losses.sum(1)
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses


def _with_divergence(z: Tensor, task: Task, combine: Combine) -> tuple[Tensor, Tensor]:
    """The ensemble, and mean_k KL(ensemble || head k): (N, 1, *) for multiclass, else for each output, (N, C, *)."""
    if combine == "logits" or task == "regression":
        return _MeanAndGap.apply(z, task)  # pyright: ignore[reportReturnType]
    combined = combine_heads(z, combine, task)
    return combined, _not_below_0(_distance(combined, z, task))


def _not_below_0(gap: Tensor) -> Tensor:
    """A gap of almost zero that rounding left below it. Only the value is lifted: the gradient stays exact."""
    return gap + (gap.clamp(min=0) - gap).detach()


class _MeanAndGap(torch.autograd.Function):
    """zbar, and mean_k A(z_k) - A(zbar) with its gradient (grad A(z_k) - grad A(zbar)) / K in closed form.

    Autograd would keep more than a copy of z for backward; this keeps z alone, which its maker has anyway. Both results
    have one backward, so that their gradients need not be added up in another pass over z.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        mean = z.mean(0)
        if task == "regression":
            return mean, (z - mean).square().mean(0) / 2
        gap = _gap_of_softmax(z, mean) if task == "multiclass" else _gap_of_sigmoid(z, mean)
        return mean, gap.relu_()  # rounding may have left almost zero below it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Task], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.task = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        of_mean, of_gap = (gradient / len(z) for gradient in grad_outputs)
        of_mean = of_mean - of_gap * _gradient_of_a(z.mean(0), ctx.task, 1)
        return torch.addcmul(of_mean, of_gap, _gradient_of_a(z, ctx.task, 2)), None


def _gradient_of_a(z: Tensor, task: Task, classes: int) -> Tensor:
    """The gradient of A, which is the prediction: probabilities, or the values themselves."""
    if task == "regression":
        return z
    return z.softmax(classes) if task == "multiclass" else z.sigmoid()


def _gap_of_softmax(z: Tensor, mean: Tensor) -> Tensor:
    """mean_k A(z_k) - A(mean) for A = logsumexp over classes, (N, 1, *)."""
    # A(z) = z_c - log_softmax(z)_c for any class c, and z_c drops out of the gap: the ensemble's best class keeps the
    # digits of large logits. log_softmax, and one head at a time, is several times as fast on a CPU as logsumexp.
    best = mean.argmax(1, keepdim=True)
    heads = torch.stack([one.log_softmax(1).gather(1, best) for one in z])
    return mean.log_softmax(1).gather(1, best) - heads.mean(0)


def _gap_of_sigmoid(z: Tensor, mean: Tensor) -> Tensor:
    """mean_k A(z_k) - A(mean) for A = softplus, (N, C, *)."""
    # softplus(z) = max(z, 0) + log(1 + exp(-|z|)). Less z where the mean is positive, which drops out of the gap, its
    # first term is 0 for a head of the mean's sign and |z| for another: nothing large is subtracted.
    against = torch.where(mean > 0, -1.0, 1.0).to(z.dtype)
    return (against * z).relu_().add_(_log1p_exp(z)).mean(0) - _log1p_exp(mean)


def _log1p_exp(z: Tensor) -> Tensor:
    """log(1 + exp(-|z|))."""
    small = z.abs().neg_().exp_()
    if z.device.type != "cpu":
        return small.log1p_()
    # There PyTorch's log1p takes as long as twenty logarithms: what rounding took from the sum is put back instead.
    sum_ = small + 1
    return small.sub_(sum_ - 1).div_(sum_).add_(sum_.log_())


def _distance(one: Tensor, z: Tensor, task: Task) -> Tensor:
    """mean_k KL(one || head k) of outputs (N, C, *) and (K, N, C, *): (N, 1, *) for multiclass, else (N, C, *)."""
    if task == "regression":
        return (z - one).square().mean(0) / 2
    if task == "multiclass":
        return _kl(one.log_softmax(1), z.log_softmax(2)).sum(1, keepdim=True)
    return _kl(F.logsigmoid(one), F.logsigmoid(z)) + _kl(F.logsigmoid(-one), F.logsigmoid(-z))


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The terms of mean_k KL(q || p_k), from log q of shape (N, C, *) and log p of shape (K, N, C, *)."""
    q = log_q.exp()
    return q * (log_q - log_p.mean(0)).masked_fill(q == 0, 0.0)  # a masked class has a logit of -inf in both


def _target_scale(
    target: Tensor, task: Task, class_weight: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """The factor of A(z) in a weighted loss, and so of the divergence: (N, 1, *) for multiclass, else (1, C, *)."""
    if task != "multiclass":
        return _along(1, class_weight, target.ndim)
    if target.is_floating_point():
        smoothed = target + label_smoothing * (1 / target.shape[1] - target)
        return (smoothed * _along(1, class_weight, target.ndim)).sum(1, keepdim=True)
    own = _index_weight(target, class_weight, ignore_index)
    everyone = class_weight.mean() * (target != ignore_index)
    return (own + label_smoothing * (everyone - own)).unsqueeze(1)


def _index_weight(target: Tensor, class_weight: Tensor, ignore_index: int) -> Tensor:
    """The class weight of each position's class index, 0 where it is ignored."""
    counts = target != ignore_index
    return class_weight[target.where(counts, 0)] * counts


def _log_mean_exp(x: Tensor) -> Tensor:
    return x.logsumexp(0) - math.log(len(x))


def _along(dim: int, x: Tensor, ndim: int) -> Tensor:
    """View a vector as a tensor of `ndim` dimensions that extends along `dim`."""
    return x.view([-1 if i == dim else 1 for i in range(ndim)])


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _holds_indices(target: Tensor, task: Task) -> bool:
    return task == "multiclass" and not target.is_floating_point()


def no_logits(outputs: Tensor, task: Task = "multiclass") -> str | None:
    """What to say of a network whose outputs are probabilities or their logarithms, where the losses take logits.

    A softmax or a sigmoid at the end is told by the graph of gradients, in whatever form it was called; a softmax made
    by hand by its values, (N, C). A log_softmax is welcome where classes exclude each other: it takes one number from
    all logits of an example. Each A(z_k) falls by head k's number, as its logits do, and A of the heads' mean by the
    mean of these numbers: the cross-entropies and their divergence stay what they were. Where each label has a sigmoid
    of its own it is none: no output could be above 0, and no label likelier than not.

    Args:
        outputs: of the network, worked out with gradients.
        task: what they are for.

    Example:
        >>> z = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
        >>> no_logits(z), no_logits(z.log_softmax(1))
        (None, None)
        >>> no_logits(z.softmax(1)).partition(",")[0]
        'The base ends in a softmax'
        >>> no_logits(z.log_softmax(1), "multilabel").partition(",")[0]
        'The base ends in a log_softmax'
    """
    squashed = _SQUASHED if task == "multiclass" else _SQUASHED | _LOGARITHMS
    step = outputs.grad_fn
    while step is not None and _RESHAPED.match(step.name()):
        step = step.next_functions[0][0]
    found = None if step is None else squashed.get(step.name())
    if found is None and outputs.ndim == 2 and outputs.shape[1] > 1 and outputs.is_floating_point():
        rounding = max(1e-5, 2 * torch.finfo(outputs.dtype).eps)
        for name, shares in (("softmax", outputs), ("log_softmax", outputs.exp())):
            sums = shares.float().sum(1)
            adds_up = (shares >= 0).all() and torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=rounding)
            if adds_up and name in squashed.values():
                found = name
    if found is None:
        return None
    return (
        f"The base ends in a {found}, and the loss takes logits: leave the {found} out of the base. It belongs behind "
        "the prediction, where the commands have it."
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def check_options(
    weight: float,
    task: Task,
    combine: Combine,
    label_smoothing: float,
    reduction: Reduction,
    teacher_weight: float = 0.0,
    temperature: float = 1.0,
) -> None:
    """Raise ValueError for an unknown name or a number out of its range, as every call of the loss does."""
    _check_choice("task", task, _TASKS)
    _check_choice("combine", combine, _COMBINES)
    _check_choice("reduction", reduction, _REDUCTIONS)
    if not 0 <= weight < math.inf:
        raise ValueError(f"The co-distillation weight must be a finite number of at least 0, got {weight}.")
    if not 0 <= teacher_weight < math.inf:
        raise ValueError(f"teacher_weight must be a finite number of at least 0, got {teacher_weight}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}.")
    if label_smoothing and task == "regression":
        raise ValueError(f"task='regression' has no label_smoothing, got {label_smoothing}; leave it at 0.")


def _check_has_heads(head_outputs: Tensor) -> None:
    if not isinstance(head_outputs, Tensor) or not head_outputs.is_floating_point():
        raise TypeError(
            f"head_outputs must be a floating-point tensor of shape (K, N, C) or (K, N, C, *), got "
            f"{_describe(head_outputs)}. Stack a list of outputs with torch.stack."
        )
    if head_outputs.ndim < 3 or len(head_outputs) == 0:
        raise ValueError(
            f"head_outputs must have the shape (K, N, C) or (K, N, C, *) with at least one head, got "
            f"{tuple(head_outputs.shape)}. {_ASK_FOR_HEADS} Heads that give one number an example, (K, N), have C = 1: "
            "unsqueeze(-1) them and the target."
        )


def _check_target(target: Tensor, head_outputs: Tensor, task: Task, ignore_index: int) -> None:
    if not isinstance(target, Tensor) or target.is_complex():
        raise TypeError(f"target must be a real tensor, got {_describe(target)}.")
    full = tuple(head_outputs.shape[1:])
    indices = full[:1] + full[2:]
    if task == "multiclass":
        wanted = (
            f"class indices, an integer tensor of shape {indices}, or probabilities, a floating-point tensor "
            f"of shape {full}"
        )
    else:
        wanted = f"a tensor of shape {full}"
    if _holds_indices(target, task) and target.dtype == torch.bool:
        raise TypeError(
            f"target for task={task!r} must be {wanted}; got {_describe(target)}. "
            f"Multi-hot labels need task='multilabel'."
        )
    if tuple(target.shape) != (indices if _holds_indices(target, task) else full):
        raise ValueError(
            f"target for task={task!r} must be {wanted}, for head_outputs of shape "
            f"{tuple(head_outputs.shape)}; got {_describe(target)}."
            f"{_target_remedy(target, head_outputs, task)}"
        )
    if ignore_index >= 0 and not _holds_indices(target, task):
        raise ValueError(
            f"ignore_index must stay negative for a target without class indices, got {ignore_index}. "
            f"Use example_weight to leave examples out."
        )


def _target_remedy(target: Tensor, head_outputs: Tensor, task: Task) -> str:
    shape, outputs = tuple(target.shape), tuple(head_outputs.shape)
    if shape in (outputs, outputs[:1] + outputs[2:]):
        return f" {_ASK_FOR_HEADS}"
    if task == "multiclass" and shape == outputs[1:]:
        return " Turn one-hot targets into probabilities with target.float()."
    if task == "multiclass" and shape == outputs[1:2] + outputs[3:]:
        return " Turn class indices into integers with target.long()."
    return ""


def _check_weights(class_weight: Tensor | None, example_weight: Tensor | None, head_outputs: Tensor) -> None:
    _, n, c = head_outputs.shape[:3]
    for name, tensor, shape in [
        ("class_weight", class_weight, (c,)),
        ("example_weight", example_weight, (n,)),
    ]:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}.")


def _check_teacher(teacher_logits: Tensor | None, teacher_weight: float, head_outputs: Tensor) -> None:
    if teacher_logits is None:
        if teacher_weight > 0:
            raise ValueError(
                f"teacher_weight is {teacher_weight} and there are no teacher_logits: give the teacher's outputs for "
                "this batch, or a teacher_weight of 0."
            )
        return
    if teacher_weight == 0:
        raise ValueError("teacher_logits are given and teacher_weight is 0: set it, or leave the teacher's logits out.")
    if not isinstance(teacher_logits, Tensor) or not teacher_logits.is_floating_point():
        raise TypeError(f"teacher_logits must be a floating-point tensor, got {_describe(teacher_logits)}.")
    wanted = tuple(head_outputs.shape[1:])
    if tuple(teacher_logits.shape) != wanted:
        classes = head_outputs.shape[2]
        others = teacher_logits.ndim > 1 and teacher_logits.shape[1] != classes
        raise ValueError(
            f"teacher_logits must have the shape {wanted}, as each head's outputs; got {tuple(teacher_logits.shape)}."
            + (f" The teacher has {teacher_logits.shape[1]} classes and the heads have {classes}." if others else "")
        )


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
