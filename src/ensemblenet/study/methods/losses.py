"""The losses of other ways to train several networks together, as pure functions of tensors.

They are what co-distillation is compared with. All take the outputs of K heads, shape (K, N, C) for N examples and C
classes or labels. What each stops the gradient of is part of its definition, and said there.

Scale: the papers add up the losses of K networks. Here every sum is divided by K, which gives the scale of one
network's loss; AdamW does not notice, and `EnsembleNet` gives the heads the factor back (`balance_gradients`).

Tasks: the papers have softmax outputs. For multilabel outputs every label counts as a distribution of two outcomes
and divergences are summed over labels, as the losses are; that extension is this project's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemblenet.functional import Task, codistillation

__all__ = ["co_training", "gated_mean", "kdcl", "log_probabilities", "mutual", "okddip", "one", "ramp_up"]


def one(
    head_outputs: Tensor,
    gate: Tensor,
    target: Tensor,
    task: Task = "multiclass",
    *,
    temperature: float = 3.0,
    ramp: float = 1.0,
) -> Tensor:
    """On-the-fly native ensemble: heads learn from a gated ensemble that is trained along with them.

    With z_e the gated mean of the heads' outputs z_k, and p^T the distribution of outputs divided by T,

        L = (1 / K) * (sum_k l(z_k, y) + l(z_e, y) + ramp * T^2 * sum_k KL(p_e^T || p_k^T))

    (Lan, Zhu and Gong 2018, arXiv 1806.04606; temperature and ramp-up as in the authors' code.) The gradient stops at
    p_e^T: the gate and, through it, the heads learn the ensemble from l(z_e, y) alone.

    Args:
        head_outputs: logits, shape (K, N, C).
        gate: the weight of each head for each example, shape (K, N), adding up to 1 over heads.
        target: as [`ensemblenet.functional.codistillation`][] takes it.
        task: "multiclass" or "multilabel".
        temperature: T.
        ramp: the share of the distillation that counts, see [`ensemblenet.study.methods.losses.ramp_up`][].

    Returns:
        A scalar.

    Raises:
        ValueError: a shape that does not fit, or a task without probabilities.

    Example:
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(one(z, torch.full((3, 8), 1 / 3), y) > 0)
        True
    """
    z = _full_precision(head_outputs)
    ensemble = gated_mean(z, gate)
    own = codistillation(z, target, 1.0, task)
    ensembles = codistillation(ensemble.unsqueeze(0), target, 0.0, task)
    return own + ensembles / len(z) + ramp * _distil(ensemble.detach(), z, temperature, task).mean()


def gated_mean(head_outputs: Tensor, gate: Tensor) -> Tensor:
    """ONE's ensemble: the mean of the heads' outputs (K, N, C) with the weights (K, N), shape (N, C).

    Raises:
        ValueError: the weights are not one for each head and example.

    Example:
        >>> gated_mean(torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]), torch.tensor([[0.75], [0.25]]))
        tensor([[1.5000, 1.0000]])
    """
    if gate.shape != head_outputs.shape[:2]:
        raise ValueError(f"gate must have the shape {tuple(head_outputs.shape[:2])}, got {tuple(gate.shape)}.")
    return (gate.unsqueeze(2) * head_outputs).sum(0)


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
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(mutual(z, y) > codistillation(z, y, weight=1.0))
        True
    """
    z = _several(head_outputs, "mutual learning")
    log_p = log_probabilities(z, task)
    others = _kl(log_p.detach()[:, None], log_p).sum() / (len(z) * (len(z) - 1) * z.shape[1])
    return codistillation(z, target, 1.0, task) + others


def okddip(
    head_outputs: Tensor,
    queries: Tensor,
    keys: Tensor,
    target: Tensor,
    task: Task = "multiclass",
    *,
    temperature: float = 3.0,
    ramp: float = 1.0,
) -> Tensor:
    """Online knowledge distillation with diverse peers: each peer has its own mix of peers as a teacher.

    The last head is the group's leader, the others are peers a, b. With a_ab the softmax over b of <query_a, key_b>,
    peer a's teacher t_a the mean of the peers' outputs with the weights a_ab, and the leader's teacher t their mean,

        L = (1 / K) * (sum_k l(z_k, y) + ramp * T^2 * (sum_a KL(p_{t_a}^T || p_a^T) + KL(p_t^T || p_leader^T)))

    (Chen, Mei, Wang, Feng and Chen 2020, arXiv 1912.00350.) As in the authors' code outputs, not probabilities, are
    mixed, the attention is not scaled, and no gradient is stopped: the attention learns from the distillation.

    Args:
        head_outputs: logits, shape (K, N, C), K of at least 2, the leader last.
        queries: of the K - 1 peers, shape (K - 1, N, D).
        keys: of the peers, shape (K - 1, N, D).
        target: as [`ensemblenet.functional.codistillation`][] takes it.
        task: "multiclass" or "multilabel".
        temperature: T.
        ramp: the share of the distillation that counts, see [`ensemblenet.study.methods.losses.ramp_up`][].

    Returns:
        A scalar.

    Raises:
        ValueError: fewer than 2 heads, a shape that does not fit, or a task without probabilities.

    Example:
        >>> z, y, q = torch.randn(3, 8, 10), torch.arange(8), torch.randn(2, 8, 4)
        >>> bool(okddip(z, q, q, y) > 0)
        True
    """
    z = _several(head_outputs, "OKDDip")
    peers, leader = z[:-1], z[-1:]
    for name, projected in (("queries", queries), ("keys", keys)):
        if projected.shape[:2] != peers.shape[:2]:
            wanted = (*peers.shape[:2], "D")
            raise ValueError(f"{name} must have the shape {wanted}, got {tuple(projected.shape)}.")
    attention = torch.einsum("and,bnd->nab", queries, keys).softmax(2)
    teachers = torch.einsum("nab,bnc->anc", attention, peers)
    peers_loss = _distil(teachers, peers, temperature, task).mean(1).sum()
    leader_loss = _distil(peers.mean(0), leader, temperature, task).mean()
    return codistillation(z, target, 1.0, task) + ramp * (peers_loss + leader_loss) / len(z)


def kdcl(head_outputs: Tensor, target: Tensor, *, temperature: float = 2.0, weight: float = 1.0) -> Tensor:
    """Knowledge distillation via collaborative learning, with the teacher that the paper calls MinLogit.

    Each network's outputs are shifted until that of the true class is 0; the teacher t takes the smallest of each
    class, so that it errs least:

        t_c = min_k (z_kc - z_ky),    L = (1 / K) * sum_k (l(z_k, y) + weight * T^2 * KL(p_t^T || p_k^T))

    (Guo et al. 2020, "Online knowledge distillation via collaborative learning", CVPR.) The gradient stops at t.
    The paper also distorts each network's inputs in its own way; here all see the same.

    Args:
        head_outputs: logits, shape (K, N, C).
        target: class indices, shape (N,): without a true class there is no such teacher.
        temperature: T.
        weight: of the distillation.

    Returns:
        A scalar.

    Raises:
        ValueError: a target that is no class indices, or a shape that does not fit.

    Example:
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(kdcl(z, y) > codistillation(z, y, weight=1.0))
        True
    """
    z = _full_precision(head_outputs)
    if target.is_floating_point() or target.shape != z.shape[1:2]:
        raise ValueError(
            f"KDCL needs class indices, an integer tensor of shape {tuple(z.shape[1:2])}; got {target.dtype} of shape "
            f"{tuple(target.shape)}. Its teacher is made of each example's true class, so it has no multilabel form."
        )
    true = target.long()[None, :, None].expand(len(z), -1, 1)
    teacher = (z - z.gather(2, true)).amin(0).detach()
    distilled = _distil(teacher, z, temperature, "multiclass").mean()
    return codistillation(z, target, 1.0) + weight * distilled


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
        weight: of the divergence.
        ramp: the share of the divergence that counts.

    Returns:
        A scalar.

    Raises:
        ValueError: a shape that does not fit, or a task without probabilities.

    Example:
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(co_training(z, y) > codistillation(z, y, weight=1.0))
        True
    """
    z = _full_precision(head_outputs)
    log_p = log_probabilities(z, task)
    log_q = log_p.logsumexp(0) - math.log(len(z))
    divergence = _kl(log_p, log_q).mean()  # H(q) - mean_k H(p_k) = mean_k KL(p_k || q)
    return codistillation(z, target, 1.0, task) + ramp * weight * divergence / len(z)


def ramp_up(progress: float, length: float) -> float:
    """How much of a distillation counts: exp(-5 (1 - progress / length)^2), and 1 from `length` on.

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
        return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)
    raise ValueError(f"task must be 'multiclass' or 'multilabel', whose outputs are probabilities; got {task!r}.")


def _distil(teacher: Tensor, z: Tensor, temperature: float, task: Task) -> Tensor:
    """T^2 KL(teacher || head) at a temperature, (K, N); the teacher is (N, C) or (K, N, C)."""
    log_t, log_p = (log_probabilities(outputs / temperature, task) for outputs in (teacher, z))
    return temperature**2 * _kl(log_t, log_p)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) over the last dimension."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _several(head_outputs: Tensor, method: str) -> Tensor:
    if len(head_outputs) < 2:
        raise ValueError(f"{method} needs at least 2 heads, got {len(head_outputs)}.")
    return _full_precision(head_outputs)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
