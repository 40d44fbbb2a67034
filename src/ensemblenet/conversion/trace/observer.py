"""The observer of the ATen calls behind a network's operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ensemblenet.conversion.trace.graph import BY_HAND
from ensemblenet.conversion.trace.refusals import KEEP_WHOLE, refuse_dynamic_shape
from ensemblenet.errors import ConversionError
from ensemblenet.operations import Event, TensorRef
from ensemblenet.operations.coupling import name_of
from ensemblenet.work import Traffic, count_macs, decomposed, memory_of, traffic_of

if TYPE_CHECKING:
    from ensemblenet.conversion.trace.recorder import Recorder

__all__ = ["Observer"]


class _Origin:
    """The tensors whose values come from somewhere: by their ids, and by their memory once that was written into."""

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self.memory: set[StorageWeakRef] = set()


class Observer(TorchDispatchMode):
    """Records the ATen calls of one run.

    Attributes:
        events: the calls.
        wrote: whether the last node wrote into a tensor that was there before.
        opaque: what keeps the operation that runs out of the graph, in words.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.node: fx.Node | None = None
        self.events: list[Event] = []
        self.ids = WeakTensorKeyDictionary()
        self.num_ids = 0
        self.alive: list[Tensor] = []
        self.wrote = False
        self.opaque: str | None = None
        self._held: set[StorageWeakRef] = set()
        self._input, self._chance = _Origin(), _Origin()

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """While an operation runs, its calls are the node's."""
        self.node, self.wrote = node, False
        try:
            yield
        finally:
            self.node = None

    def ref(self, tensor: Tensor) -> TensorRef:
        """The reference to a tensor."""
        if tensor not in self.ids:
            self.ids[tensor] = self.num_ids
            self.num_ids += 1
        with torch._C.DisableTorchFunction():  # the recorder would take this for the network's own reading
            shape = tuple(tensor.shape)
        return TensorRef(self.ids[tensor], shape, self.recorder.constants.get(id(tensor)))

    def is_input(self, tensor: Tensor) -> None:
        """Note that a tensor is an input of the network."""
        self._input.ids.add(self.ref(tensor).id)

    def hold(self, tensor: Tensor) -> None:
        """Note that the graph refers to a tensor, so that writing into it is more than a node's own affair."""
        memory = memory_of(tensor)
        if memory is not None:
            self._held.add(memory)

    def twin(self, tensor: Tensor) -> Tensor:
        """Another tensor of the same values in the same memory, under the same reference."""
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            twin = torch.ops.aten.alias.default(tensor)
        self.ids[twin] = self.ids[tensor] if tensor in self.ids else self.ref(tensor).id
        return twin

    def claim_write(self, node: fx.Node, tensor: Tensor) -> None:
        """Note that a node writes into a tensor in the other mode, as `nn.Dropout(inplace=True)` does in training."""
        ref = self.ref(tensor)
        self.events.append(Event(node, torch.ops.aten.relu_.default, (ref,), {}, ref, 0.0))  # any pointwise one

    def comes_from_input(self, tensor: Tensor) -> bool:
        """Whether a tensor's values come from the network's input, by whatever way."""
        return self._comes_from(self._input, tensor)

    def comes_by_chance(self, tensor: Tensor) -> bool:
        """Whether a tensor's values come from PyTorch's random numbers."""
        return self._comes_from(self._chance, tensor)

    def _comes_from(self, origin: _Origin, tensor: Tensor) -> bool:
        return self.ids.get(tensor) in origin.ids or (bool(origin.memory) and memory_of(tensor) in origin.memory)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (out := decomposed(self, func, args, kwargs)) is not NotImplemented:
            return out
        ref_args, ref_kwargs = tree_map(self._refer, (args, kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = func(*args, **kwargs)
        ref_out = tree_map(self._refer, out)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        written = [memory_of(tensor) for tensor in _written(func, args, kwargs)]
        self.wrote = self.wrote or not self._held.isdisjoint(written)
        from_input = any(map(self.comes_from_input, inputs))
        traffic = traffic_of(func, inputs, outputs, self.comes_from_input)
        if from_input:
            self._check(func, args, kwargs)
        by_chance = torch.Tag.nondeterministic_seeded in func.tags or any(map(self.comes_by_chance, inputs))
        for origin, is_so in ((self._input, from_input), (self._chance, by_chance)):
            if is_so:
                origin.ids.update(self.ids[tensor] for tensor in outputs)
                origin.memory.update(memory for memory in written if memory is not None)
        if self.node is not None:
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.node.meta["random"] = True
            macs = count_macs(func, ref_args, ref_kwargs, ref_out)
            moved = Traffic(*(tuple(map(self.ref, tensors)) for tensors in traffic))
            self.events.append(Event(self.node, func, ref_args, ref_kwargs, ref_out, macs, moved))
        return out

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse a call on what depends on the input, where no graph can say what it does for another input."""
        if self.node is None and func is torch.ops.aten.detach.default:
            return  # autograd saves a tensor; if the network used the result, the recorder would not know it
        if self.node is None:
            reason = self.opaque or "code that PyTorch does not show"
            raise ConversionError(
                f"{self.recorder.where()} calls {func} in a way that cannot be followed: {reason}. {KEEP_WHOLE} "
                f"{BY_HAND}"
            )
        if not _has_dynamic_shape(func, args, kwargs):
            return
        if self.node.op == "call_module":  # kept whole, it does for any input what it does
            self.node.meta["keeps_sizes"] = True
        elif not _only_reads(self.node, func):
            refuse_dynamic_shape(self.recorder.where(), name_of(self.node).strip("_"))

    def _refer(self, value: Any) -> Any:
        return self.ref(value) if isinstance(value, Tensor) else value


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an ATen call writes into."""
    schema = func._schema
    if not schema.is_mutable:
        return
    values = chain(zip(schema.arguments, args, strict=False), ((a, kwargs.get(a.name)) for a in schema.arguments))
    for argument, value in values:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _has_dynamic_shape(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call's result has as many entries as its inputs' values say, or is a plain number."""
    if func is torch.ops.aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        return any(isinstance(index, Tensor) and index.dtype in masks for index in args[1])
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return func is torch.ops.aten._local_scalar_dense.default or torch.Tag.dynamic_output_shape in func.tags


def _only_reads(node: fx.Node, func: Any) -> bool:
    """Whether an operation reads a number without making a shape of it."""
    if func is not torch.ops.aten._local_scalar_dense.default:
        return False
    if name_of(node) == "one_hot":  # it checks its input
        classes = node.args[1] if len(node.args) > 1 else node.kwargs.get("num_classes", -1)
        return not (isinstance(classes, int) and classes < 0)
    if name_of(node) not in ("getitem", "setitem"):
        return False
    bounds = tree_leaves(node.args[1], is_leaf=lambda part: isinstance(part, slice))
    slices = [bound for part in bounds if isinstance(part, slice) for bound in (part.start, part.stop, part.step)]
    return not any(isinstance(bound, fx.Node) and "scalar" not in bound.meta for bound in slices)
