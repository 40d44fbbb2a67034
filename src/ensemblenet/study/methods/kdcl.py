"""KDCL (Guo et al. 2020, "Online knowledge distillation via collaborative learning", CVPR), its variant MinLogit."""

from __future__ import annotations

from torch import Tensor

from ensemblenet.errors import TrainingError
from ensemblenet.functional import codistillation
from ensemblenet.study.methods.losses import distillation, full_precision
from ensemblenet.study.task import Method, Setup, Source, TrainingTask

__all__ = ["METHOD", "kdcl"]


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
        weight: the weight of the distillation.

    Returns:
        A scalar.

    Raises:
        ValueError: a target that is no class indices, or a shape that does not fit.

    Example:
        >>> import torch
        >>> z, y = torch.randn(3, 8, 10), torch.arange(8)
        >>> bool(kdcl(z, y) > codistillation(z, y, weight=1.0))
        True
    """
    z = full_precision(head_outputs)
    if target.is_floating_point() or target.shape != z.shape[1:2]:
        raise ValueError(
            f"KDCL needs class indices, an integer tensor of shape {tuple(z.shape[1:2])}; got {target.dtype} of shape "
            f"{tuple(target.shape)}. Its teacher is made of each example's true class, so it has no multilabel form."
        )
    true = target.long()[None, :, None].expand(len(z), -1, 1)
    teacher = (z - z.gather(2, true)).amin(0).detach()
    distilled = distillation(teacher, z, temperature, "multiclass").mean()
    return codistillation(z, target, 1.0) + weight * distilled


def _make(source: Source, setup: Setup) -> TrainingTask:
    if setup.task != "multiclass":
        raise TrainingError("KDCL's teacher is made of each example's one true class; it has no multilabel form.")
    return TrainingTask(source.convert(setup), lambda outputs, target, progress: kdcl(outputs, target))


METHOD = Method(
    "kdcl",
    "KDCL",
    "heads learn from the smallest logits of all (MinLogit; Guo et al. 2020)",
    _make,
    tasks=("multiclass",),
)
