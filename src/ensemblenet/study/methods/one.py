"""ONE (Lan, Zhu and Gong 2018, arXiv 1806.04606): heads learn from an ensemble that a gate weighs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.functional import Task, codistillation
from ensemblenet.inputs import Tree, tensors_in
from ensemblenet.study.methods.losses import RAMP, distillation, full_precision, ramp_up, temperature_of
from ensemblenet.study.task import Method, TrainingTask, pooled, run_once
from ensemblenet.training.module import head_outputs

__all__ = ["METHOD", "gated_mean", "one"]


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
    z = full_precision(head_outputs)
    ensemble = gated_mean(z, gate)
    own = codistillation(z, target, 1.0, task)
    ensembles = codistillation(ensemble.unsqueeze(0), target, 0.0, task)
    return own + ensembles / len(z) + ramp * distillation(ensemble.detach(), z, temperature, task).mean()


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


class _Gated(TrainingTask):
    """A gate on the trunk's features weighs the heads, in training and in prediction."""

    def __init__(self, network: EnsembleNet, example: Tree, task: Task) -> None:
        temperature = temperature_of(task)

        def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
            ramp = ramp_up(progress, RAMP)
            return one(outputs, self._weights(), target, task, temperature=temperature, ramp=ramp)

        super().__init__(network, objective)
        self._features = torch.empty(0)
        network.trunk.register_forward_hook(self._keep)
        run_once(network, example)
        heads = network.num_heads
        self.gate = nn.Sequential(
            nn.Linear(self._features.shape[1], heads), nn.BatchNorm1d(heads), nn.ReLU(), nn.Softmax(1)
        ).to(tensors_in(example)[0].device)

    def _keep(self, trunk: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._features = pooled(as_tuple(output)[0])

    def _weights(self) -> Tensor:
        """One for each head and example of the last batch, (K, N)."""
        return self.gate(self._features).T

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        outputs = head_outputs(self.network, kwargs or args)
        return outputs, gated_mean(outputs, self._weights())


METHOD = Method(
    "one",
    "ONE",
    "heads learn from a gated ensemble (Lan et al. 2018); the gate stays at prediction",
    lambda source, setup: _Gated(source.convert(setup), source.example, setup.task),
)
