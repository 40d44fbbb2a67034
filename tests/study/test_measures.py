"""What a study measures, against loops and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss

from ensemblenet.metrics.diversity import kl_between_heads
from ensemblenet.study.measures import Measures

K, N, C = 3, 40, 4
GENERATOR = torch.Generator().manual_seed(0)
Z = 2 * torch.randn(K, N, C, generator=GENERATOR)
GATED = (torch.randn(K, N, generator=GENERATOR).softmax(0).unsqueeze(2) * Z).sum(0)
Y = torch.randint(C, (N,), generator=GENERATOR)


@pytest.fixture(scope="module")
def values():
    measures = Measures(C, K)
    for part in (slice(0, 15), slice(15, N)):
        measures.update(Z[:, part], GATED[part], Y[part])
    return measures.compute()


def softmax(z):
    z = np.exp(np.asarray(z, dtype=np.float64))
    return z / z.sum(-1, keepdims=True)


def test_errors_are_of_the_given_prediction_and_of_each_head(values: dict[str, Any]) -> None:
    assert values["error"] == pytest.approx(100 * np.mean(GATED.argmax(1).numpy() != Y.numpy()))
    assert values["head_errors"] == pytest.approx([100 * np.mean(z.argmax(1).numpy() != Y.numpy()) for z in Z])


def test_likelihoods(values: dict[str, Any]) -> None:
    labels = range(C)
    assert values["nll"] == pytest.approx(log_loss(Y, softmax(GATED), labels=labels), rel=1e-5)
    heads = [log_loss(Y, softmax(z), labels=labels) for z in Z]
    assert values["head_nll"] == pytest.approx(np.mean(heads), rel=1e-5)


def test_calibration_error_in_15_bins(values: dict[str, Any]) -> None:
    p = softmax(GATED)
    confidence, right = p.max(1), p.argmax(1) == Y.numpy()
    bins = np.ceil(confidence * 15)
    error = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b) for b in set(bins))
    assert values["ece"] == pytest.approx(error, rel=1e-4)


def test_diversity(values: dict[str, Any]) -> None:
    votes = Z.argmax(2).tolist()
    pairs = [(j, k) for j in range(K) for k in range(K) if j != k]
    differ = np.mean([votes[j][n] != votes[k][n] for j, k in pairs for n in range(N)])
    assert values["disagreement"] == pytest.approx(differ)
    p = softmax(Z)
    kl = np.mean([(p[j] * np.log(p[j] / p[k])).sum(1) for j, k in pairs])
    assert values["head_kl"] == pytest.approx(kl, rel=1e-4)
    mean = softmax(Z.mean(0))
    assert values["divergence"] == pytest.approx(np.mean((mean * np.log(mean / p)).sum(2)), rel=1e-4)


def test_one_head_does_not_differ_from_itself() -> None:
    measures = Measures(C, 1)
    measures.update(Z[:1], Z[0], Y)
    values = measures.compute()
    assert values["disagreement"] == values["head_kl"] == 0
    assert values["head_errors"] == [values["error"]]
    assert values["head_nll"] == pytest.approx(values["nll"])


def test_kl_of_labels_is_summed_over_them() -> None:
    p = 1 / (1 + np.exp(-np.asarray(Z, dtype=np.float64)))
    pairs = [(j, k) for j in range(K) for k in range(K) if j != k]
    expected = [p[j] * np.log(p[j] / p[k]) + (1 - p[j]) * np.log((1 - p[j]) / (1 - p[k])) for j, k in pairs]
    assert kl_between_heads(Z, "multilabel").item() == pytest.approx(np.mean([kl.sum(1) for kl in expected]), rel=1e-4)


def test_tags_are_scored_by_their_average_precision() -> None:
    labels = torch.randint(2, (N, C), generator=torch.Generator().manual_seed(1))
    measures = Measures(C, K, "multilabel")
    measures.update(Z, GATED, labels)
    values = measures.compute()
    scores = [
        average_precision_score(labels.flatten(), z.flatten()) for z in (GATED, *Z)
    ]  # all C are among the best 20
    assert values["error"] == pytest.approx(100 * (1 - scores[0]), rel=1e-4)
    assert values["head_errors"] == pytest.approx([100 * (1 - score) for score in scores[1:]], rel=1e-4)
    assert "ece" not in values
