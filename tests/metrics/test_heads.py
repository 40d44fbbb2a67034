"""HeadMetrics against NumPy and scikit-learn, in one batch, in many, and merged."""

import copy
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from ensemblenet.functional import combine_heads, divergence
from ensemblenet.metrics import HeadMetrics

K, N, C = 3, 50, 7
Z = 2 * torch.randn(K, N, C, generator=torch.Generator().manual_seed(0))
Y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))


def metrics_of(z, y, batches=1, **options):
    metrics = HeadMetrics(num_classes=z.shape[2], num_heads=len(z), **options)
    for z_batch, y_batch in zip(z.chunk(batches, 1), y.chunk(batches), strict=True):
        metrics.update(z_batch, y_batch)
    return {key: value.item() for key, value in metrics.compute().items()}


def expected_calibration_error(p, y, bins=15):
    """The gap between confidence and accuracy, bin by bin."""
    confidence, correct = p.max(1), p.argmax(1) == y
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(
        abs(confidence[which == b].mean() - correct[which == b].mean()) * (which == b).mean() for b in set(which)
    )


def reference(z, y, combine):
    classes = range(z.shape[2])
    q = combine_heads(z.double(), combine).softmax(1).numpy()
    firsts = [combine_heads(z[: k + 1].double(), combine).numpy() for k in range(len(z))]
    votes, y = z.argmax(2).numpy(), y.numpy()
    heads = [accuracy_score(y, vote) for vote in votes]
    top5 = [top_k_accuracy_score(y, head, k=5, labels=classes) for head in z.numpy()]
    first_top5 = [top_k_accuracy_score(y, first, k=5, labels=classes) for first in firsts]
    return {
        "accuracy": accuracy_score(y, q.argmax(1)),
        "ece": expected_calibration_error(q, y),
        "head_accuracy": np.mean(heads),
        **{f"head_accuracy_{k}": accuracy for k, accuracy in enumerate(heads)},
        **{f"first_accuracy_{k + 1}": accuracy_score(y, first.argmax(1)) for k, first in enumerate(firsts)},
        "top5": top_k_accuracy_score(y, q, k=5, labels=classes),
        "head_top5": np.mean(top5),
        **{f"head_top5_{k}": share for k, share in enumerate(top5)},
        **{f"first_top5_{k + 1}": share for k, share in enumerate(first_top5)},
        "brier": np.mean([sum((p[c] - (c == label)) ** 2 for c in classes) for p, label in zip(q, y, strict=True)]),
        "nll": log_loss(y, q, labels=classes),
        "disagreement": np.mean([np.mean(a != b) for a, b in combinations(votes, 2)]) if len(z) > 1 else 0.0,
        "divergence": divergence(z.double(), combine=combine).item(),
    }


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("batches", [1, 4])
def test_against_numpy_and_scikit_learn(combine: str, batches: int) -> None:
    assert metrics_of(Z, Y, batches, combine=combine) == pytest.approx(reference(Z, Y, combine), rel=1e-5)


def test_a_single_head_agrees_with_itself() -> None:
    assert metrics_of(Z[:1], Y) == pytest.approx(reference(Z[:1], Y, "logits"), rel=1e-5)


def test_of_fewer_than_five_classes_every_one_is_among_the_best_five() -> None:
    values = metrics_of(Z[:, :, :3], Y % 3)
    assert values["top5"] == values["head_top5_1"] == values["first_top5_2"] == 1


def test_dense_outputs_count_positions() -> None:
    z, y = Z.reshape(K, 10, 5, C).movedim(-1, 2), Y.reshape(10, 5)
    assert metrics_of(z, y, batches=2) == pytest.approx(metrics_of(Z, Y), rel=1e-5)


def test_ignored_positions_do_not_count() -> None:
    y = Y.clone()
    y[:20] = -1
    assert metrics_of(Z, y, batches=5, ignore_index=-1) == pytest.approx(metrics_of(Z[:, 20:], Y[20:]), rel=1e-5)


def test_forward_reset_prefix_and_copy() -> None:
    metrics = HeadMetrics(C, K, prefix="val/")
    batch = metrics(Z[:, :10], Y[:10])
    metrics(Z[:, 10:], Y[10:])
    assert {k.removeprefix("val/"): v.item() for k, v in batch.items()} == pytest.approx(metrics_of(Z[:, :10], Y[:10]))
    whole = {k.removeprefix("val/"): v.item() for k, v in copy.deepcopy(metrics).compute().items()}
    assert whole == pytest.approx(metrics_of(Z, Y), rel=1e-5)
    metrics.reset()
    metrics.update(Z[:, :10], Y[:10])
    assert metrics.compute() == batch


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (Z[0], Y, "with K=3 and C=7, got (50, 7). Ask the model for all heads: model(x, per_head=True)"),
        (Z[:2], Y, "with K=3 and C=7, got (2, 50, 7)"),
        (Z, Y[:7], "an integer tensor of shape (50,), got torch.int64 of shape (7,)"),
        (Z, Z[0].softmax(1), "must hold class indices"),
    ],
)
def test_bad_input(z: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HeadMetrics(C, K).update(z, y)


def test_processes_add_up() -> None:
    """Merging reduces the states of two metrics exactly as a gather over two processes does."""
    first, second = HeadMetrics(C, K), HeadMetrics(C, K)
    first.update(Z[:, :20], Y[:20])
    second.update(Z[:, 20:], Y[20:])
    for mine, other in zip(first.values(), second.values(), strict=True):
        mine.merge_state(other)
    assert {key: value.item() for key, value in first.compute().items()} == pytest.approx(metrics_of(Z, Y), rel=1e-5)
