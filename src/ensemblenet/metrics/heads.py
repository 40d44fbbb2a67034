"""How good the ensemble and its heads are, how well calibrated, and how much they differ; streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from ensemblenet.functional import Combine, codistillation, combine_heads, divergence
from ensemblenet.metrics.diversity import disagreement
from ensemblenet.metrics.scores import Values

__all__ = ["HeadMetrics"]

_TOP = 5
_HITS = ("accuracy", "top5")


class HeadMetrics(MetricCollection):
    """What to log of a multi-headed classifier, over batches and over processes.

    `compute()` gives a flat dictionary of scalars over all examples seen since `reset()`:

    | key | meaning |
    |---|---|
    | `accuracy` | share of positions that the ensemble gets right |
    | `head_accuracy` | the same for a single head, mean over heads |
    | `head_accuracy_0`, ... | the same for each head |
    | `first_accuracy_1`, ... | the same for the first 1, 2, ... K heads combined |
    | `top5`, `head_top5`, `head_top5_0`, `first_top5_1`, ... | the same for the five most likely classes |
    | `nll` | negative log-likelihood of the ensemble, in nats |
    | `ece` | expected calibration error of the ensemble, 15 bins |
    | `brier` | Brier score of the ensemble: its squared error, summed over classes, in [0, 2] |
    | `disagreement` | share of pairs of heads whose most likely classes differ; 0 for a single head |
    | `divergence` | how far the heads are from the ensemble, see [`ensemblenet.functional.divergence`][] |

    Args:
        num_classes: C.
        num_heads: K.
        combine: how the ensemble combines its heads, see [`ensemblenet.functional.combine_heads`][].
        ignore_index: the class index of positions that do not count.
        options: of `torchmetrics.MetricCollection`, such as `prefix="val/"`.

    Shape:
        - head_outputs: logits, (K, N, C) or (K, N, C, *).
        - target: class indices, (N,) or (N, *).

    Raises:
        ValueError: at an update, if the outputs are not of K heads and C classes or the target does not fit.

    Example:
        >>> metrics = HeadMetrics(num_classes=3, num_heads=2)
        >>> z = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [[4.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> metrics.update(z, torch.tensor([0, 1]))
        >>> values = metrics.compute()
        >>> [values[key].item() for key in ("accuracy", "head_accuracy", "disagreement")]
        [1.0, 0.75, 0.5]
    """

    def __init__(
        self,
        num_classes: int,
        num_heads: int,
        *,
        combine: Combine = "logits",
        ignore_index: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index),
                "ece": MulticlassCalibrationError(num_classes, ignore_index=ignore_index),
                "heads": _HeadStatistics(num_heads, combine, ignore_index),
            },
            compute_groups=False,
            **options,
        )
        self.combine: Combine = combine
        self.num_heads = num_heads
        self.num_classes = num_classes

    def update(self, head_outputs: Tensor, target: Tensor) -> None:
        """Add a batch; see the class for shapes."""
        super().update(**self._inputs(head_outputs, target))

    def forward(self, head_outputs: Tensor, target: Tensor) -> Values:
        """Add a batch and return the values of this batch alone."""
        return Values(super().forward(**self._inputs(head_outputs, target)))

    def compute(self) -> Values:
        """The values of all that was seen."""
        return Values(super().compute())

    def _inputs(self, head_outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The arguments of every metric here; a collection gives each metric those that it has."""
        shape = tuple(head_outputs.shape)
        if len(shape) < 3 or (shape[0], shape[2]) != (self.num_heads, self.num_classes):
            raise ValueError(
                f"head_outputs must have the shape (K, N, C, *) with K={self.num_heads} and "
                f"C={self.num_classes}, got {shape}. Ask the model for all heads: model(x, per_head=True)."
            )
        if target.is_floating_point() or tuple(target.shape) != shape[1:2] + shape[3:]:
            raise ValueError(
                f"target must hold class indices, an integer tensor of shape {shape[1:2] + shape[3:]}, got "
                f"{target.dtype} of shape {tuple(target.shape)}."
            )
        z = head_outputs.detach().float()
        preds = combine_heads(z, self.combine).softmax(1)
        return {"preds": preds, "target": target, "head_outputs": z}


class _HeadStatistics(Metric):
    """What torchmetrics lacks: sums over positions, one pass for all."""

    full_state_update = False
    positions: Tensor
    head_hits: Tensor
    first_hits: Tensor
    disagreements: Tensor
    nll: Tensor
    brier: Tensor
    divergence: Tensor

    def __init__(self, num_heads: int, combine: Combine, ignore_index: int | None) -> None:
        super().__init__()
        self.combine: Combine = combine
        self.ignore_index = ignore_index
        # of the hits: right among the one and among the five most likely classes
        for name, shape in [
            ("positions", ()),
            ("head_hits", (2, num_heads)),
            ("first_hits", (2, num_heads)),
        ]:
            self.add_state(name, torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        for name in ("disagreements", "nll", "brier", "divergence"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, head_outputs: Tensor, target: Tensor) -> None:
        z, target = head_outputs.movedim(2, -1).flatten(1, -2), target.flatten()
        if self.ignore_index is not None:
            counts = target != self.ignore_index
            z, target = z[:, counts], target[counts]
        if len(target) == 0:
            return  # a mean over nothing would be NaN, and stay
        first = torch.stack([combine_heads(z[: k + 1], self.combine) for k in range(len(z))])
        self.positions += len(target)
        self.head_hits += _hits(z, target)
        self.first_hits += _hits(first, target)
        self.disagreements += disagreement(z.argmax(2)).sum()
        self.nll += codistillation(z, target, weight=0.0, combine=self.combine, reduction="sum")
        self.brier += (first[-1].softmax(1) - one_hot(target, z.shape[2])).square().sum()
        self.divergence += divergence(z, combine=self.combine) * len(target)

    def compute(self) -> dict[str, Tensor]:
        values = {"top5": self.first_hits[1, -1] / self.positions}
        for name, heads, firsts in zip(_HITS, self.head_hits, self.first_hits, strict=True):
            shares = heads / self.positions
            values[f"head_{name}"] = shares.mean()
            values |= {f"head_{name}_{k}": share for k, share in enumerate(shares)}
            values |= {f"first_{name}_{k}": hits / self.positions for k, hits in enumerate(firsts, 1)}
        return values | {
            "nll": self.nll / self.positions,
            "brier": self.brier / self.positions,
            "disagreement": self.disagreements / self.positions,
            "divergence": self.divergence / self.positions,
        }


def _hits(z: Tensor, target: Tensor) -> Tensor:
    """How often each of K outputs (K, N, C) has the target first, and among its first five: (2, K)."""
    best = z.topk(min(_TOP, z.shape[2]), dim=2).indices
    among = (best == target[:, None]).any(2)
    return torch.stack([(z.argmax(2) == target).sum(1), among.sum(1)])
