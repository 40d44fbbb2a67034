"""The co-distillation loss as a module."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from ensemblenet import functional
from ensemblenet.functional import Combine, Reduction, Task, check_options

__all__ = ["CoDistillationLoss"]

__path__: list[str] = []  # it was a folder in version 0.1, whose modules are still found (_moved.py)


class CoDistillationLoss(nn.Module):
    """The loss of the ensemble plus `weight` times a distillation of the ensemble into its heads.

    The definition, every argument's meaning and the errors of a call are those of
    [`ensemblenet.functional.codistillation`][], which this module calls. Every option is a plain attribute
    that may change between calls, so a schedule can set `weight`. The idea is that of Li, Ng, Natsev 2019
    (arXiv 1905.09979); the formulas are this project's own derivation.

    Args:
        weight: the co-distillation weight, at least 0: 0 trains the ensemble jointly, 1 trains the heads
            independently on their trunk, more than 1 distils the ensemble into its heads.
        task: "multiclass", "multilabel" or "regression".
        combine: "logits" or "probabilities"; give the one that the model has.
        label_smoothing: in [0, 1]; not for regression.
        class_weight: weights of the classes, labels or outputs, shape (C,); kept as a buffer.
        ignore_index: the class index of positions that do not count.
        reduction: "mean", "sum" or "none".
        teacher_weight: the weight of a distillation of a trained teacher, such as the base, into every head; its
            logits are then the third argument of a call. 0, the default, has no teacher.
        temperature: of the teacher's distillation, above 0.

    Shape:
        - head_outputs: (K, N, C) or (K, N, C, *), what an `EnsembleNet` gives in training mode.
        - target: (N,) or (N, *) class indices; else (N, C) or (N, C, *).
        - teacher_logits: (N, C) or (N, C, *); they get no gradient.
        - example_weight: (N,).
        - output: a scalar, or (N,) or (N, *) with reduction "none"; float32 or float64.

    Raises:
        ValueError: an unknown name or a number out of its range.

    Example:
        >>> import torch
        >>> criterion = CoDistillationLoss(weight=2.0)
        >>> head_outputs = torch.randn(4, 8, 10, requires_grad=True)
        >>> loss = criterion(head_outputs, torch.arange(8))
        >>> loss.backward()
        >>> loss.shape, head_outputs.grad.shape
        (torch.Size([]), torch.Size([4, 8, 10]))
        >>> taught = CoDistillationLoss(weight=2.0, teacher_weight=1.0, temperature=2.0)
        >>> bool(taught(head_outputs, torch.arange(8), torch.randn(8, 10)) > loss)
        True
    """

    class_weight: Tensor | None

    def __init__(
        self,
        weight: float = 2.0,
        task: Task = "multiclass",
        *,
        combine: Combine = "logits",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        teacher_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.task: Task = task
        self.combine: Combine = combine
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.teacher_weight = teacher_weight
        self.temperature = temperature
        self.register_buffer("class_weight", class_weight)
        check_options(weight, task, combine, label_smoothing, reduction, teacher_weight, temperature)

    def forward(
        self,
        head_outputs: Tensor,
        target: Tensor,
        teacher_logits: Tensor | None = None,
        example_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; see the class for shapes."""
        if isinstance(teacher_logits, Tensor) and teacher_logits.ndim == 1 and self.teacher_weight == 0:
            # version 0.1's third argument, and no teacher's shape
            warnings.warn("Give example_weight by its name.", DeprecationWarning, stacklevel=4)
            teacher_logits, example_weight = None, teacher_logits
        return functional.codistillation(
            head_outputs,
            target,
            self.weight,
            self.task,
            combine=self.combine,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            example_weight=example_weight,
            reduction=self.reduction,
            teacher_logits=teacher_logits,
            teacher_weight=self.teacher_weight,
            temperature=self.temperature,
        )

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return (
            f"weight={self.weight}, task={self.task!r}, combine={self.combine!r}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}, "
            f"teacher_weight={self.teacher_weight}, temperature={self.temperature}"
        )
