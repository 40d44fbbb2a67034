"""Tagging metrics against slow direct definitions and scikit-learn; in one batch, in many, and merged."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from ensemblenet.functional import codistillation, combine_heads, divergence
from ensemblenet.metrics.tagging import TaggingMetrics, average_precision, average_precision_of_classes

K, N, C = 3, 60, 50


def make(num_heads=K, videos=N, classes=C, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(videos, classes, generator=generator) < 0.06).to(torch.int8)
    z = 2 * torch.randn(num_heads, videos, classes, generator=generator) + 1.5 * y - 1
    y[0] = 0  # a video without labels
    y[:, 7] = 0  # a class without labels
    return (z.round() if ties else z), y


def metrics_of(z, y, batches=1, **options):
    metrics = TaggingMetrics(z.shape[2], len(z), **options)
    for part, target in zip(z.chunk(batches, 1), y.chunk(batches), strict=True):
        metrics.update(part, target)
    return {key: value.item() for key, value in metrics.compute().items()}


def slow_ap(scores, hits, positives):
    """Down the list, precision at every hit; all scores differ."""
    found, total = 0, 0.0
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    for rank, i in enumerate(order, start=1):
        if hits[i]:
            found += 1
            total += found / rank
    return total / positives if positives else 0.0


def challenge(z, y):
    """GAP@20, mAP, Hit@1 and PERR as the challenge defines them, video by video."""
    z, y = z.double().numpy(), y.numpy()
    listed, by_class, hit1, perr = [], {c: [] for c in range(z.shape[1])}, [], []
    for scores, labels in zip(z, y, strict=True):
        order = np.argsort(-scores)
        for c in order[:20]:
            listed.append((scores[c], labels[c]))
            by_class[c].append((scores[c], labels[c]))
        hit1.append(labels[order[0]])
        perr.append(labels[order[: labels.sum()]].mean() if labels.sum() else 0.0)
    aps = [slow_ap(*zip(*by_class[c], strict=True), y[:, c].sum()) if by_class[c] else 0.0 for c in by_class]
    return {
        "gap": slow_ap(*zip(*listed, strict=True), y.sum()),
        "map": np.mean([ap for ap, column in zip(aps, y.T, strict=True) if column.sum()]),
        "hit1": np.mean(hit1),
        "perr": np.mean(perr),
    }


@pytest.mark.parametrize("batches", [1, 7])
@pytest.mark.parametrize("num_heads", [1, K])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_against_the_challenges_definitions(batches: int, num_heads: int, combine: str) -> None:
    z, y = make(num_heads)
    values = metrics_of(z, y, batches, combine=combine)
    combined = combine_heads(z, combine, "multilabel")
    expected = challenge(combined, y)
    heads = [challenge(head, y)["gap"] for head in (z if num_heads > 1 else [combined])]
    expected |= {"head_gap": np.mean(heads)} | {f"head_gap_{k}": gap for k, gap in enumerate(heads)}
    expected["nll"] = codistillation(z.double(), y, 0.0, "multilabel", combine=combine).item()
    expected["divergence"] = divergence(z.double(), "multilabel", combine=combine).item()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("classes", [4, 19, 20, 21])
def test_fewer_classes_than_predictions(classes: int) -> None:
    z, y = make(1, classes=max(classes, 8))
    z, y = z[:, :, :classes], y[:, :classes]
    assert metrics_of(z, y) == pytest.approx(metrics_of(z, y) | challenge(z[0], y), rel=1e-5)


def test_more_labels_than_predictions() -> None:
    z, y = make(1)
    y[5] = 1
    y[6, :30] = 1
    values = metrics_of(z, y)
    assert values == pytest.approx(values | challenge(z[0], y), rel=1e-5)
    assert values["perr"] > 0


@pytest.mark.parametrize("ties", [False, True])
def test_all_predictions_against_scikit_learn(ties: bool) -> None:
    z, y = make(1, videos=400, ties=ties)
    values = metrics_of(z, y, 3)
    labelled = y.sum(0) > 0
    for average in ("micro", "macro"):
        expected = average_precision_score(y[:, labelled], z[0, :, labelled], average=average)
        if average == "micro":
            expected = average_precision_score(y.flatten(), z[0].flatten())
        assert values[f"{average}_ap"] == pytest.approx(expected, abs=2e-3 if not ties else 1e-6)


def test_with_at_most_twenty_classes_gap_is_scikit_learns_micro_average() -> None:
    z, y = make(1, classes=15, ties=True)
    expected = average_precision_score(y.flatten(), z[0].flatten())
    assert metrics_of(z, y)["gap"] == pytest.approx(expected, rel=1e-6)
    labelled = y.sum(0) > 0
    expected = average_precision_score(y[:, labelled], z[0][:, labelled], average="macro")
    assert metrics_of(z, y)["map"] == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_average_precision_with_ties_is_scikit_learns(listed: list[tuple[int, bool, int]]) -> None:
    scores, hits, classes = (torch.tensor(column) for column in zip(*listed, strict=True))
    got = average_precision_of_classes(scores.float(), hits, classes, torch.bincount(classes[hits], minlength=4))
    for c in range(4):
        own = classes == c
        expected = average_precision_score(hits[own], scores[own]) if hits[own].any() else 0.0
        assert got[c].item() == pytest.approx(expected)
    if hits.any():
        expected = average_precision_score(hits, scores)
        assert average_precision(scores.float(), hits, int(hits.sum())).item() == pytest.approx(expected)


def test_order_does_not_matter_even_with_ties() -> None:
    z, y = make(ties=True)
    # the best 20 of a video stay a choice among equals, so there are no more than 20 classes
    z, y = z[:, :, :20], y[:, :20]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    assert metrics_of(z[:, order], y[order], 4) == pytest.approx(metrics_of(z, y), rel=1e-6)


def test_processes_add_up() -> None:
    """Merging reduces the states of two metrics exactly as a gather over two processes does."""
    z, y = make()
    first, second = TaggingMetrics(C, K), TaggingMetrics(C, K)
    first.update(z[:, :20], y[:20])
    second.update(z[:, 20:], y[20:])
    for mine, other in zip(first.values(), second.values(), strict=True):
        mine.merge_state(other)
    got = {key: value.item() for key, value in first.compute().items()}
    assert got == pytest.approx(metrics_of(z, y), rel=1e-6)


def test_unknown_labels_do_not_count() -> None:
    z, y = make()
    y[:, 30:] = -1
    assert metrics_of(z, y, 3) == pytest.approx(metrics_of(z[:, :, :30], y[:, :30], 3), rel=1e-5)
    y[4] = -1
    known = torch.arange(N) != 4
    unlabelled, kept = metrics_of(z, y), metrics_of(z[:, known, :30], y[known, :30])
    assert unlabelled["gap"] == pytest.approx(kept["gap"], rel=1e-6)


def test_no_labels_at_all() -> None:
    z, _ = make()
    values = metrics_of(z, torch.zeros(N, C, dtype=torch.int8))
    for name in ("gap", "map", "hit1", "perr", "micro_ap", "macro_ap", "head_gap"):
        assert values[name] == 0, name


def test_reset_prefix_copy_and_bfloat16() -> None:
    z, y = make()
    metrics = TaggingMetrics(C, K, prefix="val/")
    metrics.update(z.bfloat16(), y.float())
    copied = copy.deepcopy(metrics).compute()
    assert copied["val/gap"].item() == pytest.approx(metrics_of(z.bfloat16().float(), y)["gap"])
    metrics.reset()
    metrics.update(z[:, :10], y[:10])
    assert metrics.compute()["val/gap"].item() == pytest.approx(metrics_of(z[:, :10], y[:10])["gap"])


def test_what_is_kept_of_many_batches_lies_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = make()
    expected = metrics_of(z, y)
    blocks = {}
    for size in (2**25, 1000):  # of which one holds all batches, the other one or two
        monkeypatch.setattr("ensemblenet.metrics.tagging._BLOCK", size)
        metrics = TaggingMetrics(C, K)
        for repeat in range(2):
            for part, target in zip(z.chunk(12, 1), y.chunk(12), strict=True):
                metrics.update(part, target)
            assert {key: value.item() for key, value in metrics.compute().items()} == pytest.approx(expected, rel=1e-5)
            kept = [tensor for state in ("scores", "head_hits") for tensor in getattr(metrics["tagging"], state)]
            assert len(kept) == 24
            blocks[size, repeat] = len({tensor.untyped_storage().data_ptr() for tensor in kept})
            metrics.reset()
    assert blocks[2**25, 0] == blocks[2**25, 1] == 2
    assert blocks[1000, 0] > 2


def test_memory_for_each_video_is_bounded() -> None:
    z, y = make()
    metrics = TaggingMetrics(C, K)
    metrics.update(z, y)
    [state] = metrics.values()
    kept = sum(
        tensor.numel() * tensor.element_size()
        for name in ("scores", "entries", "head_scores", "head_hits")
        for tensor in getattr(state, name)
    )
    assert kept == N * 20 * (8 + 5 * K)


@pytest.mark.parametrize(
    ("z_shape", "y_shape", "message"),
    [
        ((N, C), (N, C), "with K=3 and C=50, got (60, 50). Ask the model for all heads: model(x, per_head=True)"),
        ((2, N, C), (N, C), "with K=3 and C=50, got (2, 60, 50)"),
        ((K, N, C), (N,), "target must have the shape (60, 50), got (60,)"),
    ],
)
def test_bad_input(z_shape: tuple[int, ...], y_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TaggingMetrics(C, K).update(torch.zeros(z_shape), torch.zeros(y_shape))


def test_outputs_that_are_nan_make_the_loss_unknown_and_no_error() -> None:
    z, y = torch.randn(2, 4, 5), torch.tensor([[1, 0, 0, 0, 0]] * 4)
    z[:, 1] = torch.nan
    metric = TaggingMetrics(5, 2)
    metric.update(z, y)
    values = metric.compute()
    assert values["nll"].isnan()
    assert 0 <= values["gap"] <= 1
