"""What a model costs, and may cost: parameters, multiply-adds, activations and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ensemblenet.errors import BudgetError
from ensemblenet.inputs import Tree, call, num_examples, tensors_in
from ensemblenet.work import Meter, without_fast_path

__all__ = ["ROOFLINE", "Budget", "Cost", "Roofline", "Shares", "count_parameters", "measure_call", "measure_cost"]

# -- costs


class Shares(NamedTuple):
    """Each part of a cost as a share of another's.

    Example:
        >>> max(Shares(parameters=0.9, macs=1.0, activations=1.4, time=1.5))
        1.5
    """

    parameters: float
    macs: float
    activations: float
    time: float


@dataclass(frozen=True)
class Cost:
    """Parameters; and for one example of a prediction MACs, activations and time.

    MACs are multiply-adds: half of what `torch.utils.flop_counter` counts, which covers convolutions, matrix
    products and attention but no normalisation and no elementwise work.

    Attributes:
        parameters: how many there are.
        macs: multiply-adds.
        activations: elements of the tensors that ATen operators write. Views are none, and neither is what is worked
            out from weights alone.
        time: what [`Roofline`][ensemblenet.cost.Roofline] estimates that an accelerator takes, in the FLOPs that it
            could do meanwhile: of use in shares, such as the time of a model against its base's.

    Example:
        >>> Cost(parameters=10, macs=100.0) + 2 * Cost(parameters=1, macs=5.0)
        Cost(parameters=12, macs=110.0, activations=0.0, time=0.0)
        >>> Cost(parameters=5, macs=25.0).shares_of(Cost(parameters=10, macs=100.0)).macs
        0.25
    """

    parameters: int
    macs: float
    activations: float = 0.0
    time: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(own + more for own, more in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: int) -> Cost:
        return Cost(*(times * own for own in astuple(self)))

    def shares_of(self, other: Cost) -> Shares:
        """This cost's parts as shares of another's."""
        return Shares(*map(_share, astuple(self), astuple(other)))

    def share_of(self, other: Cost) -> tuple[float, float]:
        """The parameters and the MACs as shares of another's: what a plain budget limits."""
        return self.shares_of(other)[:2]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)


@dataclass(frozen=True)
class Budget:
    """The most that a multi-headed model may cost, as shares of its base.

    Attributes:
        parameters: share of the base's parameters; None sets no limit, here and below.
        macs: share of the base's MACs.
        activations: share of the base's activations, see [`ensemblenet.Cost`][].
        time: share of the base's estimated time on an accelerator.
        measured: whether `time` is that of a training step, measured where the base and its example inputs are, with
            their number of examples, in the precision of an enclosing autocast; a few plans are tried.

    Example:
        >>> budget = Budget(parameters=0.5, time=1.2)
        >>> budget.limit(Cost(parameters=101, macs=20.0, activations=30.0, time=100.0))
        Cost(parameters=50, macs=20.0, activations=inf, time=120.0)
        >>> print(budget)
        0.5 of the base's parameters, 1 of its MACs and 1.2 of its time
    """

    parameters: float | None = 1.0
    macs: float | None = 1.0
    activations: float | None = None
    time: float | None = None
    measured: bool = False

    @property
    def shares(self) -> tuple[float | None, float | None, float | None, float | None]:
        """The shares, in the order of a cost's parts."""
        return self.parameters, self.macs, self.activations, self.time

    @classmethod
    def of(cls, budget: float | Budget | Mapping[str, float | None]) -> Budget:
        """A budget as a user gives it: one share for parameters and MACs, or one for each cost, perhaps by name.

        Raises:
            BudgetError: a share is not a positive number, or nothing is limited.

        Example:
            >>> Budget.of(0.5)
            Budget(parameters=0.5, macs=0.5, activations=None, time=None, measured=False)
        """
        if isinstance(budget, Mapping):
            budget = cls(**budget)  # pyright: ignore[reportArgumentType]
        shares = budget.shares if isinstance(budget, Budget) else (budget, budget)
        for share in shares:
            if isinstance(budget, Budget) and share is None:
                continue
            if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) < math.inf:
                raise BudgetError(
                    "budget must be a positive number, a share of the base's cost such as 0.95, or shares by name "
                    f"(parameters, macs, activations, time), got {share!r}."
                )
            if (share := float(share)) > _PERCENT:
                raise BudgetError(f"budget is a share of the base's cost, got {share:g}: did you mean {share / 100:g}?")
        if all(share is None for share in shares):
            raise BudgetError("budget must limit something: give one of parameters, macs, activations and time.")
        is_measured = isinstance(budget, Budget) and budget.measured
        if is_measured and shares[-1] is None:
            raise BudgetError("Budget(measured=True) needs a share of the time to measure: give time=.")
        return cls(*(None if share is None else float(share) for share in shares), measured=is_measured)

    def limit(self, base: Cost) -> Cost:
        """The most that may be spent; infinite where nothing is said, and for a time that is to be measured."""
        parameters, *others = (
            math.inf if share is None else share * whole
            for share, whole in zip(self.shares, astuple(base), strict=True)
        )
        if self.measured:
            others[-1] = math.inf
        whole = parameters if math.isinf(parameters) else math.floor(parameters)
        return Cost(whole, *others)  # pyright: ignore[reportArgumentType]

    def of_limited(self, shares: Shares, form: str = "g", of: str = "the") -> str:
        """Shares of what this budget limits, in words.

        Example:
            >>> Budget(macs=None, time=1.2).of_limited(Shares(0.5, 1.0, 2.0, 1.25), ".3f")
            '0.500 of the parameters and 1.250 of the time'
        """
        parts = [
            f"{format(share, form)} of {{}} {_WORDS.get(field.name, field.name)}"
            for field, share in zip(fields(Cost), shares, strict=True)
            if getattr(self, field.name) is not None
        ]
        owners = [of, *["its" if of != "the" else of] * (len(parts) - 1)]
        *first, last = (part.format(owner) for part, owner in zip(parts, owners, strict=True))
        return f"{', '.join(first)} and {last}" if first else last

    def __str__(self) -> str:
        return self.of_limited(Shares(*(share or 0.0 for share in self.shares)), of="the base's")


_WORDS = {"macs": "MACs"}
_PERCENT = 10.0  # a share above is one in percent


def count_parameters(module: nn.Module) -> int:
    """The number of parameter elements, each shared parameter counted once.

    Example:
        >>> count_parameters(nn.Linear(8, 4))
        36
    """
    return sum(parameter.numel() for parameter in module.parameters())


# -- the estimate of time


@dataclass(frozen=True)
class Roofline:
    """An accelerator that waits for its arithmetic or for its memory, whichever takes longer, operator by operator.

    The time of an operator is the larger of its FLOPs (two for a MAC) and what the accelerator could do while the
    operator's tensors, inputs and outputs, pass through its memory; and the time to start it. Operators that are no
    products take memory alone. docs/heads.md compares the estimate with measurements.

    S. Williams, A. Waterman, D. Patterson: "Roofline: an insightful visual performance model for multicore
    architectures", 2009.

    Attributes:
        ridge: FLOPs that it does while one byte passes. An H200 does 989 TFLOPs a second in bfloat16 and moves 4.8 TB.
        bytes: of an element.
        batch: examples that are worked on at once, for which weights are read and operators started once.
        overhead: FLOPs that it could do while it starts one operator: 4 microseconds of an H200. One image alone took
            4.3 to 8.0 microseconds for each operator, work included, in five networks replayed as CUDA graphs.

    Example:
        >>> operators = [(0.0, 1000.0, 0.0, 2.0), (0.0, 100.0, 0.0, 2.0)]
        >>> Roofline(overhead=0.0).time(operators), Roofline(overhead=128.0).time(operators)
        (1800.0, 1802.0)
    """

    ridge: float = 200.0
    bytes: float = 2.0
    batch: int = 128
    overhead: float = 4e9

    def time(self, operators: Any) -> float:
        """The estimate, in FLOPs, for operators (n, 4) as [`ensemblenet.work.work_of`][] counts them."""
        _, flops, _, moved = np.asarray(operators, dtype=float).reshape(-1, 4).T
        return float(np.maximum(flops, self.ridge * self.bytes * moved).sum()) + self.starts(operators)

    def starts(self, operators: Any) -> float:
        """The part of the estimate that goes into starting operators."""
        moved = np.asarray(operators, dtype=float).reshape(-1, 4)[:, 3]
        return int(np.count_nonzero(moved)) * self.overhead / self.batch  # views are no operators

    def cost(self, parameters: int, operators: Any) -> Cost:
        """The cost of so many parameters and such operators."""
        macs, _, written, _ = np.asarray(operators, dtype=float).reshape(-1, 4).sum(0).tolist()
        return Cost(parameters, macs, written, self.time(operators))


ROOFLINE = Roofline()


# -- measuring


def measure_call(run: Callable[[], Any], inputs: Tree, roofline: Roofline = ROOFLINE) -> Cost:
    """Measure what a call does, as the cost of something without parameters.

    Args:
        run: the call.
        inputs: the tensors that it works on, of N examples; all but the parameters is divided by N.
        roofline: the accelerator whose time is estimated.

    Example:
        >>> x = torch.ones(2, 8)
        >>> measure_call(lambda: x.view(4, 4).relu(), x).activations
        8.0
    """
    # with gradients on, as a conversion traces: without, some functions call other operators
    with torch.enable_grad(), Meter(tensors_in(inputs), num_examples(inputs), roofline.batch) as meter:
        run()
    return roofline.cost(0, meter.calls)


def measure_cost(module: nn.Module, example_inputs: Tree, roofline: Roofline = ROOFLINE) -> Cost:
    """Measure a module by running it once in evaluation mode; its mode is put back.

    Args:
        module: a network.
        example_inputs: a tensor (N, *), a tuple of its arguments by position or a dictionary of them by name; all but
            the parameters is divided by N.
        roofline: the accelerator whose time is estimated.

    Example:
        >>> cost = measure_cost(nn.Linear(8, 4), torch.zeros(2, 8))
        >>> cost.parameters, cost.macs, cost.activations
        (36, 32.0, 4.0)
    """
    modes = {child: child.training for child in module.modules()}
    try:
        with without_fast_path():
            measured = measure_call(lambda: call(module.eval(), example_inputs), example_inputs, roofline)
    finally:
        for child, training in modes.items():
            child.training = training
    return replace(measured, parameters=count_parameters(module))
