"""Co-distillation as a training task of timm's, for timm's own training script, with compilation, EMA and DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.extras import require
from ensemblenet.functional import Combine, Task, combine_heads
from ensemblenet.losses import CoDistillationLoss

require("timm", "timm")

try:
    from timm.task import ClassificationTask, MultiLabelClassificationEvaluator
    from timm.utils.model import unwrap_model
except ImportError as error:
    from ensemblenet.errors import MissingExtraError

    raise MissingExtraError("Training tasks need a newer timm: pip install --upgrade timm") from error

__all__ = ["CoDistillationTask"]


class CoDistillationTask(ClassificationTask):
    """A multi-headed model and its loss as one module, in place of timm's `ClassificationTask`.

    docs/loops.md has the two lines of timm's training script, `train.py`, that change; `compile`, `setup_ema`,
    `prepare_distributed`, checkpoints and evaluation stay timm's.

    Args:
        model: a multi-headed one.
        criterion: of head outputs (K, N, C) and targets; None takes [`ensemblenet.CoDistillationLoss`][] for the
            model's task.
        options: those of `timm.task.TrainingTask`: `device`, `dtype`, `verbose`.

    Shape:
        - input: (N, *); target: (N,) or (N, C).
        - output: a dictionary of `loss`, a scalar, and `output`, the prediction (N, C).

    Example:
        >>> import ensemblenet, timm, torch
        >>> net = timm.create_model("test_resnet", num_classes=5)
        >>> task = CoDistillationTask(ensemblenet.convert(net, torch.randn(2, 3, 32, 32)))
        >>> result = task(torch.randn(4, 3, 32, 32), torch.arange(4))
        >>> result["loss"].backward()
        >>> result["output"].shape
        torch.Size([4, 5])
    """

    def __init__(
        self, model: EnsembleNet, criterion: Callable[[Tensor, Tensor], Tensor] | None = None, **options: Any
    ) -> None:
        criterion = criterion or CoDistillationLoss(task=model.task, combine=model.combine)
        super().__init__(model, criterion, **options)
        self.task: Task = model.task
        self.combine: Combine = model.combine

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch, and the prediction."""
        heads = self.trainable_module(input, per_head=True)
        return {"loss": self.criterion(heads, target), "output": combine_heads(heads, self.combine, self.task)}

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Parameters for gradient clipping; `exclude_head` leaves out the classifiers of all heads, where known."""
        model = unwrap_model(self.get_trainable_module())
        classifiers = model.get_classifier() if exclude_head and hasattr(model, "get_classifier") else nn.ModuleList()
        excluded = set(map(id, classifiers.parameters()))
        return (own for own in model.parameters() if id(own) not in excluded)

    def create_evaluator(self, **options: Any) -> Any:
        """timm's evaluator for the model's task."""
        if self.task == "multilabel":
            return MultiLabelClassificationEvaluator(device=self.device, **options)
        return super().create_evaluator(**options)
