"""The methods that `compare` trains: each is a network, a loss, and a way to predict.

Every multi-headed network comes from `convert`, and so does every narrower single one. Modules that a method needs
beside the network, a gate or projections, are small and made here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ensemblenet import Budget, Cost, EnsembleNet, convert, measure_cost
from ensemblenet.cost import count_parameters
from ensemblenet.errors import TrainingError
from ensemblenet.functional import Task, codistillation, combine_heads
from ensemblenet.study.methods import losses as peers
from ensemblenet.training.module import head_outputs

__all__ = ["METHODS", "Contender", "Method", "Setup", "Source"]

# Shares of a run, from the authors' 80 and 40 of 300 epochs.
_RAMP = 80 / 300
_CO_TRAINING_WARMUP = 40 / 300
_PROJECTION_SHARE = 8
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Objective = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Setup:
    """What a method is set up with; those of single networks do not read all of it.

    Args:
        num_heads: K.
        budget: the most that a conversion may cost, as a share of the base's parameters and MACs.
        split_at: where heads part, for methods that share a trunk.
        weight: lambda of co-distillation.
        task: what the outputs mean.
    """

    num_heads: int = 4
    budget: float = 0.95
    split_at: str = "auto"
    weight: float = 2.0
    task: Task = "multiclass"


@dataclass(frozen=True)
class Source:
    """Where networks come from.

    Args:
        make_base: gives a fresh base.
        example: inputs for it, shape (N, *) with N of at least 2.
        seed: of all weights.
    """

    make_base: Callable[[], nn.Module]
    example: Tensor
    seed: int = 0

    def convert(self, num_heads: int, budget: float | Budget, split_at: str, task: Task) -> EnsembleNet:
        """Convert a fresh base."""
        return convert(self.make_base(), self.example, num_heads, budget, split_at, self.seed, task=task)


class Contender(nn.Module):
    """A network in training: its loss, and what it predicts.

    Args:
        network: an `EnsembleNet`, or a plain network, which counts as one head.
        objective: called with head outputs (K, N, C), targets and the share of training that is done.
        students: which heads the method would deploy alone; None is all of them.

    Shape:
        - input: (N, *).
        - output: head outputs (K, N, C), and the prediction (N, C).

    Example:
        >>> contender = Contender(nn.Linear(4, 3), lambda z, y, progress: codistillation(z, y, 1.0))
        >>> [tuple(outputs.shape) for outputs in contender(torch.zeros(5, 4))]
        [(1, 5, 3), (5, 3)]
    """

    def __init__(self, network: nn.Module, objective: Objective, students: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.students = students

    def loss(self, x: Tensor, target: Tensor, progress: float) -> Tensor:
        """The loss of a batch; `progress` is the share of all training steps that are done."""
        return self.objective(head_outputs(self.network, x), target, progress)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads and all together predict."""
        outputs = head_outputs(self.network, x)
        return outputs, combine_heads(outputs)

    def training_only(self) -> int:
        """Parameters that prediction does not need."""
        return 0

    def cost(self, example: Tensor) -> Cost:
        """What a prediction costs: parameters, and MACs for one example."""
        total = measure_cost(self, example)
        return Cost(total.parameters - self.training_only(), total.macs)


class _Gated(Contender):
    """ONE: a gate on the trunk's features weighs the heads; it stays with the ensemble."""

    def __init__(self, network: EnsembleNet, example: Tensor, task: Task) -> None:
        temperature = _temperature(task)

        def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
            ramp = peers.ramp_up(progress, _RAMP)
            return peers.one(outputs, self._weights(), target, task, temperature=temperature, ramp=ramp)

        super().__init__(network, objective)
        self._features = torch.empty(0)
        network.trunk.register_forward_hook(self._keep)
        _run_once(network, example)
        heads = network.num_heads
        self.gate = nn.Sequential(
            nn.Linear(self._features.shape[1], heads), nn.BatchNorm1d(heads), nn.ReLU(), nn.Softmax(1)
        ).to(example.device)

    def _keep(self, trunk: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._features = _pooled(output)

    def _weights(self) -> Tensor:
        """One for each head and example of the last batch, (K, N)."""
        return self.gate(self._features).T

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = head_outputs(self.network, x)
        return outputs, peers.gated_mean(outputs, self._weights())


class _Attentive(Contender):
    """OKDDip: projections of each peer's last features say whom it learns from; prediction drops them."""

    def __init__(self, network: EnsembleNet, example: Tensor, task: Task) -> None:
        temperature = _temperature(task)

        def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
            features = torch.stack(self._features[:-1])
            queries, keys, ramp = self.query(features), self.key(features), peers.ramp_up(progress, _RAMP)
            return peers.okddip(outputs, queries, keys, target, task, temperature=temperature, ramp=ramp)

        super().__init__(network, objective, students=(network.num_heads - 1,))
        self._features = [torch.empty(0)] * network.num_heads
        for k, head in enumerate(network.heads):
            for layer in head.modules():
                if isinstance(layer, _LAYERS):
                    layer.register_forward_pre_hook(partial(self._keep, k))
        _run_once(network, example)
        if self._features[0].ndim != 2:
            raise TrainingError("OKDDip reads the input of a head's last linear or convolutional layer; it has none.")
        size = self._features[0].shape[1]
        self.query, self.key = (
            nn.Linear(size, max(1, size // _PROJECTION_SHARE), bias=False, device=example.device) for _ in range(2)
        )

    def _keep(self, k: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features[k] = _pooled(inputs[0])  # the last layer's stays

    def training_only(self) -> int:
        return count_parameters(self.query) + count_parameters(self.key)


@dataclass(frozen=True)
class Method:
    """One way to turn a base into a prediction.

    Args:
        title: what tables call it; `{weight}` and `{num_heads}` are filled in.
        summary: what it is, and whose.
        make: makes the untrained contender.
        several: whether it has several heads or networks.
    """

    title: str
    summary: str
    make: Callable[[Source, Setup], Contender]
    several: bool = True

    def build(self, source: Source, setup: Setup) -> Contender:
        """The untrained contender, which depends on the source's seed alone."""
        torch.manual_seed(source.seed)
        return self.make(source, setup)

    def name(self, setup: Setup) -> str:
        """The title for a setup.

        Example:
            >>> METHODS["codistillation"].name(Setup(weight=3.0))
            'co-distillation, λ = 3'
        """
        return self.title.format(weight=f"{setup.weight:g}", num_heads=setup.num_heads)


def _codistilled(network: nn.Module, weight: float, task: Task) -> Contender:
    return Contender(network, lambda outputs, target, progress: codistillation(outputs, target, weight, task))


def _base(source: Source, setup: Setup) -> Contender:
    return _codistilled(source.make_base(), 0.0, setup.task)


def _narrow(source: Source, setup: Setup) -> Contender:
    return _codistilled(source.convert(1, setup.budget, "input", setup.task).head(0), 0.0, setup.task)


def _head_alone(source: Source, setup: Setup) -> Contender:
    return _codistilled(_conversion(source, setup).head(0), 0.0, setup.task)


def _with_weight(weight: float | None, source: Source, setup: Setup) -> Contender:
    return _codistilled(_conversion(source, setup), setup.weight if weight is None else weight, setup.task)


def _one(source: Source, setup: Setup) -> Contender:
    return _Gated(_conversion(source, setup), source.example, setup.task)


def _okddip(source: Source, setup: Setup) -> Contender:
    return _Attentive(_conversion(source, setup), source.example, setup.task)


def _mutual(source: Source, setup: Setup) -> Contender:
    return Contender(
        _conversion(source, setup), lambda outputs, target, progress: peers.mutual(outputs, target, setup.task)
    )


def _kdcl(source: Source, setup: Setup) -> Contender:
    if setup.task != "multiclass":
        raise TrainingError("KDCL's teacher is made of each example's one true class; it has no multilabel form.")
    return Contender(_conversion(source, setup), lambda outputs, target, progress: peers.kdcl(outputs, target))


def _co_training(source: Source, setup: Setup) -> Contender:
    def objective(outputs: Tensor, target: Tensor, progress: float) -> Tensor:
        return peers.co_training(outputs, target, setup.task, ramp=min(1.0, progress / _CO_TRAINING_WARMUP))

    return Contender(source.convert(setup.num_heads, setup.budget, "input", setup.task), objective)


def _deep_ensemble(source: Source, setup: Setup) -> Contender:
    # Nothing is shared and each network has a loss of its own: trained at once, yet independently.
    return _codistilled(source.convert(setup.num_heads, setup.budget, "input", setup.task), 1.0, setup.task)


def _deep_ensemble_of_bases(source: Source, setup: Setup) -> Contender:
    bases = [source.make_base() for _ in range(setup.num_heads)]
    return _codistilled(EnsembleNet(nn.Identity(), bases, task=setup.task), 1.0, setup.task)


def _conversion(source: Source, setup: Setup) -> EnsembleNet:
    return source.convert(setup.num_heads, setup.budget, setup.split_at, setup.task)


METHODS = {
    "base": Method("base", "the network as the user brings it", _base, several=False),
    "narrow": Method("narrower base", "one narrower network within the conversion's budget", _narrow, several=False),
    "head_alone": Method(
        "one head alone", "the conversion's trunk and one head, trained as a single network", _head_alone, several=False
    ),
    "joint": Method("joint, λ = 0", "the loss of the ensemble alone", partial(_with_weight, 0.0)),
    "independent": Method("independent heads, λ = 1", "every head's own loss", partial(_with_weight, 1.0)),
    "codistillation": Method(
        "co-distillation, λ = {weight}",
        "the ensemble's loss and λ times its divergence from the heads (this project)",
        partial(_with_weight, None),
    ),
    "one": Method("ONE", "heads learn from a gated ensemble (Lan et al. 2018); the gate stays at prediction", _one),
    "dml": Method("DML", "every head learns from every other one (Zhang et al. 2018)", _mutual),
    "okddip": Method(
        "OKDDip",
        "peers learn from their own mixes, a leader from all of them (Chen et al. 2020)",
        _okddip,
    ),
    "kdcl": Method("KDCL", "heads learn from the smallest logits of all (MinLogit; Guo et al. 2020)", _kdcl),
    "co_training": Method(
        "Divide and Co-training", "narrow networks without a trunk, kept alike (Zhao et al. 2020)", _co_training
    ),
    "deep_ensemble": Method(
        "deep ensemble, narrow", "narrow networks trained independently, within the budget", _deep_ensemble
    ),
    "deep_ensemble_of_bases": Method(
        "deep ensemble, {num_heads} bases",
        "bases trained independently, at {num_heads} times the cost: the ceiling",
        _deep_ensemble_of_bases,
    ),
}


def _temperature(task: Task) -> float:
    """ONE's and OKDDip's, who soften softmaxes by 3.

    A sigmoid softened so gives each of thousands of absent labels several percent, and matching those drowns the rest
    of the loss; docs/compare.md has what that costs.
    """
    return 1.0 if task == "multilabel" else 3.0


def _pooled(features: Tensor) -> Tensor:
    """(N, C, *) averaged to (N, C)."""
    return features.flatten(2).mean(2) if features.ndim > 2 else features


@torch.no_grad()
def _run_once(network: nn.Module, example: Tensor) -> None:
    network.eval()(example)
    network.train()
