"""Co-distillation with the trained base as a teacher (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemblenet.cost import count_parameters
from ensemblenet.functional import codistillation
from ensemblenet.inputs import Tree
from ensemblenet.study.task import Method, Setup, Source, TrainingTask
from ensemblenet.training.module import head_outputs

__all__ = ["METHOD"]


class _Taught(TrainingTask):
    """The conversion, and the base, which runs on every batch of training and is dropped at prediction."""

    def __init__(self, source: Source, setup: Setup) -> None:
        def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
            return codistillation(
                outputs,
                target,
                setup.weight,
                setup.task,
                teacher_logits=self._logits,
                teacher_weight=setup.teacher_weight,
                temperature=setup.temperature,
            )

        super().__init__(source.convert(setup), objective)
        self._logits = torch.empty(0)
        # a fresh base stands for the trained one where costs alone are asked
        self.teacher = (source.teacher or source.make_base()).requires_grad_(False)

    def train(self, mode: bool = True) -> _Taught:
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, x: Tree, target: Tensor, progress: float) -> Tensor:
        with torch.no_grad():
            [self._logits] = head_outputs(self.teacher, x)
        return super().loss(x, target, progress)

    def training_only(self) -> int:
        return count_parameters(self.teacher)


METHOD = Method(
    "teacher",
    "co-distillation, λ = {weight}, taught",
    "co-distillation and the trained base as a teacher of every head (this project)",
    _Taught,
    taught=True,
)
