"""What one ATen call does: its multiply-adds, and the tensors that it moves through memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop

__all__ = [
    "Meter",
    "Traffic",
    "count_macs",
    "decomposed",
    "memory_of",
    "sum_work",
    "traffic_of",
    "without_fast_path",
    "work_of",
]

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


class Traffic(NamedTuple):
    """The tensors that pass through memory for one ATen call.

    Attributes:
        written: its outputs, where they come from the network's input.
        read: inputs that come from the network's input.
        shared: tensors that serve a whole batch: weights, and what is worked out from them alone.
    """

    written: tuple[Any, ...] = ()
    read: tuple[Any, ...] = ()
    shared: tuple[Any, ...] = ()


# these return views that their schemas do not call so, or memory that nobody has written
_MOVE_NOTHING = {
    "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip
# their outputs behind the third are room for a backward pass, in a form of their own
_RECURRENT = {"mkldnn_rnn_layer", "_cudnn_rnn"}


def traffic_of(op: Any, inputs: list[Any], outputs: list[Any], is_example: Callable[[Any], bool]) -> Traffic:
    """What an ATen call reads and writes; nothing if its outputs are views of its inputs.

    Args:
        op: the operator.
        inputs: its tensors.
        outputs: of it.
        is_example: whether a tensor comes from the network's input.
    """
    returned = op._schema.returns
    is_view = bool(returned) and all(one.alias_info is not None and not one.alias_info.is_write for one in returned)
    name = op._schema.name.split("::")[-1]
    if is_view or torch.Tag.inplace_view in op.tags or name in _MOVE_NOTHING:
        return Traffic()
    if name in _RECURRENT:
        outputs = outputs[:3]
    read = tuple(tensor for tensor in inputs if is_example(tensor))
    if not read:
        return Traffic(shared=(*inputs, *outputs))
    return Traffic(tuple(outputs), read, tuple(tensor for tensor in inputs if not is_example(tensor)))


def count_macs(op: Any, args: Any, kwargs: Any, out: Any) -> float:
    """The multiply-adds of an ATen call; tensors may be anything that has a shape."""
    count = flop_registry.get(getattr(op, "overloadpacket", None))
    return 0.0 if count is None else count(*_shapes(args), **_shapes(kwargs), out_val=_shapes(out)) / 2


def _shapes(value: Any) -> Any:
    """An operator's arguments, with shapes in the place of tensors."""
    if hasattr(value, "shape"):
        return torch.Size(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_shapes(part) for part in value)
    return value


def work_of(macs: float, traffic: Traffic, num_examples: int, batch: int) -> Iterator[tuple[int, float, Any]]:
    """What an ATen call adds to each of four numbers of an example: MACs, FLOPs, elements written, elements moved.

    Args:
        macs: of N examples.
        traffic: of N examples.
        num_examples: N.
        batch: examples that share what comes from weights alone.

    Yields:
        Which number, a factor, and what it multiplies: a tensor's elements, or the call's MACs where that is None.

    Example:
        >>> list(work_of(64.0, Traffic(shared=("weight",), read=("x",), written=("y",)), 2, 128))[:2]
        [(0, 0.5, None), (1, 1.0, None)]
    """
    each = 1 / num_examples
    if macs:
        yield 0, each, None
        yield 1, 2 * (each if traffic.read else 1 / batch), None
    for tensor in traffic.written:
        yield 2, each, tensor
    for tensor in (*traffic.written, *traffic.read):
        yield 3, each, tensor
    for tensor in traffic.shared:
        yield 3, 1 / batch, tensor


def sum_work(macs: float, traffic: Traffic, num_examples: int, batch: int) -> list[float]:
    """The four numbers of an ATen call, see [`ensemblenet.work.work_of`][]."""
    numbers = [0.0] * 4
    for number, factor, tensor in work_of(macs, traffic, num_examples, batch):
        numbers[number] += factor * (macs if tensor is None else math.prod(tensor.shape))
    return numbers


def memory_of(tensor: Tensor) -> StorageWeakRef | None:
    """A tensor's memory; a weak reference to it, so that no later tensor is taken for this one."""
    with torch._C.DisableTorchFunction():
        try:
            return StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # sparse tensors, and those inside of `vmap`
            return None


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Off with the operator that hides a whole encoder layer: it is not counted, and it writes zeros where there is
    padding, for it is for evaluation only, so a network gives other values there in training mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def decomposed(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives, taken apart under a mode, in inference mode, where operators come whole.

    Returns:
        The result; `NotImplemented` where the operator is no composite one, or has been taken apart already.
    """
    if not torch.is_inference_mode_enabled():
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


class Meter(TorchDispatchMode):
    """Counts what each ATen call of a network does.

    Args:
        inputs: the network's input tensors.
        num_examples: N.
        batch: see [`ensemblenet.work.work_of`][].

    Attributes:
        calls: the four numbers of each.

    Example:
        >>> x = torch.ones(2, 8)
        >>> with Meter([x], num_examples=2, batch=128) as meter:
        ...     _ = x.view(4, 4).relu()
        >>> meter.calls
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 8.0, 16.0]]
    """

    def __init__(self, inputs: list[Tensor], num_examples: int, batch: int) -> None:
        super().__init__()
        self.num_examples = num_examples
        self.batch = batch
        self.calls: list[list[float]] = []
        self._from_input = {memory_of(tensor) for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (out := decomposed(self, func, args, kwargs)) is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        inputs, outputs = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in ((args, kwargs), out)
        )
        traffic = traffic_of(func, inputs, outputs, self._is_example)
        if any(map(self._is_example, inputs)):
            self._from_input.update(map(memory_of, outputs))
        self.calls.append(sum_work(count_macs(func, args, kwargs, out), traffic, self.num_examples, self.batch))
        return out

    def _is_example(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self._from_input
