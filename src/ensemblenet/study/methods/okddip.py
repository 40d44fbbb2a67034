"""OKDDip (Chen, Mei, Wang, Feng and Chen 2020, arXiv 1912.00350): each peer has its own mix of peers as a teacher."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ensemblenet.cost import count_parameters
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import TrainingError
from ensemblenet.functional import Task, codistillation
from ensemblenet.inputs import Tree, tensors_in
from ensemblenet.study.methods.losses import RAMP, distillation, ramp_up, several_heads, temperature_of
from ensemblenet.study.task import Method, TrainingTask, pooled, run_once

__all__ = ["METHOD", "okddip"]

_PROJECTION_SHARE = 8
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        queries: the queries of the K - 1 peers, shape (K - 1, N, D).
        keys: the keys of the peers, shape (K - 1, N, D).
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
    z = several_heads(head_outputs, "OKDDip")
    peers, leader = z[:-1], z[-1:]
    for name, projected in (("queries", queries), ("keys", keys)):
        if projected.shape[:2] != peers.shape[:2]:
            wanted = (*peers.shape[:2], "D")
            raise ValueError(f"{name} must have the shape {wanted}, got {tuple(projected.shape)}.")
    attention = torch.einsum("and,bnd->nab", queries, keys).softmax(2)
    teachers = torch.einsum("nab,bnc->anc", attention, peers)
    peers_loss = distillation(teachers, peers, temperature, task).mean(1).sum()
    leader_loss = distillation(peers.mean(0), leader, temperature, task).mean()
    return codistillation(z, target, 1.0, task) + ramp * (peers_loss + leader_loss) / len(z)


class _Attentive(TrainingTask):
    """Projections of each peer's last features give the attention; prediction drops them."""

    def __init__(self, network: EnsembleNet, example: Tree, task: Task) -> None:
        temperature = temperature_of(task)

        def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
            features = torch.stack(self._features[:-1])
            queries, keys, ramp = self.query(features), self.key(features), ramp_up(progress, RAMP)
            return okddip(outputs, queries, keys, target, task, temperature=temperature, ramp=ramp)

        super().__init__(network, objective, students=(network.num_heads - 1,))
        self._features = [torch.empty(0)] * network.num_heads
        for k, head in enumerate(network.heads):
            for layer in head.modules():
                if isinstance(layer, _LAYERS):
                    layer.register_forward_pre_hook(partial(self._keep, k))
        run_once(network, example)
        if self._features[0].ndim != 2:
            raise TrainingError("OKDDip reads the input of a head's last linear or convolutional layer; it has none.")
        size, device = self._features[0].shape[1], tensors_in(example)[0].device
        self.query, self.key = (
            nn.Linear(size, max(1, size // _PROJECTION_SHARE), bias=False, device=device) for _ in range(2)
        )

    def _keep(self, k: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features[k] = pooled(inputs[0])  # the last layer's stays

    def training_only(self) -> int:
        return count_parameters(self.query) + count_parameters(self.key)


METHOD = Method(
    "okddip",
    "OKDDip",
    "peers learn from their own mixes, a leader from all of them (Chen et al. 2020)",
    lambda source, setup: _Attentive(source.convert(setup), source.example, setup.task),
)
