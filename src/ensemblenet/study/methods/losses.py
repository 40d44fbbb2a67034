"""Parts that the losses of several methods share.

All take the outputs of K heads, shape (K, N, C) for N examples and C classes or labels. What each stops the gradient of
is part of its definition, and said there.

Scale: the papers add up the losses of K networks. Here every sum is divided by K, which gives the scale of one
network's loss; AdamW does not notice, and `EnsembleNet` gives the heads the factor back (`balance_gradients`).

Tasks: the papers have softmax outputs. For multilabel outputs every label counts as a distribution of two outcomes
and divergences are summed over labels, as the losses are; that extension is this project's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemblenet.functional import Task
from ensemblenet.metrics.diversity import kl_divergence, log_probabilities

__all__ = ["RAMP", "distillation", "full_precision", "ramp_up", "several_heads", "temperature_of"]

RAMP = 80 / 300  # the share of a run in which ONE and OKDDip ramp up: 80 of the authors' 300 epochs


def ramp_up(progress: float, length: float) -> float:
    """The share of a distillation that counts: exp(-5 (1 - progress / length)^2), and 1 from `length` on.

    (Laine and Aila 2017, arXiv 1610.02242, section 2.1; ONE and OKDDip use it.)

    Args:
        progress: the share of all training steps that are done.
        length: the share after which all of it counts, above 0.

    Example:
        >>> [round(ramp_up(progress, 0.5), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.007, 0.287, 1.0, 1.0]
    """
    missing = 1 - min(1.0, progress / length)
    return math.exp(-5 * missing * missing)


def temperature_of(task: Task) -> float:
    """The temperature of ONE and OKDDip: 3, as in their papers; 1 for labels.

    A sigmoid of a logit divided by 3 gives each of thousands of absent labels several percent, and matching those
    outweighs the rest of the loss; docs/compare.md has what that costs.

    Example:
        >>> temperature_of("multiclass"), temperature_of("multilabel")
        (3.0, 1.0)
    """
    return 1.0 if task == "multilabel" else 3.0


def distillation(teacher: Tensor, head_outputs: Tensor, temperature: float, task: Task) -> Tensor:
    """T^2 KL(teacher || head) at a temperature T.

    Args:
        teacher: logits, shape (N, C), or (K, N, C) for a teacher of each head.
        head_outputs: logits, shape (K, N, C).
        temperature: T, by which all logits are divided.
        task: "multiclass" or "multilabel".

    Returns:
        Shape (K, N).

    Example:
        >>> z = torch.randn(2, 3, 4)
        >>> distillation(z[0], z, 3.0, "multiclass")[0]
        tensor([0., 0., 0.])
    """
    log_t, log_p = (log_probabilities(outputs / temperature, task) for outputs in (teacher, head_outputs))
    return temperature**2 * kl_divergence(log_t, log_p)


def several_heads(head_outputs: Tensor, method: str) -> Tensor:
    """The outputs in full precision.

    Raises:
        ValueError: fewer than 2 heads.
    """
    if len(head_outputs) < 2:
        raise ValueError(f"{method} needs at least 2 heads, got {len(head_outputs)}.")
    return full_precision(head_outputs)


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()
