"""Record the graph of one run of a network."""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Sequence
from types import FrameType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ensemblenet.conversion.trace.calls import (
    PLAIN,
    fx_target,
    is_atom,
    may_write,
    named_arguments,
    parts_of,
    works_in_place,
)
from ensemblenet.conversion.trace.chance import CHANCE, HostRandomness
from ensemblenet.conversion.trace.graph import BY_HAND, Trace, drop_unused
from ensemblenet.conversion.trace.lines import user_line
from ensemblenet.conversion.trace.numbers import followed_functions, node_of_size, traced_number
from ensemblenet.conversion.trace.observer import Observer
from ensemblenet.conversion.trace.refusals import (
    KEEP_WHOLE,
    refuse_backward_hooks,
    refuse_function,
    refuse_packed,
    refuse_scripted_weights,
)
from ensemblenet.conversion.trace.watch import Contexts, watching
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import Inputs, call
from ensemblenet.operations import TensorRef, operation_of
from ensemblenet.operations.contexts import InContext

__all__ = ["Recorder"]


# Tensor methods that hand a value to Python: on what depends on the input, that value would be frozen.
_VALUE_READERS = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__contains__",
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero",
}  # fmt: skip
_QUIET_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


class _OpaqueError(Exception):
    """An argument that a graph cannot hold, such as an array of another library."""


class Recorder(TorchFunctionMode):
    """Records the graph of one run."""

    def __init__(self, root: nn.Module, leaves: set[type[nn.Module]], device: torch.device) -> None:
        super().__init__()
        self.root = root
        self.leaves = leaves
        self.device = device
        self.graph = fx.Graph()
        self.names = {module: name for name, module in root.named_modules()}
        self.constants = {id(p): name for name, p in (*root.named_parameters(), *root.named_buffers())}
        self.nodes = WeakTensorKeyDictionary()
        self.attributes: dict[str, fx.Node] = {}
        self.num_constants = 0
        self.stack: list[str] = []
        self.stream: list[fx.Node | str] = []  # nodes, and the modules entered ("+name") and left ("-name")
        self.paused = False
        self.contexts = Contexts(device.type)
        self.chance = HostRandomness(root)
        self.notes: list[str] = []
        self.assigned: str | None = None  # a module that has assigned to a buffer of its own
        self.left_behind: dict[int, str] = {}  # tensors that an earlier run assigned to modules, and where
        self.whole_layers: set[nn.Module] = set()
        self.in_evaluation: set[str] = set()  # the layers that were called in evaluation mode
        self.observer = Observer(self)
        self.aliases: dict[fx.Node, list[str]] = {}
        self.refs: dict[fx.Node, TensorRef] = {}
        self.returned: Any = None

    # -- running

    def run(self, inputs: Inputs, tensors: list[Tensor]) -> None:
        """Record one forward pass."""
        arguments = inputs.build([tensor.clone() for tensor in tensors])
        for name, value in named_arguments(self.root, arguments):
            self._input(self.graph.placeholder(name), value)
        original = nn.Module.__call__
        recorder = self

        def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._call_module(MethodType(original, module), module, args, kwargs)

        nn.Module.__call__ = call_module
        try:
            with self, self.observer, watching(self), followed_functions():
                self.returned = call(self.root, arguments)
        finally:
            nn.Module.__call__ = original
        self.chance.look()

    def _input(self, node: fx.Node, value: Any) -> None:
        """Remember the node of each tensor of an argument."""
        if isinstance(value, Tensor):
            node.meta["input"] = True
            self._keep(node, value)
            self.observer.is_input(value)
            return
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            self._input(self.graph.call_function(operator.getitem, (node, key)), part)

    @property
    def _last_input(self) -> fx.Node:
        """The last node of the inputs, behind which constants are read."""
        return [node for node in self.graph.nodes if "input" in node.meta][-1]

    def finish(self, outputs: Sequence[Tensor]) -> None:
        """Write what the graph returns: one tensor, or a tuple."""
        nodes = tuple(self.nodes[tensor] for tensor in outputs)
        self.stream.append(self.graph.output(nodes[0] if len(nodes) == 1 else nodes))
        drop_unused(self.graph)  # now: what one mode does in vain is no difference between the modes
        alive = set(self.graph.nodes)
        self.stream = [part for part in self.stream if isinstance(part, str) or part in alive]

    def trace(self, module: nn.Module, inputs: Inputs, tensors: list[Tensor], notes: list[str]) -> Trace:
        """The trace of this run."""
        alive = set(self.graph.nodes)
        events = [event for event in self.observer.events if event.node in alive]
        aliases = {node: names for node, names in self.aliases.items() if node in alive}
        return Trace(module, self.graph, events, inputs, tensors, aliases, self.refs, notes)

    # -- modules

    def _call_module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self.names.get(module)
        if name is None or self.paused:
            return call(*args, **kwargs)
        self.stack.append(name)
        self.stream.append("+" + name)
        if name and self._is_leaf(module):
            self.whole_layers.update(module.modules())
            if not module.training:
                self.in_evaluation.add(name)
            with self.chance.of_others():
                out = self._call(lambda: call(*args, **kwargs), "call_module", name, args, kwargs)
        else:
            refuse_backward_hooks(module, self.where())
            out = call(*args, **kwargs)
        if isinstance(out, Tensor) and out in self.nodes and name:
            self.aliases.setdefault(self.nodes[out], []).append(name)
        self.stream.append("-" + name)
        self.stack.pop()
        return out

    def _is_leaf(self, module: nn.Module) -> bool:
        if operation_of(type(module)).is_whole or type(module) in self.leaves:
            return True
        if isinstance(module, torch.jit.ScriptModule):
            refuse_scripted_weights(module, self.where())
            return True
        return type(module).__module__.startswith("torch.nn.") and not any(module.children())

    def whole(self, function: InContext, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """Record a call that is no torch function as one node of a function that does the same."""
        return run() if self.paused else self._call(run, "call_function", function, args, kwargs)

    def length(self, tensor: Tensor) -> int:
        """The length of a tensor, as an integer that remembers where it comes from."""
        return self._sizes(tensor)[0] if not self.paused else int(tensor.shape[0])

    # -- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read_property(func, args)
        if name == "_set_grad_enabled":
            self.contexts.gradients = args[0]
            return func(*args, **kwargs)
        if name == "size":
            sizes = self._sizes(args[0])
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return sizes if dim is None else sizes[dim]
        if name == "numel":
            return math.prod(self._sizes(args[0]))  # `torch.Size.numel` would give a plain number
        if name == "__iter__":
            return iter(self._function(torch.Tensor.unbind, "unbind", args[:1], {}))
        refuse_function(func, name, self.where)
        if name in _VALUE_READERS:
            self._refuse_reading(name, args)
        return self._function(func, name, args, kwargs)

    def _read_property(self, func: Any, args: Any) -> Any:
        name = func.__self__.__name__
        if name == "shape":
            return self._sizes(args[0])
        if name not in _QUIET_PROPERTIES:
            return func(*args)
        return self._call(lambda: func(*args), "call_function", getattr, (args[0], name), {})

    def _refuse_reading(self, name: str, args: Any) -> None:
        """Refuse to hand a value to Python that will be another in another run."""
        for arg in args:
            if not isinstance(arg, Tensor):
                continue
            if self.observer.comes_from_input(arg):
                raise ConversionError(
                    f"{self.where()} reads the values of a tensor ({name}), so the network's course depends on its "
                    f"input. {KEEP_WHOLE} {BY_HAND}"
                )
            if self.observer.comes_by_chance(arg) and not _is_certain(self.nodes.get(arg)):
                raise ConversionError(
                    f"{self.where()} reads random numbers ({name}), so the network's course depends on chance. "
                    f"{CHANCE} {KEEP_WHOLE}"
                )

    def _function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        op, target = fx_target(func, name)
        return self._call(lambda: func(*args, **kwargs), op, target, args, kwargs)

    def _sizes(self, tensor: Tensor) -> torch.Size:
        """The shape, as integers that remember where they come from."""
        if tensor not in self.nodes:
            return tensor.shape
        sizes = []
        for dim, size in enumerate(tensor.shape):
            node = self.graph.call_method("size", (self.nodes[tensor], dim))
            sizes.append(traced_number(size, node))
        return torch.Size(sizes)

    def _device_node(self) -> fx.Node:
        """A node that reads the input's device, in the place of the device that the network was traced on."""
        node = self.graph.call_function(getattr, (self._last_input, "device"))
        node.meta["scalar"] = self.device
        return node

    def _call(self, run: Callable[[], Any], op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation and write its node, unless no tensor comes out."""
        refuse_packed(args, self.where)
        try:
            node_args = tree_map(self._argument, tuple(args), is_leaf=is_atom)
            node_kwargs = tree_map(self._argument, dict(kwargs), is_leaf=is_atom)
        except _OpaqueError as error:
            # its result is a constant, unless it depends on the input: then the observer objects
            self.observer.opaque = f"an argument of the type {error}"
            out = run()
            self.observer.opaque = None
            return out
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        node.meta.update(line=self.where(), stack=tuple(self.stack), context=self.contexts.now())
        self.paused = True
        try:
            with self.observer.at(node):
                out = run()
        finally:
            self.paused = False
        if target is operator.setitem or works_in_place(op, target) or self.observer.wrote:
            node.meta["effect"] = True
        elif not may_write(self.root, op, target, kwargs):
            out = self._apart(out, (args, kwargs))
        elif isinstance(out, Tensor):
            self.observer.claim_write(node, out)
        if target is not operator.setitem and not self._keep_all(node, out):
            self._refuse_unknown(node, out)
            self.graph.erase_node(node)
            return out
        self.stream.append(node)
        return out

    def _apart(self, out: Any, arguments: Any) -> Any:
        """A result that is the very tensor that went in, as a tensor of its own: in the other mode it may be one."""
        if not isinstance(out, Tensor) or not any(out is leaf for leaf in tree_leaves(arguments)):
            return out
        return self.observer.twin(out)

    def _refuse_unknown(self, node: fx.Node, out: Any) -> None:
        """Refuse what a layer that is kept whole returns, where it can hold a tensor that nobody would find."""
        if node.op == "call_module" and out is not None:
            raise ConversionError(
                f"{self.where()} is kept whole and returns {type(out).__name__}, which a graph cannot take apart; let "
                f"it return a tensor, or tensors in a tuple, a dictionary or a dataclass. {BY_HAND}"
            )

    def _keep_all(self, node: fx.Node, out: Any) -> bool:
        """Remember which node made each tensor of an output; False if there is no tensor in it."""
        if isinstance(out, Tensor):
            self._keep(node, out)
            return True
        kept = False
        for take, key, part in parts_of(out):
            child = self.graph.call_function(take, (node, key))
            child.meta.update(line=node.meta["line"], stack=node.meta["stack"])
            if self._keep_all(child, part):
                kept = True
            else:
                self.graph.erase_node(child)
        return kept

    def _keep(self, node: fx.Node, tensor: Tensor) -> None:
        self.nodes[tensor] = node
        self.refs[node] = self.observer.ref(tensor)
        self.observer.hold(tensor)

    def _argument(self, value: Any) -> Any:
        """A value as the graph refers to it."""
        if isinstance(value, Tensor):
            return self.nodes[value] if value in self.nodes else self._attribute(value)
        if (node := node_of_size(value)) is not None:
            return node if node.graph is self.graph else node.meta["scalar"]  # of another run, out of some cache
        if isinstance(value, np.generic):
            return value.item()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
            parts = {name: tree_map(self._argument, part, is_leaf=is_atom) for name, part in fields.items()}
            return self.graph.call_function(type(value), (), parts)
        if isinstance(value, slice):
            return slice(*(self._argument(bound) for bound in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Size):
            return tuple(self._argument(size) for size in value)
        if isinstance(value, torch.device) and value == self.device:
            return self._device_node()
        if value is None or value is Ellipsis or isinstance(value, PLAIN):
            return value
        raise _OpaqueError(type(value).__name__)

    def _attribute(self, tensor: Tensor) -> fx.Node:
        """The node of a parameter, a buffer, or a tensor that existed before the run."""
        name = self.constants.get(id(tensor))
        if id(tensor) in self.left_behind:
            raise ConversionError(
                f"{self.where()} reads {self.left_behind[id(tensor)]}, which an earlier forward pass has assigned, so "
                f"its output depends on earlier inputs. {KEEP_WHOLE} {BY_HAND}"
            )
        if self.observer.comes_from_input(tensor) and name is None:
            raise ConversionError(
                f"{self.where()} uses a tensor of the input that it got in a way that cannot be followed. {KEEP_WHOLE} "
                f"{BY_HAND}"
            )
        if name is None:
            name = f"_constant{self.num_constants}"
            self.num_constants += 1
            setattr(self.root, name, nn.Buffer(tensor.detach().clone(), persistent=False))
            # The name holds for the original too: it may be read again.
            self.constants[id(tensor)] = name
            self.observer.alive.append(tensor)
        self.observer.hold(tensor)
        if name not in self.attributes:
            with self.graph.inserting_after(self._last_input):
                self.attributes[name] = self.graph.get_attr(name)
            self.attributes[name].meta["constant"] = True
            self.refs[self.attributes[name]] = self.observer.ref(tensor)
        return self.attributes[name]

    # -- errors

    def label(self) -> str:
        """The module that runs or has failed."""
        name = self.stack[-1] if self.stack else ""
        module = type(self.root.get_submodule(name)).__name__
        return f"{name} ({module})" if name else module

    def where(self, place: Exception | FrameType | None = None) -> str:
        """The module that runs or has failed, and the user's line in it: of an error, of a frame, or of now."""
        line = user_line(place or sys._getframe(1), Recorder.run.__code__)
        return f"{self.label()} at {line}" if line else self.label()


def _is_certain(node: fx.Node | None) -> bool:
    """Whether a comparison of `torch.rand` comes out the same for all its values, such as with a rate of zero."""
    if node is None or node.target not in ("lt", "le", "gt", "ge", "__lt__", "__le__", "__gt__", "__ge__"):
        return False
    drawn, bound = node.args
    is_uniform = isinstance(drawn, fx.Node) and drawn.target is torch.rand
    return is_uniform and isinstance(bound, (int, float)) and not 0 < bound < 1
