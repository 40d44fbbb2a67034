"""The observer of the ATen calls behind a network's operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from ensemblenet.conversion.trace.graph import BY_HAND
from ensemblenet.errors import ConversionError
from ensemblenet.operations import Event, TensorRef, refs

if TYPE_CHECKING:
    from ensemblenet.conversion.trace.recorder import Recorder

__all__ = ["Observer"]


class Observer(TorchDispatchMode):
    """Records the ATen calls of one run."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.node: fx.Node | None = None
        self.events: list[Event] = []
        self.ids = WeakTensorKeyDictionary()
        self.num_ids = 0
        self.from_input: set[int] = set()
        self.alive: list[Tensor] = []

    def ref(self, tensor: Tensor) -> TensorRef:
        """The reference to a tensor."""
        if tensor not in self.ids:
            self.ids[tensor] = self.num_ids
            self.num_ids += 1
        with torch._C.DisableTorchFunction():  # the recorder would take this for the network's own reading
            shape = tuple(tensor.shape)
        return TensorRef(self.ids[tensor], shape, self.recorder.constants.get(id(tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ref_args, ref_kwargs = tree_map(self._refer, (args, kwargs))
        out = func(*args, **kwargs)
        ref_out = tree_map(self._refer, out)
        if any(ref.id in self.from_input for ref in refs((ref_args, ref_kwargs))):
            if self.node is None:
                raise ConversionError(
                    f"{self.recorder.where()} calls {func} in a way that cannot be followed. {BY_HAND}"
                )
            self.from_input.update(ref.id for ref in refs(ref_out))
        if self.node is not None:
            if torch.Tag.nondeterministic_seeded in func.tags:
                self.node.meta["random"] = True
            macs = _count_macs(func, ref_args, ref_kwargs, ref_out)
            self.events.append(Event(self.node, func, ref_args, ref_kwargs, ref_out, macs))
        return out

    def _refer(self, value: Any) -> Any:
        return self.ref(value) if isinstance(value, Tensor) else value


def _count_macs(op: Any, args: Any, kwargs: Any, out: Any) -> float:
    count = flop_registry.get(getattr(op, "overloadpacket", None))
    return 0 if count is None else count(*_shapes(args), **_shapes(kwargs), out_val=_shapes(out)) / 2


def _shapes(value: Any) -> Any:
    """An event's arguments, with shapes in the place of tensors."""
    if isinstance(value, TensorRef):
        return torch.Size(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_shapes(part) for part in value)
    return value
