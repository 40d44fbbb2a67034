"""How much heads differ: the share of pairs that disagree, and Kullback-Leibler divergences.

Shapes: K heads, N examples, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ensemblenet.functional import Combine, Task, combine_heads

__all__ = [
    "disagreement",
    "divergence_from_ensemble",
    "kl_between_heads",
    "kl_divergence",
    "log_probabilities",
    "same_class",
]


def disagreement(classes: Tensor) -> Tensor:
    """The share of pairs of heads whose classes differ, for each example; 0 for a single head.

    Args:
        classes: the most likely class of each head, shape (K, N).

    Returns:
        Shape (N,), float32.

    Example:
        >>> disagreement(torch.tensor([[0, 1], [0, 1], [0, 2]]))
        tensor([0.0000, 0.6667])
    """
    pairs = max(1, len(classes) * (len(classes) - 1))
    return (classes[:, None] != classes).sum((0, 1)) / pairs


def same_class(classes: Tensor) -> Tensor:
    """The share of examples on which two heads have the same most likely class, for each pair of heads.

    Args:
        classes: the most likely class of each head, shape (K, N).

    Returns:
        Shape (K, K), float32.

    Example:
        >>> same_class(torch.tensor([[0, 1], [0, 2]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    return (classes[:, None] == classes).float().mean(2)


def log_probabilities(logits: Tensor, task: Task = "multiclass") -> Tensor:
    """The logarithms of the probabilities that logits (..., C) stand for.

    Returns:
        Shape (..., C) for "multiclass"; (..., 2 C) for "multilabel": of every label and of its absence.

    Raises:
        ValueError: the task has no probabilities.

    Example:
        >>> log_probabilities(torch.zeros(1, 2), "multilabel").exp()
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if task == "multiclass":
        return logits.log_softmax(-1)
    if task == "multilabel":
        return torch.cat([logsigmoid(logits), logsigmoid(-logits)], -1)
    raise ValueError(f"task must be 'multiclass' or 'multilabel', whose outputs are probabilities; got {task!r}.")


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) in nats over the last dimension, from log-probabilities whose shapes broadcast.

    Example:
        >>> kl_divergence(torch.tensor([1.0, 0.0]).clamp(min=1e-9).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def divergence_from_ensemble(head_outputs: Tensor, task: Task = "multiclass", *, combine: Combine = "logits") -> Tensor:
    """How far the heads are from the ensemble on each example: mean_k KL(pbar || p_k), in nats.

    Args:
        head_outputs: logits, shape (K, N, C).
        task: "multiclass" or "multilabel", where it is summed over labels.
        combine: how the heads make one prediction.

    Returns:
        Shape (N,).

    Example:
        >>> divergence_from_ensemble(torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]]))
        tensor([0.4338, 0.0000])
    """
    ensemble = log_probabilities(combine_heads(head_outputs, combine, task), task)
    return kl_divergence(ensemble, log_probabilities(head_outputs, task)).mean(0)


def kl_between_heads(head_outputs: Tensor, task: Task = "multiclass") -> Tensor:
    """The mean of KL(p_j || p_k) over examples and pairs of heads j != k, in nats; 0 for a single head.

    Args:
        head_outputs: logits, shape (K, N, C).
        task: "multiclass" or "multilabel", where it is summed over labels.

    Returns:
        A scalar.

    Example:
        >>> kl_between_heads(torch.zeros(3, 2, 4)).item()
        0.0
    """
    log_p = log_probabilities(head_outputs, task)
    # sum_c p_j (log p_j - log p_k) for all pairs at once: (K, K, N, C) would be K times the outputs
    cross = torch.einsum("jnc,knc->jk", log_p.exp(), log_p)
    pairs = max(1, len(log_p) * (len(log_p) - 1))
    return (cross.diagonal()[:, None] - cross).sum() / (pairs * log_p.shape[1])
