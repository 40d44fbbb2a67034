"""How much heads differ, against loops."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from ensemblenet.functional import Combine, Task, agreement
from ensemblenet.metrics.diversity import (
    disagreement,
    divergence_from_ensemble,
    kl_between_heads,
    kl_divergence,
    log_probabilities,
    same_class,
)

K, N, C = 3, 7, 4
Z = 2 * torch.randn(K, N, C, generator=torch.Generator().manual_seed(0))
VOTES = Z.argmax(2)


def test_disagreement() -> None:
    pairs = list(permutations(range(K), 2))
    expected = [sum(bool(VOTES[j, n] != VOTES[k, n]) for j, k in pairs) / len(pairs) for n in range(N)]
    assert disagreement(VOTES).tolist() == pytest.approx(expected)
    assert 0 < sum(expected) < N
    assert disagreement(VOTES[:1]).tolist() == [0] * N


def test_same_class() -> None:
    found = same_class(VOTES)
    for j in range(K):
        for k in range(K):
            assert found[j, k].item() == pytest.approx(sum((VOTES[j] == VOTES[k]).tolist()) / N)
    off_diagonal = (found.sum() - K) / (K * (K - 1))
    assert 1 - off_diagonal.item() == pytest.approx(disagreement(VOTES).mean().item())


def test_kl_divergence() -> None:
    q, p = [0.2, 0.3, 0.5], [0.5, 0.25, 0.25]
    expected = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    assert kl_divergence(torch.tensor(q).log(), torch.tensor(p).log()).item() == pytest.approx(expected)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_divergence_of_each_example_is_what_the_loss_weighs(task: Task, combine: Combine) -> None:
    found = divergence_from_ensemble(Z, task, combine=combine)
    expected = [agreement(Z[:, n : n + 1], task, combine=combine).item() for n in range(N)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_kl_between_heads(task: Task) -> None:
    log_p = log_probabilities(Z, task)
    pairs = [kl_divergence(log_p[j], log_p[k]).mean().item() for j, k in permutations(range(K), 2)]
    assert kl_between_heads(Z, task).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    assert kl_between_heads(Z[:1], task).item() == 0
