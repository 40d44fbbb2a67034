"""The peers' losses against plain re-computations: loops over heads and examples, in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ensemblenet.metrics.diversity import log_probabilities
from ensemblenet.study.methods.co_training import co_training
from ensemblenet.study.methods.dml import mutual
from ensemblenet.study.methods.kdcl import kdcl
from ensemblenet.study.methods.losses import ramp_up
from ensemblenet.study.methods.okddip import okddip
from ensemblenet.study.methods.one import gated_mean, one

K, N, C, D = 4, 5, 3, 2
T = 2.5
TASKS = ("multiclass", "multilabel")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z = random(K, N, C)
GATE = random(K, N, seed=1).softmax(0)
QUERIES, KEYS = random(K - 1, N, D, seed=2), random(K - 1, N, D, seed=3)
TARGETS = {"multiclass": torch.tensor([0, 2, 1, 1, 0]), "multilabel": (random(N, C, seed=4) > 0).long()}


# -- the re-computation: lists of numbers, one example at a time


def probabilities(z: list, task: str, temperature: float = 1.0) -> list:
    """A list of distributions: one over classes, or one of two outcomes for each label."""
    if task == "multiclass":
        total = sum(math.e ** (v / temperature) for v in z)
        return [[math.e ** (v / temperature) / total for v in z]]
    return [[1 / (1 + math.e ** (-v / temperature)), 1 / (1 + math.e ** (v / temperature))] for v in z]


def divergence(q: list, p: list) -> float:
    return sum(a * math.log(a / b) for one, other in zip(q, p, strict=True) for a, b in zip(one, other, strict=True))


def entropy(p: list) -> float:
    return -sum(a * math.log(a) for one in p for a in one)


def plain_loss(z: list, y, task: str) -> float:
    p = probabilities(z, task)
    if task == "multiclass":
        return -math.log(p[0][y])
    return -sum(math.log(pair[0] if label else pair[1]) for pair, label in zip(p, y, strict=True))


def numbers(z: torch.Tensor, n: int) -> list:
    return z[:, n].tolist()


def by_hand(task: str, of_example) -> float:
    """The mean over examples of what a method's formula gives for the K outputs of one of them."""
    target = TARGETS[task].tolist()
    return sum(of_example(numbers(Z, n), target[n], n) for n in range(N)) / N


def one_by_hand(task: str, ramp: float) -> float:
    def of_example(z, y, n):
        mixed = [sum(GATE[k, n].item() * z[k][c] for k in range(K)) for c in range(C)]
        teacher = probabilities(mixed, task, T)
        distilled = T**2 * sum(divergence(teacher, probabilities(z[k], task, T)) for k in range(K))
        return (sum(plain_loss(z[k], y, task) for k in range(K)) + plain_loss(mixed, y, task) + ramp * distilled) / K

    return by_hand(task, of_example)


def mutual_by_hand(task: str) -> float:
    def of_example(z, y, n):
        total = 0.0
        for k in range(K):
            others = [divergence(probabilities(z[j], task), probabilities(z[k], task)) for j in range(K) if j != k]
            total += plain_loss(z[k], y, task) + sum(others) / (K - 1)
        return total / K

    return by_hand(task, of_example)


def okddip_by_hand(task: str, ramp: float) -> float:
    def of_example(z, y, n):
        total = sum(plain_loss(z[k], y, task) for k in range(K))
        for a in range(K - 1):
            scores = [sum(QUERIES[a, n, d].item() * KEYS[b, n, d].item() for d in range(D)) for b in range(K - 1)]
            [weights] = probabilities(scores, "multiclass")
            mixed = [sum(weights[b] * z[b][c] for b in range(K - 1)) for c in range(C)]
            total += ramp * T**2 * divergence(probabilities(mixed, task, T), probabilities(z[a], task, T))
        mean = [sum(z[b][c] for b in range(K - 1)) / (K - 1) for c in range(C)]
        total += ramp * T**2 * divergence(probabilities(mean, task, T), probabilities(z[K - 1], task, T))
        return total / K

    return by_hand(task, of_example)


def kdcl_by_hand(weight: float) -> float:
    def of_example(z, y, n):
        smallest = [min(z[k][c] - z[k][y] for k in range(K)) for c in range(C)]
        teacher = probabilities(smallest, "multiclass", T)
        return (
            sum(
                plain_loss(z[k], y, "multiclass")
                + weight * T**2 * divergence(teacher, probabilities(z[k], "multiclass", T))
                for k in range(K)
            )
            / K
        )

    return by_hand("multiclass", of_example)


def co_training_by_hand(task: str, weight: float) -> float:
    def of_example(z, y, n):
        p = [probabilities(z[k], task) for k in range(K)]
        mean = [[sum(p[k][i][j] for k in range(K)) / K for j in range(len(p[0][i]))] for i in range(len(p[0]))]
        shannon = entropy(mean) - sum(map(entropy, p)) / K
        return (sum(plain_loss(z[k], y, task) for k in range(K)) + weight * shannon) / K

    return by_hand(task, of_example)


# -- values


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_one(task: str, ramp: float) -> None:
    actual = one(Z, GATE, TARGETS[task], task, temperature=T, ramp=ramp)
    assert actual.item() == pytest.approx(one_by_hand(task, ramp))


@pytest.mark.parametrize("task", TASKS)
def test_mutual(task: str) -> None:
    assert mutual(Z, TARGETS[task], task).item() == pytest.approx(mutual_by_hand(task))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("ramp", [0.3, 1.0])
def test_okddip(task: str, ramp: float) -> None:
    actual = okddip(Z, QUERIES, KEYS, TARGETS[task], task, temperature=T, ramp=ramp)
    assert actual.item() == pytest.approx(okddip_by_hand(task, ramp))


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_kdcl(weight: float) -> None:
    actual = kdcl(Z, TARGETS["multiclass"], temperature=T, weight=weight)
    assert actual.item() == pytest.approx(kdcl_by_hand(weight))


@pytest.mark.parametrize("task", TASKS)
def test_co_training(task: str) -> None:
    actual = co_training(Z, TARGETS[task], task, weight=0.6, ramp=0.5)
    assert actual.item() == pytest.approx(co_training_by_hand(task, 0.3))


def test_the_published_settings_are_the_defaults() -> None:
    y = TARGETS["multiclass"]
    assert torch.equal(one(Z, GATE, y), one(Z, GATE, y, temperature=3.0, ramp=1.0))
    assert torch.equal(okddip(Z, QUERIES, KEYS, y), okddip(Z, QUERIES, KEYS, y, temperature=3.0, ramp=1.0))
    assert torch.equal(kdcl(Z, y), kdcl(Z, y, temperature=2.0, weight=1.0))
    assert torch.equal(co_training(Z, y), co_training(Z, y, weight=0.5, ramp=1.0))


# -- gradients: what is a constant, and what is not


def gradients(loss, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    return list(torch.autograd.grad(loss(*inputs), inputs))


def kl(teacher, z):
    """T^2 KL of softmax outputs at temperature T, mean over examples, from probabilities alone."""
    q, p = (teacher / T).softmax(-1), (z / T).softmax(-1)
    return T**2 * (q * (q.log() - p.log())).sum(-1).mean(-1)


def cross_entropy(z):
    return -z.softmax(-1)[..., range(N), TARGETS["multiclass"]].log().mean(-1)


def test_one_stops_the_gradient_at_its_teacher_only() -> None:
    fixed = (GATE[:, :, None] * Z).sum(0)

    def expected(z, gate):
        mixed = sum(gate[k][:, None] * z[k] for k in range(K))
        return (sum(cross_entropy(z[k]) + kl(fixed, z[k]) for k in range(K)) + cross_entropy(mixed)) / K

    actual = gradients(lambda z, gate: one(z, gate, TARGETS["multiclass"], temperature=T), Z, GATE)
    torch.testing.assert_close(actual, gradients(expected, Z, GATE))
    assert actual[1].abs().min() > 0  # the gate learns


def test_mutual_stops_the_gradient_at_the_others() -> None:
    def expected(z):
        plain = sum(cross_entropy(z[k]) for k in range(K))
        q, p = Z.softmax(-1), z.softmax(-1)
        pairs = [(q[j] * (q[j].log() - p[k].log())).sum(1).mean() for j in range(K) for k in range(K) if j != k]
        return (plain + sum(pairs) / (K - 1)) / K

    torch.testing.assert_close(gradients(lambda z: mutual(z, TARGETS["multiclass"]), Z), gradients(expected, Z))


def test_kdcl_stops_the_gradient_at_its_teacher() -> None:
    y = TARGETS["multiclass"]
    fixed = torch.stack([Z[k] - Z[k][range(N), y][:, None] for k in range(K)]).min(0).values

    def expected(z):
        return sum(cross_entropy(z[k]) + kl(fixed, z[k]) for k in range(K)) / K

    torch.testing.assert_close(gradients(lambda z: kdcl(z, y, temperature=T), Z), gradients(expected, Z))


def test_okddip_stops_no_gradient_and_its_attention_learns() -> None:
    def expected(z, queries, keys):
        total = sum(cross_entropy(z[k]) for k in range(K))
        for a in range(K - 1):
            scores = torch.stack([(queries[a] * keys[b]).sum(1) for b in range(K - 1)], 1).softmax(1)
            total = total + kl(sum(scores[:, b, None] * z[b] for b in range(K - 1)), z[a])
        return (total + kl(z[:-1].mean(0), z[-1])) / K

    def actual(z, queries, keys):
        return okddip(z, queries, keys, TARGETS["multiclass"], temperature=T)

    found = gradients(actual, Z, QUERIES, KEYS)
    torch.testing.assert_close(found, gradients(expected, Z, QUERIES, KEYS))
    assert all(gradient.abs().max() > 0 for gradient in found)


@pytest.mark.parametrize("task", TASKS)
def test_co_training_stops_no_gradient(task: str) -> None:
    z = Z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: co_training(z, TARGETS[task], task), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_taken_in_float32(dtype: torch.dtype) -> None:
    z, y, queries = Z.to(dtype), TARGETS["multiclass"], QUERIES.float()
    for loss in (mutual(z, y), kdcl(z, y), co_training(z, y), one(z, GATE.float(), y), okddip(z, queries, queries, y)):
        assert loss.dtype == torch.float32
        assert loss.isfinite()


# -- ramp-up, probabilities, errors


def test_ramp_up_is_that_of_laine_and_aila() -> None:
    assert ramp_up(0.0, 0.25) == pytest.approx(math.exp(-5))
    assert ramp_up(0.1, 0.25) == pytest.approx(math.exp(-5 * 0.6**2))
    assert [ramp_up(progress, 0.25) for progress in (0.25, 0.9, 1.0)] == [1, 1, 1]


@pytest.mark.parametrize("task", TASKS)
def test_log_probabilities(task: str) -> None:
    expected = [sum(zip(*probabilities(z.tolist(), task), strict=True), ()) for z in Z[0]]
    torch.testing.assert_close(log_probabilities(Z[0], task).exp(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one(Z, GATE.T, TARGETS["multiclass"]), "gate must have the shape (4, 5), got (5, 4)"),
        (lambda: gated_mean(Z, GATE[:1]), "gate must have the shape (4, 5), got (1, 5)"),
        (lambda: mutual(Z[:1], TARGETS["multiclass"]), "mutual learning needs at least 2 heads, got 1"),
        (lambda: okddip(Z[:1], QUERIES, KEYS, TARGETS["multiclass"]), "OKDDip needs at least 2 heads, got 1"),
        (
            lambda: okddip(Z, random(K, N, D), KEYS, TARGETS["multiclass"]),
            "queries must have the shape (3, 5, 'D'), got (4, 5, 2)",
        ),
        (lambda: kdcl(Z, TARGETS["multilabel"]), "KDCL needs class indices, an integer tensor of shape (5,)"),
        (lambda: co_training(Z, Z[0], "regression"), "task must be 'multiclass' or 'multilabel'"),
        (lambda: mutual(Z, torch.zeros(4, dtype=torch.long)), "target for task='multiclass' must be class indices"),
    ],
)
def test_errors(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
