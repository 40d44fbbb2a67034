"""What a report shows of a network's predictions, streaming over batches: a few numbers of each example are kept.

Shapes: N examples, K heads, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor

from ensemblenet._moved import renamed
from ensemblenet.functional import Combine, Task, combine_heads
from ensemblenet.metrics.diversity import divergence_from_ensemble
from ensemblenet.metrics.tagging import TOP, average_precision_of_classes

__all__ = [
    "FEWEST",
    "Best",
    "Bins",
    "Difference",
    "Example",
    "Findings",
    "agreeing",
    "early_stopping",
    "paired_difference",
    "reliability",
    "stopping",
]

__getattr__ = renamed(__name__, {"pairs": "ensemblenet.metrics.diversity.same_class"})

FEWEST = 10
_THRESHOLDS = 40

Point = tuple[float, float]


class Best(NamedTuple):
    """The best class of each of K predictions.

    Attributes:
        classes: (K, N).
        confidence: its probability, (K, N).
        hits: whether it is right, or one of the right ones, (K, N).
    """

    classes: Tensor
    confidence: Tensor
    hits: Tensor


@dataclass(frozen=True)
class Example:
    """One example, and what the heads say of it.

    Attributes:
        place: in the split.
        inputs: as the network takes them; None where they are several tensors.
        labels: the true class or classes.
        heads: the best class of each head, and its probability.
        ensemble: the same of all together.
        divergence: how far heads are from the ensemble, in nats.
    """

    place: int
    inputs: Tensor | None
    labels: list[int]
    heads: list[tuple[int, float]]
    ensemble: tuple[int, float]
    divergence: float


class Findings:
    """What the heads of a network say of examples, alone and the first k together.

    Args:
        combine: how heads make one prediction.
        task: "multiclass" for targets (N,), "multilabel" for targets (N, C) of 1, 0, and -1 where it is not known.
        most: how many examples to keep of those on which heads differ most.

    Example:
        >>> findings = Findings()
        >>> z = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [1.0, 0.0]]])
        >>> findings.update(torch.zeros(2, 5), z, torch.tensor([0, 1]))
        >>> findings.heads.hits.tolist(), findings.firsts.hits.tolist()
        ([[True, True], [True, False]], [[True, True], [True, True]])
        >>> [example.place for example in findings.examples]
        [1, 0]
    """

    def __init__(self, combine: Combine = "logits", task: Task = "multiclass", most: int = 12) -> None:
        self.combine: Combine = combine
        self.task: Task = task
        self.most = most
        self.examples: list[Example] = []
        self.count = 0
        self._heads: list[Best] = []
        self._firsts: list[Best] = []
        self._targets: list[Tensor] = []
        self._lists: list[tuple[Tensor, Tensor, Tensor]] = []
        self._positives: Tensor | int = 0

    def update(
        self, inputs: Tensor | None, head_outputs: Tensor, target: Tensor, places: Sequence[int] | None = None
    ) -> None:
        """Add a batch.

        Args:
            inputs: (N, *), to be shown; None where there is nothing to show.
            head_outputs: logits, (K, N, C).
            target: what the loss takes.
            places: of the examples in their split; None counts those seen so far.
        """
        z = head_outputs
        firsts = torch.stack([combine_heads(z[: k + 1], self.combine, self.task) for k in range(len(z))])
        heads, together = self._best(z, target), self._best(firsts, target)
        self._heads.append(heads)
        self._firsts.append(together)
        self._targets.append(target if self.task == "multiclass" else (target > 0).sum(1))
        if self.task == "multilabel":
            self._add_lists(firsts[-1], target)
        if len(z) > 1:
            places = places or range(self.count, self.count + len(target))
            self._add_examples(places, inputs, z, target, heads, together)
        self.count += len(target)

    @property
    def heads(self) -> Best:
        """Of each head alone."""
        return Best(*(torch.cat(parts, 1) for parts in zip(*self._heads, strict=True)))

    @property
    def firsts(self) -> Best:
        """Of the first 1, 2, ... K heads together; the last is the ensemble."""
        return Best(*(torch.cat(parts, 1) for parts in zip(*self._firsts, strict=True)))

    def same_examples(self, other: Findings) -> bool:
        """Whether these are of the same examples in the same order, by their labels or how many they have."""
        return torch.equal(torch.cat(self._targets), torch.cat(other._targets))

    def class_scores(self, num_classes: int) -> tuple[Tensor, Tensor]:
        """How good the ensemble is at each class, (C,), and how many examples each has, (C,).

        It is the accuracy for "multiclass", and for "multilabel" the average precision among the 20 best predictions
        of every example, as mAP averages it; of a class without examples it is 0.
        """
        if self.task == "multiclass":
            targets = torch.cat(self._targets)
            count = targets.bincount(minlength=num_classes)
            return targets[self.firsts.hits[-1]].bincount(minlength=num_classes) / count.clamp(min=1), count
        scores, classes, hits = (torch.cat(parts).flatten() for parts in zip(*self._lists, strict=True))
        positives = torch.as_tensor(self._positives)
        return average_precision_of_classes(scores, hits, classes, positives).float(), positives

    def _best(self, z: Tensor, target: Tensor) -> Best:
        probabilities = z.softmax(2) if self.task == "multiclass" else z.masked_fill(target < 0, -torch.inf).sigmoid()
        confidence, classes = probabilities.max(2)
        if self.task == "multiclass":
            return Best(classes, confidence, classes == target)
        return Best(classes, confidence, (target > 0).expand_as(z).gather(2, classes[..., None]).squeeze(2))

    def _add_lists(self, z: Tensor, target: Tensor) -> None:
        scores, classes = z.masked_fill(target < 0, -torch.inf).topk(min(TOP, z.shape[1]), dim=1)
        self._lists.append((scores, classes, (target > 0).gather(1, classes)))
        self._positives += (target > 0).sum(0)

    def _add_examples(
        self, places: Sequence[int], inputs: Tensor | None, z: Tensor, target: Tensor, heads: Best, together: Best
    ) -> None:
        divergence = divergence_from_ensemble(z, self.task, combine=self.combine)
        for n in divergence.topk(min(self.most, len(divergence))).indices.tolist():
            labels = [int(target[n])] if self.task == "multiclass" else (target[n] > 0).nonzero().flatten().tolist()
            said = list(zip(heads.classes[:, n].tolist(), heads.confidence[:, n].tolist(), strict=True))
            ensemble = (int(together.classes[-1, n]), float(together.confidence[-1, n]))
            shown = None if inputs is None else inputs[n].clone()
            self.examples.append(Example(places[n], shown, labels, said, ensemble, float(divergence[n])))
        self.examples = sorted(self.examples, key=lambda example: -example.divergence)[: self.most]


# -- what follows from them


class Difference(NamedTuple):
    """How two predictions of the same examples differ.

    Attributes:
        mean: the share of right ones of the first, less that of the second.
        error: its standard error.
        p: of McNemar's exact test: the chance of a difference as large if, of the examples that only one gets right,
            each were as likely the one's as the other's.
    """

    mean: float
    error: float
    p: float


def paired_difference(hits: Tensor, other: Tensor) -> Difference:
    """How much more often one prediction is right than another, of the same examples.

    Args:
        hits: which examples the first gets right, (N,), of at least two.
        other: the same of the second.

    Example:
        >>> hits, other = torch.tensor([[True, True, False, True], [True, False, False, False]])
        >>> difference = paired_difference(hits, other)
        >>> difference.mean, round(difference.error, 3), difference.p
        (0.5, 0.289, 0.5)
    """
    apart = hits.double() - other.double()
    won, lost = int((apart > 0).sum()), int((apart < 0).sum())
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return Difference(float(apart.mean()), float(apart.std()) / len(apart) ** 0.5, p)


class Bins(NamedTuple):
    """Predictions sorted by confidence into bins of equal width.

    Attributes:
        confidence: the mean in each bin.
        accuracy: the share that is right.
        share: of all predictions.
    """

    confidence: list[float]
    accuracy: list[float]
    share: list[float]


def reliability(confidence: Tensor, hits: Tensor, bins: int = 15, fewest: int = FEWEST) -> Bins:
    """How often predictions of a given confidence are right.

    Args:
        confidence: in [0, 1], of any shape.
        hits: which predictions are right, of the same shape.
        bins: of equal width.
        fewest: bins of fewer predictions are left out.

    Example:
        >>> reliability(torch.tensor([0.2, 0.9, 0.8]), torch.tensor([False, True, False]), 2, fewest=1).accuracy
        [0.0, 0.5]
    """
    confidence, hits = confidence.flatten().double(), hits.flatten().double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    count = which.bincount(minlength=bins)
    full = count >= fewest
    means = [which.bincount(values, minlength=bins)[full] / count[full] for values in (confidence, hits)]
    return Bins(means[0].tolist(), means[1].tolist(), (count[full] / len(which)).tolist())


def agreeing(classes: Tensor, fewest: int) -> Tensor:
    """Whether all of the first 1, 2, ... K heads have the same best class, and are not too few.

    Args:
        classes: the best class of each head, (K, N).
        fewest: how many heads must agree.

    Returns:
        (K, N), bool.

    Example:
        >>> agreeing(torch.tensor([[1, 1], [2, 1], [2, 3]]), fewest=2).tolist()
        [[False, False], [False, True], [False, False]]
    """
    same = (classes == classes[0]).cumprod(0).bool()
    same[: fewest - 1] = False
    return same


def stopping(stops: Tensor, hits: Tensor) -> tuple[float, float]:
    """What it costs and how good it is to run heads one by one and stop where a rule says so.

    Args:
        stops: whether to stop after the first 1, 2, ... K heads, (K, N); after the last, always.
        hits: whether the first 1, 2, ... K heads together are right, (K, N).

    Returns:
        The mean number of heads that ran, and the share of examples that were right.

    Example:
        >>> stopping(torch.tensor([[True, False], [True, False]]), torch.tensor([[True, False], [False, True]]))
        (1.5, 1.0)
    """
    last = torch.ones_like(stops[:1])
    used = torch.cat([stops[:-1], last]).int().argmax(0)  # the first of several
    return float((used + 1).double().mean()), float(hits.gather(0, used[None]).double().mean())


def early_stopping(
    heads: Best, firsts: Best, macs: Mapping[int, float], shown: Callable[[float], float]
) -> tuple[list[Point], list[Point], Point]:
    """The cost and the quality of heads that run one after another and stop early.

    Args:
        heads: the best class of each head alone.
        firsts: that of the first 1, 2, ... K heads together.
        macs: of the trunk with 1 and with K heads, by their number.
        shown: makes of the share of right examples what is drawn.

    Returns:
        Points (mean MACs, what is drawn): of stopping at each of several confidences, of stopping
        once 2, 3, ... heads agree, and of the whole network.
    """
    several = len(heads.classes)
    head = (macs[several] - macs[1]) / (several - 1) if several > 1 else 0.0

    def point(stops: Tensor) -> Point:
        used, right = stopping(stops, firsts.hits)
        return macs[1] + (used - 1) * head, shown(right)

    whole = point(torch.zeros_like(firsts.hits))
    if several == 1:
        return [], [], whole
    levels = firsts.confidence[:-1].flatten().quantile(torch.linspace(0, 1, _THRESHOLDS)).tolist()
    by_confidence = [*(point(firsts.confidence >= level) for level in levels), whole]
    return by_confidence, [point(agreeing(heads.classes, number)) for number in range(2, several)], whole
