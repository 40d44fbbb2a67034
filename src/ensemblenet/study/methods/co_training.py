"""Divide and co-training (Zhao et al. 2020, arXiv 2011.14660): narrow networks that are kept alike."""

from __future__ import annotations

import math

from torch import Tensor

from ensemblenet.functional import Task, codistillation
from ensemblenet.metrics.diversity import kl_divergence, log_probabilities
from ensemblenet.study.methods.losses import full_precision
from ensemblenet.study.task import Method, Setup, Source, TrainingTask

__all__ = ["METHOD", "co_training"]

_WARMUP = 40 / 300  # of a run: 40 of the authors' 300 epochs


def co_training(
    head_outputs: Tensor, target: Tensor, task: Task = "multiclass", *, weight: float = 0.5, ramp: float = 1.0
) -> Tensor:
    """Divide and co-training: the networks' Jensen-Shannon divergence is kept small.

    With H the entropy and q the mean of the p_k,

        L = (1 / K) * (sum_k l(z_k, y) + ramp * weight * (H(q) - mean_k H(p_k)))

    (Zhao et al. 2020, arXiv 2011.14660; the weight as in the authors' code.) No gradient is stopped. The paper also
    shows each network its own view of the data; here all see the same.

    Args:
        head_outputs: logits, shape (K, N, C).
        target: as [`ensemblenet.functional.codistillation`][] takes it.
        task: "multiclass" or "multilabel".
        weight: the weight of the divergence.
        ramp: the share of the divergence that counts.

    Returns:
        A scalar.

    Raises:
        ValueError: a shape that does not fit, or a task without probabilities.

    Example:
        >>> import torch
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(co_training(z, y) > codistillation(z, y, weight=1.0))
        True
    """
    z = full_precision(head_outputs)
    log_p = log_probabilities(z, task)
    log_q = log_p.logsumexp(0) - math.log(len(z))
    divergence = kl_divergence(log_p, log_q).mean()  # H(q) - mean_k H(p_k) = mean_k KL(p_k || q)
    return codistillation(z, target, 1.0, task) + ramp * weight * divergence / len(z)


def _make(source: Source, setup: Setup) -> TrainingTask:
    def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
        return co_training(outputs, target, setup.task, ramp=min(1.0, progress / _WARMUP))

    return TrainingTask(source.convert(setup, split_at="input"), objective)


METHOD = Method(
    "co_training",
    "Divide and Co-training",
    "narrow networks without a trunk, kept alike (Zhao et al. 2020)",
    _make,
    freezes=False,
)
