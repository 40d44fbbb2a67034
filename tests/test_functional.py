"""The loss against independent references: plain PyTorch losses, SciPy, scikit-learn, and its own algebra."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import log_loss
from torch.autograd import gradcheck

from ensemblenet.functional import codistillation, combine_heads, divergence

TASKS = ["multiclass", "multilabel", "regression"]
COMBINES = ["logits", "probabilities"]
K, N, C = 3, 5, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def heads(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(*(shape or (K, N, C)), generator=seeded(seed), dtype=dtype)


def targets(task, n=N, c=C, dense=(), seed=0, dtype=torch.float64):
    if task == "multiclass":
        return torch.randint(c, (n, *dense), generator=seeded(seed))
    if task == "multilabel":
        return torch.randint(2, (n, c, *dense), generator=seeded(seed)).to(dtype)
    return torch.randn(n, c, *dense, generator=seeded(seed), dtype=dtype)


def plain(z, y, task, *, class_weight=None, label_smoothing=0.0, ignore_index=-100, reduction="mean"):
    """The loss of one network, as its user would write it in PyTorch."""
    if task == "multiclass":
        return F.cross_entropy(
            z,
            y,
            class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    if task == "multilabel":
        y = (1 - label_smoothing) * y + label_smoothing / 2
        weight = None if class_weight is None else class_weight.view(-1, *[1] * (z.ndim - 2))
        losses = F.binary_cross_entropy_with_logits(z, y, weight, reduction="none").sum(1)
    else:
        weight = 1 if class_weight is None else class_weight.view(-1, *[1] * (z.ndim - 2))
        losses = (weight * F.mse_loss(z, y, reduction="none")).sum(1) / 2
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]


def second_form(z, y, weight, task="multiclass", **options):
    """(1 - weight) * loss of the mean + weight * mean loss of the heads."""
    of_heads = torch.stack([plain(z_k, y, task, **options) for z_k in z]).mean(0)
    return (1 - weight) * plain(z.mean(0), y, task, **options) + weight * of_heads


@st.composite
def problems(draw, task):
    """Random logits, target, weight and options."""
    k, n, c = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 5))
    dense = draw(st.sampled_from([(), (3,), (2, 2)]))
    seed = draw(st.integers(0, 2**16))
    z = heads(k, n, c, *dense, seed=seed, scale=draw(st.sampled_from([0.01, 1.0, 20.0])))
    y = targets(task, n, c, dense, seed)
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(c, generator=seeded(seed), dtype=torch.float64) + 0.1
    if task != "regression":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if task == "multiclass":
        kind = draw(st.sampled_from(["hard", "ignored", "mixed", "positive"]))
        if kind == "ignored" and y.numel() > 1:
            y.view(-1)[0], options["ignore_index"] = 1, 1
            y.view(-1)[1] = 0  # something has to count
        elif kind != "hard":
            other = F.one_hot(targets(task, n, c, dense, seed + 1), c).movedim(-1, 1).double()
            y = 0.7 * F.one_hot(y, c).movedim(-1, 1).double() + 0.3 * other
            y = y if kind == "mixed" else 2 * y  # not even a distribution: the identity holds for any target
    return z, y, draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 30.0])), options


@pytest.mark.parametrize("task", TASKS)
def test_identity(task: str) -> None:
    """Both forms of L are equal for every target and under every option."""

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(problems(task))
    def check(problem):
        z, y, weight, options = problem
        actual = codistillation(z, y, weight, task, **options)
        torch.testing.assert_close(actual, second_form(z, y, weight, task, **options), rtol=1e-9, atol=1e-9)

    check()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_example_weight_counts_an_example_that_often(task: str, combine: str, reduction: str) -> None:
    z, y = heads(K, N, C, 2), targets(task, dense=(2,))
    times = torch.tensor([2, 0, 1, 3, 1])
    options = {"class_weight": torch.tensor([0.5, 1.0, 2.0, 3.0]), "combine": combine}
    actual = codistillation(z, y, 2.0, task, example_weight=times, reduction=reduction, **options)
    repeated = z.repeat_interleave(times, dim=1), y.repeat_interleave(times, dim=0)
    expected = codistillation(*repeated, 2.0, task, reduction=reduction, **options)
    if reduction == "none":
        actual, expected = actual.sum(), expected.sum()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_zero_and_one_are_plain_losses(task: str, weight: float) -> None:
    z, y = heads(), targets(task)
    expected = plain(z.mean(0), y, task) if weight == 0 else torch.stack([plain(z_k, y, task) for z_k in z]).mean()
    torch.testing.assert_close(codistillation(z, y, weight, task), expected)


def test_multiclass_against_scipy_and_scikit_learn() -> None:
    z, y = heads(), targets("multiclass")
    p, pbar = z.softmax(2).numpy(), z.mean(0).softmax(1).numpy()
    apart = np.mean([entropy(pbar, p_k, axis=1) for p_k in p])
    assert divergence(z).item() == pytest.approx(apart, rel=1e-10)
    expected = log_loss(y, pbar, labels=range(C)) + 2 * apart
    assert codistillation(z, y, 2.0).item() == pytest.approx(expected, rel=1e-10)


def test_probabilities_against_scipy_and_scikit_learn() -> None:
    z, y = heads(), targets("multiclass")
    p = z.softmax(2).numpy()
    apart = np.mean([entropy(p.mean(0), p_k, axis=1) for p_k in p])
    assert divergence(z, combine="probabilities").item() == pytest.approx(apart, rel=1e-10)
    expected = log_loss(y, p.mean(0), labels=range(C)) + 2 * apart
    assert codistillation(z, y, 2.0, combine="probabilities").item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("combine", COMBINES)
def test_multilabel_against_scipy_and_scikit_learn(combine: str) -> None:
    z, y = heads(), targets("multilabel")
    p = z.sigmoid()
    ensemble = z.mean(0).sigmoid() if combine == "logits" else p.mean(0)
    p, q = (torch.stack([x, 1 - x]).numpy() for x in (p, ensemble))
    apart = np.mean([entropy(q, p[:, k], axis=0).sum(1) for k in range(K)])
    assert divergence(z, "multilabel", combine=combine).item() == pytest.approx(apart, rel=1e-10)
    label_losses = [log_loss(y[:, c], q[0, :, c], labels=[0, 1]) for c in range(C)]
    expected = sum(label_losses) + 2 * apart
    assert codistillation(z, y, 2.0, "multilabel", combine=combine).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("combine", COMBINES)
def test_regression_is_the_ambiguity_decomposition(combine: str) -> None:
    z, y = heads(), targets("regression")
    ambiguity = z.var(0, correction=0).sum(1).mean() / 2
    torch.testing.assert_close(divergence(z, "regression", combine=combine), ambiguity)
    expected = F.mse_loss(z.mean(0), y) * C / 2 + 2 * ambiguity
    torch.testing.assert_close(codistillation(z, y, 2.0, "regression", combine=combine), expected)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("task", TASKS)
def test_closed_form_gradient(task: str, weight: float) -> None:
    """dL/dz_k = (weight * p_k + (1 - weight) * pbar - y) / K: the ensemble's part reaches every head."""
    z, y = heads().requires_grad_(), targets(task)
    mean_of = {"multiclass": lambda x: x.softmax(-1), "multilabel": torch.sigmoid, "regression": lambda x: x}[task]
    (gradient,) = torch.autograd.grad(codistillation(z, y, weight, task, reduction="sum"), z)
    y = F.one_hot(y, C) if task == "multiclass" else y
    torch.testing.assert_close(gradient, (weight * mean_of(z) + (1 - weight) * mean_of(z.mean(0)) - y) / K)


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_gradcheck(task: str, combine: str, weight: float) -> None:
    z, y = heads(2, 3, 3, 2).requires_grad_(), targets(task, 3, 3, (2,))
    options = {"combine": combine, "class_weight": torch.tensor([0.5, 1.0, 2.0])}
    options["label_smoothing"] = 0.0 if task == "regression" else 0.1
    example_weight = torch.tensor([1.0, 0.5, 2.0])

    assert gradcheck(lambda z: codistillation(z, y, weight, task, example_weight=example_weight, **options), z)
    assert gradcheck(lambda z: divergence(z, task, combine=combine), z)


def test_the_ensemble_is_no_fixed_teacher() -> None:
    z = heads().requires_grad_()
    log_p = z.log_softmax(2)
    teacher = log_p.detach().exp().mean(0)
    fixed_teacher = F.kl_div(log_p, teacher.expand_as(log_p), reduction="sum") / K / N
    (actual,) = torch.autograd.grad(divergence(z, combine="probabilities"), z, retain_graph=True)
    (stopped,) = torch.autograd.grad(fixed_teacher, z)
    assert not torch.allclose(actual, stopped, rtol=0.1)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_never_negative(task: str, combine: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**16),
        spread=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0, 100.0]),
        offset=st.sampled_from([0.0, 30.0, 1e4]),
        weight=st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e3, 1e8]),
    )
    def check(seed, spread, offset, weight):
        z = heads(1, 3, 4, seed=seed, dtype=torch.float32) + spread * heads(3, 3, 4, seed=seed + 1).float() + offset
        assert divergence(z, task, combine=combine) >= 0
        y = targets(task, 3, 4, seed=seed)
        assert (codistillation(z, y, weight, task, combine=combine, reduction="none") >= 0).all()

    check()


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_extreme_logits_give_finite_values_and_gradients(task: str, combine: str) -> None:
    z = 1e4 * torch.randint(-1, 2, (4, 64, 5), generator=seeded()).float()
    z.requires_grad_()
    for weight in (0.0, 2.0):
        loss = codistillation(z, targets(task, 64, 5), weight, task, combine=combine)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_large_logits_keep_their_digits(task: str) -> None:
    """In float32 both terms of a gap may be 1e4, and the gap 1e-2."""
    z = 1e4 + (heads(4, N, C) * 8).round() / 8  # eighths, so float32 rounds neither them nor their mean
    torch.testing.assert_close(divergence(z.float(), task).double(), divergence(z, task), rtol=1e-5, atol=0)


def test_confident_labels_keep_their_digits() -> None:
    z = 12 + (heads(4, N, C) * 8).round() / 8
    for sign in (1, -1):
        in_float32 = divergence(sign * z.float(), "multilabel").double()
        torch.testing.assert_close(in_float32, divergence(z, "multilabel"), rtol=1e-5, atol=0)


def test_classes_masked_in_every_head_are_left_out() -> None:
    z, y = heads(), torch.zeros(N, dtype=torch.long)
    masked = z.clone()
    masked[:, :, -1] = -math.inf
    masked.requires_grad_()
    loss = codistillation(masked, y, 2.0)
    torch.testing.assert_close(loss, codistillation(z[:, :, :-1], y, 2.0))
    assert torch.autograd.grad(loss, masked)[0].isfinite().all()


OPTIONS = [{}, {"label_smoothing": 0.1}, {"class_weight": torch.rand(10, generator=seeded()) + 0.5}]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    ("task", "options"),
    [(t, o) for t in TASKS for o in OPTIONS if (t, *o) != ("regression", "label_smoothing")],
)
def test_one_head_is_the_plain_loss_bit_by_bit(task: str, options: tuple[str, ...], combine: str) -> None:
    z = heads(1, 257, 10, dtype=torch.float32)
    y = targets(task, 257, 10, dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        actual = codistillation(z, y, 2.0, task, combine=combine, reduction=reduction, **options)
        expected = plain(z[0], y, task, reduction=reduction, **options)
        if options and task != "multiclass":  # PyTorch has no such option: the order of products is free
            torch.testing.assert_close(actual, expected)
        else:
            assert torch.equal(actual, expected)
    assert divergence(z, task, combine=combine) == 0


def test_where_nothing_counts_the_mean_is_nan_as_in_cross_entropy() -> None:
    z, y = heads(), torch.full((N,), -100)
    assert F.cross_entropy(z[0], y).isnan()
    assert codistillation(z, y, 2.0).isnan()
    assert codistillation(z, y, 2.0, reduction="sum") == 0


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_autocast_and_low_precision_are_computed_in_float32(task: str, combine: str) -> None:
    z, y = heads().bfloat16(), targets(task)
    expected = codistillation(z.float(), y, 2.0, task, combine=combine)
    with torch.autocast("cpu", torch.bfloat16):
        actual = codistillation(z, y, 2.0, task, combine=combine)
        term = divergence(z, task, combine=combine)
        prediction = combine_heads(z, combine, task)
    assert actual.dtype == term.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.equal(term, divergence(z.float(), task, combine=combine))
    assert prediction.dtype == torch.bfloat16
    torch.testing.assert_close(prediction.float(), combine_heads(z.float(), combine, task), rtol=0.01, atol=0.01)
    assert codistillation(z.double(), y, 2.0, task, combine=combine).dtype == torch.float64


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_compile_and_vmap(task: str, combine: str) -> None:
    z, y = torch.stack([heads(seed=0), heads(seed=1)]), torch.stack([targets(task, seed=s) for s in (0, 1)])

    def loss(z, y):
        return codistillation(z, y, 2.0, task, combine=combine, class_weight=torch.arange(1.0, C + 1))

    expected = torch.stack([loss(*pair) for pair in zip(z, y, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(z, y), expected)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z[0], y[0]), expected[0])


def slow_teaching(z, y, teacher, temperature, task, *, class_weight=None, label_smoothing=0.0, ignore_index=-100):
    """T^2 mean_k KL(teacher || head) of every position, one probability after another, times the position's weight."""
    k, n, c, *dense = z.shape
    weights = [1.0] * c if class_weight is None else class_weight.tolist()
    z, teacher = z.reshape(k, n, c, -1), teacher.reshape(n, c, -1)
    places = [(i, s) for i in range(n) for s in range(z.shape[3])]

    def divergence_of(own, other):
        """Lists of logits of outcomes."""
        p, q = ([(v / temperature).exp() for v in logits] for logits in (own, other))
        p, q = ([v / sum(values) for v in values] for values in (p, q))
        return sum(a * (a / b).log() for a, b in zip(q, p, strict=True))

    def at(i, s, head):
        if task == "multiclass":
            return divergence_of([head[i, j, s] for j in range(c)], [teacher[i, j, s] for j in range(c)])
        total = torch.zeros((), dtype=z.dtype)
        for j in range(c):
            own, other = head[i, j, s], teacher[i, j, s]
            zero = torch.zeros_like(own)
            squared = (own - other) ** 2 / 2 / temperature**2
            term = squared if task == "regression" else divergence_of([own, zero], [other, zero])
            total = total + weights[j] * term
        return total

    def weight_of(i, s):
        if task != "multiclass":
            return 1.0
        if y.is_floating_point():
            shares = [(1 - label_smoothing) * share + label_smoothing / c for share in y.reshape(n, c, -1)[i, :, s]]
            return sum(w * share for w, share in zip(weights, shares, strict=True))
        label = int(y.reshape(n, -1)[i, s])
        if label == ignore_index:
            return 0.0
        return (1 - label_smoothing) * weights[label] + label_smoothing * sum(weights) / c

    losses = [weight_of(i, s) * temperature**2 * sum(at(i, s, head) for head in z) / k for i, s in places]
    return torch.stack(losses).view(n, *dense)


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_against_a_slow_reference(task: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(problem=problems(task), temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]), weighted=st.booleans())
    def check(problem, temperature, weighted):
        z, y, weight, options = problem
        z = (z.clamp(-30, 30)).requires_grad_()
        teacher = heads(*z.shape[1:], seed=7).requires_grad_()
        reduction = options.pop("reduction")
        example = torch.rand(z.shape[1], generator=seeded(3), dtype=z.dtype) + 0.5 if weighted else None
        taught = {"teacher_logits": teacher, "teacher_weight": 0.7, "temperature": temperature}

        expected = 0.7 * slow_teaching(z, y, teacher.detach(), temperature, task, **options)
        if example is not None:
            expected = expected * example.view(-1, *[1] * (expected.ndim - 1))
        if reduction == "mean":  # what F.cross_entropy divides by
            counts = torch.ones_like(expected)
            if not y.is_floating_point():
                weights = options.get("class_weight", torch.ones(z.shape[2], dtype=z.dtype))
                counts = weights[y] * (y != options.get("ignore_index", -100))
            if example is not None:
                counts = counts * example.view(-1, *[1] * (expected.ndim - 1))
            expected = expected.sum() / counts.sum()
        expected = expected.sum() if reduction == "sum" else expected
        without = codistillation(z, y, weight, task, example_weight=example, reduction=reduction, **options)
        actual = codistillation(z, y, weight, task, example_weight=example, reduction=reduction, **options, **taught)

        torch.testing.assert_close(actual, without + expected, rtol=1e-8, atol=1e-9)
        gradients = [torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] for loss in (actual, without + expected)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
        assert torch.autograd.grad(actual.sum(), teacher, allow_unused=True) == (None,)

    check()


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("task", TASKS)
def test_teaching_every_head_is_teaching_the_mean_and_keeping_the_heads_alike(task: str, combine: str) -> None:
    """At a temperature of 1: mean_k KL(t || p_k) = KL(t || pbar) + mean_k KL(pbar || p_k)."""
    z, y, teacher = heads(), targets(task), heads(N, C, seed=5)
    taught = {"teacher_logits": teacher, "teacher_weight": 1.0}
    own = codistillation(z, y, 0.0, task, combine=combine, **taught) - codistillation(z, y, 0.0, task, combine=combine)
    of_mean = codistillation(z.mean(0)[None], y, 0.0, task, **taught) - codistillation(z.mean(0)[None], y, 0.0, task)
    torch.testing.assert_close(own, of_mean + divergence(z, task))
    same = codistillation(teacher.expand(3, -1, -1), y, 2.0, task, **taught, temperature=3.0)
    torch.testing.assert_close(same, plain(teacher, y, task))


def test_a_teacher_in_low_precision_with_masked_classes_compiled() -> None:
    z, y, teacher = heads(dtype=torch.float32), torch.zeros(N, dtype=torch.long), heads(N, C, seed=5).float()
    taught = {"teacher_weight": 1.0, "temperature": 2.0}
    masked, masked_teacher = z.clone(), teacher.bfloat16()
    masked[:, :, -1] = masked_teacher[:, -1] = -math.inf
    masked.requires_grad_()

    def loss(z, teacher):
        return codistillation(z, y, 2.0, teacher_logits=teacher, **taught)

    value = loss(masked, masked_teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(z[:, :, :-1], teacher.bfloat16()[:, :-1].float()))
    assert torch.autograd.grad(value, masked)[0].isfinite().all()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, teacher), loss(z, teacher))


def test_integer_and_boolean_targets() -> None:
    z = heads()
    y = targets("multiclass")
    assert codistillation(z, y.to(torch.uint8), 2.0) == codistillation(z, y, 2.0)
    labels = targets("multilabel")
    assert codistillation(z, labels.bool(), 2.0, "multilabel") == codistillation(z, labels, 2.0, "multilabel")


class TestCombineHeads:
    def test_logits(self) -> None:
        z = heads()
        assert torch.equal(combine_heads(z), z.mean(0))

    @pytest.mark.parametrize("dense", [(), (2, 3)])
    def test_probabilities(self, dense: tuple[int, ...]) -> None:
        z = heads(K, N, C, *dense)
        torch.testing.assert_close(combine_heads(z, "probabilities").exp(), z.softmax(2).mean(0))
        labels = combine_heads(z, "probabilities", "multilabel").sigmoid()
        torch.testing.assert_close(labels, z.sigmoid().mean(0))
        assert torch.equal(combine_heads(z, "probabilities", "regression"), z.mean(0))

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("combine", COMBINES)
    def test_one_head_is_itself(self, combine: str, task: str) -> None:
        z = heads(1, N, C)
        assert torch.equal(combine_heads(z, combine, task), z[0])

    @pytest.mark.parametrize("task", TASKS)
    def test_extreme_logits(self, task: str) -> None:
        z = torch.tensor([[[1e4, -1e4]], [[-1e4, -1e4]]], requires_grad=True)
        combined = combine_heads(z, "probabilities", task)
        combined.sum().backward()
        assert combined.isfinite().all()
        assert z.grad is not None
        assert z.grad.isfinite().all()

    def test_vmap(self) -> None:
        z = torch.stack([heads(seed=0), heads(seed=1)])
        expected = torch.stack([combine_heads(x, "probabilities") for x in z])
        torch.testing.assert_close(torch.vmap(lambda x: combine_heads(x, "probabilities"))(z), expected)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ((heads(), "mean"), "combine must be one of 'logits', 'probabilities'; got 'mean'"),
            ((heads(), "logits", "binary"), "'multiclass', 'multilabel', 'regression'; got 'binary'"),
            ((heads(K, N), "probabilities"), "shape (K, N, C) or (K, N, C, *)"),
        ],
    )
    def test_bad_input(self, args: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            combine_heads(*args)


Z, Y = heads(), targets("multiclass")
BAD_INPUT = {
    "no head dimension": (
        (Z[0], Y, 2.0),
        {},
        ValueError,
        "got (5, 4). A combined prediction has no head dimension",
    ),
    "dense without heads": (
        (heads(7, 4, 3), torch.zeros(7, 3).long(), 2.0),
        {},
        ValueError,
        "model.train() or model(x, per_head=True)",
    ),
    "no heads": ((Z[:0], Y, 2.0), {}, ValueError, "at least one head, got (0, 5, 4)"),
    "a list of outputs": (
        (list(Z), Y, 2.0),
        {},
        TypeError,
        "got list. Stack a list of outputs with torch.stack",
    ),
    "integer outputs": ((Z.long(), Y, 2.0), {}, TypeError, "got torch.int64 of shape (3, 5, 4)"),
    "float indices": (
        (Z, Y.float(), 2.0),
        {},
        ValueError,
        "Turn class indices into integers with target.long()",
    ),
    "integer one-hot": (
        (Z, F.one_hot(Y, C), 2.0),
        {},
        ValueError,
        "one-hot targets into probabilities with target.f",
    ),
    "boolean target": (
        (Z, F.one_hot(Y, C).bool(), 2.0),
        {},
        TypeError,
        "Multi-hot labels need task='multilabel'",
    ),
    "short target": ((Z, Y[:4], 2.0), {}, ValueError, "an integer tensor of shape (5,), or probabilities"),
    "target is a list": ((Z, [0] * N, 2.0), {}, TypeError, "target must be a real tensor, got list"),
    "indices for labels": ((Z, Y, 2.0, "multilabel"), {}, ValueError, "must be a tensor of shape (5, 4)"),
    "values without D": (
        (Z, Z[0, :, 0], 2.0, "regression"),
        {},
        ValueError,
        "got torch.float64 of shape (5,)",
    ),
    "negative weight": ((Z, Y, -0.5), {}, ValueError, "finite number of at least 0, got -0.5"),
    "weight NaN": ((Z, Y, math.nan), {}, ValueError, "finite number of at least 0, got nan"),
    "infinite weight": ((Z, Y, math.inf), {}, ValueError, "finite number of at least 0, got inf"),
    "task": ((Z, Y, 2.0, "binary"), {}, ValueError, "'multiclass', 'multilabel', 'regression'; got 'binary'"),
    "combine": ((Z, Y, 2.0), {"combine": "vote"}, ValueError, "'logits', 'probabilities'; got 'vote'"),
    "reduction": ((Z, Y, 2.0), {"reduction": "max"}, ValueError, "'mean', 'sum', 'none'; got 'max'"),
    "smoothing": (
        (Z, Y, 2.0),
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing must be in [0, 1], got 1.5",
    ),
    "smoothed regression": (
        (Z, Z[0], 2.0, "regression"),
        {"label_smoothing": 0.1},
        ValueError,
        "has no label_smoothing, got 0.1; leave it at 0",
    ),
    "class weights": (
        (Z, Y, 2.0),
        {"class_weight": torch.ones(3)},
        ValueError,
        "must have the shape (4,), got (3,)",
    ),
    "example weights": (
        (Z, Y, 2.0),
        {"example_weight": torch.ones(5, 1)},
        ValueError,
        "example_weight must have the shape (5,), got (5, 1)",
    ),
    "teacher of other classes": (
        (Z, Y, 2.0),
        {"teacher_weight": 1.0, "teacher_logits": heads(N, 3)},
        ValueError,
        "got (5, 3). The teacher has 3 classes and the heads have 4",
    ),
    "teacher of all heads": (
        (Z, Y, 2.0),
        {"teacher_weight": 1.0, "teacher_logits": Z},
        ValueError,
        "teacher_logits must have the shape (5, 4), as each head's outputs; got (3, 5, 4)",
    ),
    "no teacher": ((Z, Y, 2.0), {"teacher_weight": 1.0}, ValueError, "there are no teacher_logits"),
    "idle teacher": ((Z, Y, 2.0), {"teacher_logits": Z[0]}, ValueError, "given and teacher_weight is 0"),
    "teacher's classes": (
        (Z, Y, 2.0),
        {"teacher_weight": 1.0, "teacher_logits": Y},
        TypeError,
        "must be a floating-point tensor, got torch.int64 of shape (5,)",
    ),
    "negative teacher": ((Z, Y, 2.0), {"teacher_weight": -1.0}, ValueError, "at least 0, got -1.0"),
    "no temperature": ((Z, Y, 2.0), {"temperature": 0.0}, ValueError, "finite number above 0, got 0.0"),
    "nothing to ignore": (
        (Z, Z[0].softmax(1), 2.0),
        {"ignore_index": 0},
        ValueError,
        "ignore_index must stay negative for a target without class indices, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    args, options, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=re.escape(message)):
        codistillation(*args, **options)


def test_divergence_asks_for_heads() -> None:
    with pytest.raises(ValueError, match="ask the model for all heads"):
        divergence(Z[0])
