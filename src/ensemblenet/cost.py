"""What a model costs, and may cost: parameters and multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop

from ensemblenet.errors import BudgetError
from ensemblenet.inputs import Tree, call, num_examples

__all__ = ["Budget", "Cost", "count_parameters", "measure_cost"]

_ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if _ATTENTION_ON_CPU not in flop_registry:  # PyTorch before 2.15 does not count it
    register_flop_formula(_ATTENTION_ON_CPU, get_raw=True)(sdpa_flop)  # it reads shapes already


def _recurrent_flop(x: torch.Size, weights: Iterable[torch.Size]) -> int:
    """A product of the features of every example and step, (*, I), with each matrix of weights."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


# recurrent layers that are one operator, which PyTorch does not count: an LSTM's on a CPU, any on a GPU
if torch.ops.aten.mkldnn_rnn_layer not in flop_registry:
    register_flop_formula(torch.ops.aten.mkldnn_rnn_layer)(lambda x, *weights, **_: _recurrent_flop(x, weights[:2]))
if torch.ops.aten._cudnn_rnn not in flop_registry:
    register_flop_formula(torch.ops.aten._cudnn_rnn)(lambda x, weights, *_, **__: _recurrent_flop(x, weights))


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs for one example.

    MACs are multiply-adds: half of what [`torch.utils.flop_counter`][] counts, which covers convolutions, matrix
    products and attention but no normalisation and no elementwise work.

    Example:
        >>> Cost(parameters=10, macs=100.0) + 2 * Cost(parameters=1, macs=5.0)
        Cost(parameters=12, macs=110.0)
        >>> Cost(parameters=5, macs=25.0).share_of(Cost(parameters=10, macs=100.0))
        (0.5, 0.25)
    """

    parameters: int
    macs: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs)

    def __rmul__(self, times: int) -> Cost:
        return Cost(times * self.parameters, times * self.macs)

    def share_of(self, other: Cost) -> tuple[float, float]:
        """This cost's parameters and MACs as shares of another's."""
        return _share(self.parameters, other.parameters), _share(self.macs, other.macs)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)


@dataclass(frozen=True)
class Budget:
    """The most that a multi-headed model may cost, as shares of its base.

    Attributes:
        parameters: share of the base's parameters.
        macs: share of the base's MACs.

    Example:
        >>> budget = Budget(parameters=0.5)
        >>> budget.limit(Cost(parameters=101, macs=20.0))
        Cost(parameters=50, macs=20.0)
        >>> print(budget)
        0.5 of the base's parameters and 1 of its MACs
    """

    parameters: float = 1.0
    macs: float = 1.0

    @classmethod
    def of(cls, budget: float | Budget) -> Budget:
        """A budget as a user gives it: one share for parameters and MACs, or one for each.

        Raises:
            BudgetError: a share is not a positive number.

        Example:
            >>> Budget.of(0.5)
            Budget(parameters=0.5, macs=0.5)
        """
        shares = (budget.parameters, budget.macs) if isinstance(budget, Budget) else (budget, budget)
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < math.inf:
                raise BudgetError(
                    f"budget must be a positive number (a share of the base's cost) or "
                    f"ensemblenet.Budget(parameters=, macs=), got {share!r}."
                )
        return cls(*map(float, shares))

    def limit(self, base: Cost) -> Cost:
        """The most that may be spent."""
        return Cost(math.floor(self.parameters * base.parameters), self.macs * base.macs)

    def __str__(self) -> str:
        return f"{self.parameters:g} of the base's parameters and {self.macs:g} of its MACs"


def count_parameters(module: nn.Module) -> int:
    """The number of parameter elements, each shared parameter counted once.

    Example:
        >>> count_parameters(nn.Linear(8, 4))
        36
    """
    return sum(parameter.numel() for parameter in module.parameters())


def measure_cost(module: nn.Module, example_inputs: Tree) -> Cost:
    """Measure a module by running it once in evaluation mode; its mode is put back.

    Args:
        module: a network.
        example_inputs: a tensor (N, *), a tuple of its arguments by position or a dictionary of them by name; MACs are
            divided by N.

    Example:
        >>> measure_cost(nn.Linear(8, 4), torch.zeros(2, 8))
        Cost(parameters=36, macs=32.0)
    """
    modes = {child: child.training for child in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator is not counted
    try:
        # with gradients on: the counter's hooks fail on parameters that a layer takes as inputs otherwise
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            call(module.eval(), example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, training in modes.items():
            child.training = training
    return Cost(count_parameters(module), counter.get_total_flops() / 2 / num_examples(example_inputs))
