"""Co-distillation with the trained base as a teacher (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemblenet.cost import count_parameters
from ensemblenet.functional import codistillation
from ensemblenet.inputs import Tree
from ensemblenet.study.task import Method, Setup, Source, TrainingTask
from ensemblenet.training.module import head_outputs

__all__ = ["METHOD", "Taught"]


class Taught(TrainingTask):
    """A network, and the trained base, which runs on every batch of training and is dropped at prediction.

    Args:
        network: a conversion.
        teacher: the base; it learns nothing more.
        setup: the weights of both distillations, and the temperature of the teacher's.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module, setup: Setup) -> None:
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

        super().__init__(network, objective)
        self._logits = torch.empty(0)
        self.teacher = teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> Taught:
        """Set the mode of the network; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, x: Tree, target: Tensor, progress: float) -> Tensor:
        """The loss of a batch, for which the teacher runs too."""
        with torch.no_grad():
            [self._logits] = head_outputs(self.teacher, x)
        return super().loss(x, target, progress)

    def training_only(self) -> int:
        """The parameters of the teacher."""
        return count_parameters(self.teacher)


def _build(source: Source, setup: Setup) -> Taught:
    # a fresh base stands for the trained one where costs alone are asked
    return Taught(source.convert(setup), source.teacher or source.base(setup), setup)


METHOD = Method(
    "teacher",
    "co-distillation, λ = {weight}, taught",
    "co-distillation and the trained base as a teacher of every head (this project)",
    _build,
    taught=True,
)
