"""How well videos are tagged, as the YouTube-8M challenge measures it; streaming, over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ensemblenet.functional import Combine, codistillation, combine_heads, divergence
from ensemblenet.metrics.scores import Values

__all__ = ["TaggingMetrics", "average_precision", "average_precision_of_classes"]

TOP = 20
_BINS = 2048  # of a score, for the average precision of all predictions
_LARGEST = 16.0  # logits beyond it, on either side, count as equal
_BLOCK = 2**25 + 1  # bytes; glibc gives a block of more than 32 MiB pages of its own, which cost nothing until written


class TaggingMetrics(MetricCollection):
    """What to log of a multi-headed tagger of N videos with C classes, over batches and over processes.

    `compute()` gives a flat dictionary of scalars over all examples seen since `reset()`:

    | key | meaning |
    |---|---|
    | `gap` | GAP@20: the average precision of one list with the 20 best predictions of every video |
    | `map` | mAP: the same in a list for each class, averaged over classes |
    | `hit1` | Hit@1: share of videos whose best prediction is right |
    | `perr` | precision at equal recall rate: the share that is right of as many predictions as a video has labels |
    | `micro_ap`, `macro_ap` | average precision of all predictions, in one list and in a list for each class |
    | `head_gap`, `head_gap_0`, ... | GAP@20 of single heads, their mean and each |
    | `nll` | negative log-likelihood of the ensemble in nats, summed over classes |
    | `divergence` | how far the heads are from the ensemble, see [`ensemblenet.functional.divergence`][] |

    The definitions are those of the challenge's code. In lists, the recall's denominator counts all labels, also
    those that are not among a video's best 20. Choices that it leaves to chance are made here: equal scores in a list
    count as one threshold, as in scikit-learn, so that no order matters. Classes without any label are left out of
    the averages over classes, where the challenge's code counts them as 0; its full sets have none. Videos without
    labels count: as misses in `hit1` and `perr`, and their predictions as wrong ones.

    `gap`, `map`, `hit1`, `perr` and the heads' are exact. They keep the 20 best predictions of each video, 8 bytes
    each and 5 more per head if there are several: 0.2 GB for the 1.1 million videos of the full validation set,
    and 0.1 GB a head. `micro_ap` and `macro_ap` sort scores into 2,048 equal steps of the logit from -16 to 16, 63 MB
    for 3,862 classes; their ties made both too low by 0.0005 and 0.0013 on real predictions (docs/youtube8m.md).

    Args:
        num_classes: C.
        num_heads: K.
        combine: how the ensemble combines its heads, see [`ensemblenet.functional.combine_heads`][].
        options: of `torchmetrics.MetricCollection`, such as `prefix="val/"`.

    Shape:
        - head_outputs: logits, (K, N, C).
        - target: (N, C), 1 for a label, 0 for none, -1 where it is not known: such an entry does not count.

    Raises:
        ValueError: at an update, if the outputs are not of K heads and C classes or the target does not fit.

    Example:
        >>> metrics = TaggingMetrics(num_classes=3, num_heads=1)
        >>> metrics.update(torch.tensor([[[3.0, 1.0, -2.0], [0.0, -1.0, 2.0]]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
        >>> values = metrics.compute()
        >>> [round(values[key].item(), 3) for key in ("gap", "map", "hit1", "perr")]
        [0.806, 1.0, 0.5, 0.5]
    """

    def __init__(self, num_classes: int, num_heads: int, *, combine: Combine = "logits", **options: Any) -> None:
        super().__init__({"tagging": _Tagging(num_classes, num_heads, combine)}, compute_groups=False, **options)

    def forward(self, head_outputs: Tensor, target: Tensor) -> Values:
        """Add a batch and return the values of this batch alone."""
        return Values(super().forward(head_outputs, target))

    def compute(self) -> Values:
        """The values of all that was seen."""
        return Values(super().compute())


def average_precision(scores: Tensor, hits: Tensor, positives: Tensor | int) -> Tensor:
    """The average precision of a list of M predictions: precision at each score, times the recall gained there.

    Equal scores are one threshold, as in `sklearn.metrics.average_precision_score`.

    Args:
        scores: shape (M,).
        hits: which predictions are right, (M,).
        positives: how many labels there are, in the list or not; with none the result is 0.

    Returns:
        A scalar, float64.

    Example:
        >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]), 2).item()
        0.8333333333333333
    """
    classes = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return average_precision_of_classes(scores, hits, classes, torch.as_tensor([positives], device=scores.device))[0]


def average_precision_of_classes(scores: Tensor, hits: Tensor, classes: Tensor, positives: Tensor) -> Tensor:
    """The average precision of the list of each of C classes.

    Args:
        scores: of M predictions of any classes, shape (M,).
        hits: which predictions are right, (M,).
        classes: which class each is of, (M,).
        positives: how many labels each class has, in its list or not, (C,); with none the result is 0.

    Returns:
        Shape (C,), float64.
    """
    order = scores.argsort(descending=True)
    order = order[classes[order].argsort(stable=True)]
    scores, hits, classes = scores[order], hits[order], classes[order]
    ends = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    ends[:-1] = (scores[1:] != scores[:-1]) | (classes[1:] != classes[:-1])  # the last of a run of equals
    size = torch.bincount(classes, minlength=len(positives))
    begin = (size.cumsum(0) - size)[classes]
    right = torch.cat([torch.zeros(1, dtype=torch.int64, device=hits.device), hits.long().cumsum(0)])
    rank = torch.arange(1, len(scores) + 1, device=scores.device) - begin
    right = right[1:] - right[begin]
    ends, classes = ends.nonzero().squeeze(1), classes[ends]
    right, rank = right[ends], rank[ends]
    gained = right.diff(prepend=right.new_zeros(1))
    first = classes.diff(prepend=classes.new_full((1,), -1)) != 0
    gained = torch.where(first, right, gained)
    gains = gained.double() * right / rank
    sums = torch.zeros(len(positives), dtype=torch.float64, device=scores.device).index_add(0, classes, gains)
    return sums / positives.clamp(min=1)


class _Tagging(Metric):
    """All of it in one pass over the predictions."""

    full_state_update = False
    scores: list[Tensor]
    entries: list[Tensor]
    head_scores: list[Tensor]
    head_hits: list[Tensor]
    positives: Tensor
    counts: Tensor
    videos: Tensor
    hits: Tensor
    precision: Tensor
    nll: Tensor
    divergence: Tensor

    def __init__(self, num_classes: int, num_heads: int, combine: Combine) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.combine: Combine = combine
        self._rooms: dict[str, Tensor] = {}  # what is free in the blocks of list states
        # the best predictions of each video, (N, 20): scores, and twice the class plus 1 if it is right
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("entries", [], dist_reduce_fx="cat")
        # and of each head, (N, K, 20); a single head is the ensemble
        self.add_state("head_scores", [], dist_reduce_fx="cat")
        self.add_state("head_hits", [], dist_reduce_fx="cat")
        self.add_state("positives", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        # of wrong and of right predictions, by class and score
        self.add_state("counts", torch.zeros(2, num_classes, _BINS, dtype=torch.int32), dist_reduce_fx="sum")
        for name in ("videos", "hits"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("precision", "nll", "divergence"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, head_outputs: Tensor, target: Tensor) -> None:
        self._check(head_outputs, target)
        if len(target) == 0:
            return
        known, right = target >= 0, target > 0
        z = head_outputs.detach().float()
        combined = combine_heads(z, self.combine, "multilabel")
        ranked = combined.masked_fill(~known, -torch.inf)
        labels = right.sum(1)
        scores, classes = ranked.topk(min(self.num_classes, max(TOP, int(labels.max()))), dim=1)
        found = right.gather(1, classes)
        self.videos += len(target)
        self.hits += found[:, 0].sum()
        as_many = torch.arange(found.shape[1], device=found.device) < labels[:, None]
        self.precision += ((found & as_many).sum(1) / labels.clamp(min=1).double()).sum()
        self.positives += right.sum(0)
        self._keep("scores", scores[:, :TOP])
        self._keep("entries", (2 * classes + found)[:, :TOP].int())
        self._count(combined, known, right)
        self._add_losses(z, target, known)
        if self.num_heads > 1:
            best, classes = z.masked_fill(~known, -torch.inf).topk(scores[:, :TOP].shape[1], dim=2)
            self._keep("head_scores", best.movedim(0, 1))
            self._keep("head_hits", right.expand(self.num_heads, -1, -1).gather(2, classes).movedim(0, 1))

    def _keep(self, state: str, rows: Tensor) -> None:
        """Append to a list state. On a CPU the rows of many batches lie in one block.

        Small tensors that outlive the large ones among which they were made would leave holes that are never filled:
        7 GB over a million videos.
        """
        if rows.device.type == "cpu":
            room = self._rooms.get(state)
            if room is None or len(room) < len(rows):
                row_bytes = rows[0].numel() * rows.element_size()
                room = rows.new_empty(max(len(rows), -(-_BLOCK // row_bytes)), *rows.shape[1:])
            rows, self._rooms[state] = room[: len(rows)].copy_(rows), room[len(rows) :]
        getattr(self, state).append(rows)

    def _check(self, head_outputs: Tensor, target: Tensor) -> None:
        shape = tuple(head_outputs.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (self.num_heads, self.num_classes):
            raise ValueError(
                f"head_outputs must have the shape (K, N, C) with K={self.num_heads} and C={self.num_classes}, got "
                f"{shape}. Ask the model for all heads: model(x, per_head=True)."
            )
        if tuple(target.shape) != shape[1:]:
            raise ValueError(f"target must have the shape {shape[1:]}, got {tuple(target.shape)}.")

    def _count(self, z: Tensor, known: Tensor, right: Tensor) -> None:
        z = z.nan_to_num(nan=-_LARGEST)  # of damaged inputs; the loss says so
        steps = ((z + _LARGEST) * (_BINS / (2 * _LARGEST))).clamp(0, _BINS - 1).long()
        cells = steps + torch.arange(self.num_classes, device=z.device) * _BINS
        for value, counted in ((0, known & ~right), (1, right)):
            added = cells[counted].bincount(minlength=self.num_classes * _BINS)
            self.counts[value] += added.view(self.num_classes, _BINS)

    def _add_losses(self, z: Tensor, target: Tensor, known: Tensor) -> None:
        z, target = mask_unknown(z, target)
        self.nll += codistillation(z, target, 0.0, "multilabel", combine=self.combine, reduction="sum")
        self.divergence += divergence(z, "multilabel", combine=self.combine) * len(target)

    def compute(self) -> dict[str, Tensor]:
        scores, entries = _joined(self.scores).flatten(), _joined(self.entries).flatten().long()
        real = scores > -torch.inf
        scores, entries = scores[real], entries[real]
        positives = self.positives
        hits, classes = entries % 2 == 1, entries // 2
        labelled = positives > 0
        of_classes = average_precision_of_classes(scores, hits, classes, positives)
        values = {
            "gap": average_precision(scores, hits, positives.sum()),
            "map": _mean(of_classes, labelled),
            "hit1": self.hits / self.videos,
            "perr": self.precision / self.videos,
            "micro_ap": _from_counts(self.counts.sum(1))[0],
            "macro_ap": _mean(_from_counts(self.counts.movedim(1, 0)), labelled),
            "nll": self.nll / self.videos,
            "divergence": self.divergence / self.videos,
        }
        heads = self._head_gaps(positives.sum()) if self.num_heads > 1 else [values["gap"]]
        values["head_gap"] = torch.stack(heads).mean()
        values |= {f"head_gap_{k}": gap for k, gap in enumerate(heads)}
        return {name: value.float() for name, value in values.items()}

    def _head_gaps(self, positives: Tensor) -> list[Tensor]:
        scores, hits = _joined(self.head_scores), _joined(self.head_hits)
        real = scores > -torch.inf
        return [
            average_precision(scores[:, k][real[:, k]], hits[:, k][real[:, k]], positives)
            for k in range(self.num_heads)
        ]


def mask_unknown(head_outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets whose unknown entries, of target -1, cost nothing and give no gradient.

    They become labels that are not there, predicted with certainty.

    Args:
        head_outputs: logits, (K, N, C).
        target: (N, C).

    Example:
        >>> z, y = mask_unknown(torch.zeros(2, 1, 2), torch.tensor([[1, -1]]))
        >>> z[0].tolist(), y.tolist()
        ([[0.0, -100.0]], [[1, 0]])
    """
    return head_outputs.masked_fill(target < 0, -100.0), target.clamp(min=0)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """A list state, which is one tensor after it was gathered from processes."""
    return state if isinstance(state, Tensor) else torch.cat(state)


def _mean(values: Tensor, which: Tensor) -> Tensor:
    """The mean of some values; 0 of none."""
    return (values * which).sum() / which.sum().clamp(min=1)


def _from_counts(counts: Tensor) -> Tensor:
    """Average precision from counts of wrong and right predictions by score: (1,) of (2, B), (C,) of (C, 2, B)."""
    counts = counts.reshape(-1, 2, counts.shape[-1]).flip(2).double()
    right = counts[:, 1].cumsum(1)
    listed = counts.sum(1).cumsum(1)
    precision = right / listed.clamp(min=1)
    return (precision * counts[:, 1]).sum(1) / counts[:, 1].sum(1).clamp(min=1)
