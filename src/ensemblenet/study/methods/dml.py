"""Deep mutual learning (Zhang, Xiang, Hospedales and Lu 2018, arXiv 1706.00384): heads learn from each other."""

from __future__ import annotations

from torch import Tensor

from ensemblenet.functional import Task, codistillation
from ensemblenet.metrics.diversity import kl_divergence, log_probabilities
from ensemblenet.study.methods.losses import several_heads
from ensemblenet.study.task import Method, TrainingTask

__all__ = ["METHOD", "mutual"]


def mutual(head_outputs: Tensor, target: Tensor, task: Task = "multiclass") -> Tensor:
    """Deep mutual learning: every network learns from every other one.

        L = (1 / K) * sum_k (l(z_k, y) + 1 / (K - 1) * sum_{j != k} KL(p_j || p_k))

    (Zhang, Xiang, Hospedales and Lu 2018, arXiv 1706.00384, equation 8.) The gradient stops at p_j: a network's own
    loss updates that network only. All update in the same step here, where the paper's take turns.

    Args:
        head_outputs: logits, shape (K, N, C), K of at least 2.
        target: as [`ensemblenet.functional.codistillation`][] takes it.
        task: "multiclass" or "multilabel".

    Returns:
        A scalar.

    Raises:
        ValueError: fewer than 2 heads, a shape that does not fit, or a task without probabilities.

    Example:
        >>> import torch
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(mutual(z, y) > codistillation(z, y, weight=1.0))
        True
    """
    z = several_heads(head_outputs, "mutual learning")
    log_p = log_probabilities(z, task)
    others = kl_divergence(log_p.detach()[:, None], log_p).sum() / (len(z) * (len(z) - 1) * z.shape[1])
    return codistillation(z, target, 1.0, task) + others


METHOD = Method(
    "dml",
    "DML",
    "every head learns from every other one (Zhang et al. 2018)",
    lambda source, setup: TrainingTask(
        source.convert(setup), lambda outputs, target, progress: mutual(outputs, target, setup.task)
    ),
)
