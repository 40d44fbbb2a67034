"""Trace a network into a graph of its own modules, by running it once in each mode.

The network runs on real tensors, so whatever its Python code does (checks of types, loops over blocks, branches
on shapes, helper functions, dictionaries) simply happens. Three observers write down what matters:

- calls of leaf modules and of torch functions become the nodes of a `torch.fx` graph, with the modules' names;
- integers read from a tensor's shape become nodes too, so the batch size stays free;
- the ATen operators behind every node become its `Event`s, from which `axes.py` learns which sizes are coupled.

A leaf module is called, not opened: what it does in training mode it still does after conversion.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from ensemblenet.cost import Cost
from ensemblenet.errors import ConversionError

__all__ = [
    "ByMode",
    "Event",
    "GraphRunner",
    "NodeError",
    "TensorRef",
    "Trace",
    "depends_on_input",
    "keeping_state",
    "refs",
    "trace",
]

BY_MODE = "_by_mode"
BY_HAND = "A network that cannot be traced can be given by hand: ensemblenet.EnsembleNet(trunk, heads)."

# Modules whose subclasses stay whole: they own parameters or randomness that depend on the mode.
_LEAVES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.modules.dropout._DropoutNd,
    nn.PReLU,
    nn.RReLU,
)


class TensorRef(NamedTuple):
    """A tensor as an event names it; `source` is the name of the parameter or buffer that it is, if any."""

    id: int
    shape: tuple[int, ...]
    source: str | None


class Event(NamedTuple):
    """One ATen call, with every tensor replaced by its `TensorRef`."""

    node: fx.Node
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    macs: float  # multiply-adds, as torch.utils.flop_counter counts them, halved


@dataclass
class Trace:
    """What a traced network is: its graph, and what ran behind every node.

    Attributes:
        module: a private copy of the base, whose modules the graph names.
        graph: the graph, for both modes.
        events: the ATen calls in order.
        input: the example input, of shape (N, *).
        aliases: for a node, the names of the modules whose output it is, innermost first.
        refs: for a node of one tensor, that tensor.
        notes: what the user should know about the conversion.
    """

    module: nn.Module
    graph: fx.Graph
    events: list[Event]
    input: Tensor
    aliases: dict[fx.Node, list[str]]
    refs: dict[fx.Node, TensorRef]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def macs(self) -> dict[fx.Node, float]:
        """By node: its multiply-adds for one example."""
        macs: dict[fx.Node, float] = {}
        for event in self.events:
            macs[event.node] = macs.get(event.node, 0.0) + event.macs / len(self.input)
        return macs

    @cached_property
    def parameters(self) -> dict[fx.Node, dict[str, nn.Parameter]]:
        """By node: the parameters that it reads, by their names in the base."""
        found: dict[fx.Node, dict[str, nn.Parameter]] = {}
        for node in self.graph.nodes:
            name = str(node.target)
            if node.op == "call_module":
                layer = self.module.get_submodule(name)
                found[node] = {f"{name}.{key}": parameter for key, parameter in layer.named_parameters()}
            elif node.op == "get_attr" and isinstance(tensor := self.tensor(name), nn.Parameter):
                found[node] = {name: tensor}
        return found

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name."""
        owner, _, attribute = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), attribute)

    def cost(self, nodes: Iterable[fx.Node]) -> Cost:
        """What a part of the base costs."""
        nodes = set(nodes)
        sizes = {id(p): p.numel() for node in nodes for p in self.parameters.get(node, {}).values()}
        return Cost(sum(sizes.values()), sum(self.macs.get(node, 0.0) for node in nodes))

    @property
    def placeholder(self) -> fx.Node:
        """The node of the network's input."""
        return next(iter(self.graph.nodes))

    @property
    def output(self) -> fx.Node:
        """The node whose value the network returns."""
        node = next(iter(reversed(self.graph.nodes))).args[0]
        assert isinstance(node, fx.Node)
        return node


def trace(base: nn.Module, example_input: Tensor) -> Trace:
    """Trace a base in training and evaluation mode; the base and the random state are left as they were.

    Args:
        base: a network of one tensor in and one tensor out.
        example_input: its input, of shape (N, *).

    Raises:
        ConversionError: the base fails on the input, or does what a graph cannot say.

    Example:
        >>> traced = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(3, 4))
        >>> [node.target for node in traced.graph.nodes]
        ['input', '0', '1', '2', 'output']
    """
    try:
        module = copy.deepcopy(base)
    except Exception as error:
        raise ConversionError(f"The base cannot be copied: {type(error).__name__}: {error}. {BY_HAND}") from error
    if len(example_input) == 1:  # with two examples, sizes that follow the batch tell themselves from sizes of one
        _record(module, example_input, set(), training=True)
        example_input = example_input.repeat_interleave(2, dim=0)
    x = example_input[:2]
    leaves: set[type[nn.Module]] = set()
    tried: set[str] = set()
    notes: list[str] = []
    expected: Tensor | None = None
    while True:
        evaluation = _record(module, x, leaves, training=False)
        expected = evaluation.output if expected is None else expected  # of the base as it came
        training = _record(module, x, leaves, training=True)
        if not evaluation.returns_tensor:
            raise ConversionError(
                f"The base must return one tensor of shape (N, ...), got {evaluation.returned}. {BY_HAND}"
            )
        if not training.returns_tensor:
            notes = [f"The base returns {training.returned} in training mode; only its prediction is kept."]
            break
        owner = _merge_modes(evaluation, training)
        if owner is None:
            break
        if owner in tried or next(module.get_submodule(owner).parameters(), None) is None:
            if owner == "" or type(module.get_submodule(owner)) in leaves:
                raise ConversionError(
                    f"{type(module.get_submodule(owner)).__name__}.forward runs different operations in training and "
                    f"evaluation mode; move what differs into a module of its own. {BY_HAND}"
                )
            leaves.add(type(module.get_submodule(owner)))
        tried.add(owner)  # the first time may have been the filling of a cache
    module.add_module(BY_MODE, ByMode())  # only now: a Sequential would call it
    traced = evaluation.trace(module, x, notes)
    assert expected is not None
    _check_batch_size(traced, expected)
    return traced


def _record(module: nn.Module, x: Tensor, leaves: set[type[nn.Module]], *, training: bool) -> _Recorder:
    """Run the module once under all observers."""
    recorder = _Recorder(module, x, leaves)
    module.train(training)
    mode = "training" if training else "evaluation"
    what = f"The base's forward pass in {mode} mode, on an input of shape {tuple(x.shape)},"
    with torch.no_grad(), keeping_state(module, x):
        try:
            recorder.run(x)
        except ConversionError:
            raise
        except Exception as error:
            hint = ""
            if training and len(x) == 1:
                hint = " With batch size 1 some layers cannot train: pass example_inputs with at least 2 examples."
            raise ConversionError(
                f"{what} failed in {recorder.where(error)}: {type(error).__name__}: {error}.{hint}"
            ) from error
    return recorder


@contextmanager
def keeping_state(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Put buffers and the random state back after a run in training mode."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for buffer, value in before:  # into the old tensors: a new one in their place is a cache that the run filled
            buffer.copy_(value)


class _TracedInt(int):
    """An integer read from a shape, with the node that computes it."""

    node: fx.Node

    def __new__(cls, value: int, node: fx.Node) -> _TracedInt:
        self = super().__new__(cls, value)
        self.node = node
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _traced_operator(name: str) -> Callable[..., Any]:
    function = getattr(operator, name.replace("__r", "__") if name in _REFLECTED else name)

    def apply(self: _TracedInt, *others: Any) -> Any:
        plain = [int(other) if isinstance(other, _TracedInt) else other for other in others]
        value = getattr(int, name)(int(self), *plain)
        if type(value) is not int:
            return value
        operands = [_scalar_argument(operand) for operand in (self, *others)]
        if name in _REFLECTED:
            operands.reverse()
        node = self.node.graph.call_function(function, tuple(operands))
        node.meta["scalar"] = value
        return _TracedInt(value, node)

    return apply


def _scalar_argument(value: Any) -> Any:
    return value.node if isinstance(value, _TracedInt) else value


_REFLECTED = {"__radd__", "__rsub__", "__rmul__", "__rfloordiv__", "__rmod__"}
for _name in ["__add__", "__sub__", "__mul__", "__floordiv__", "__mod__", "__neg__", *_REFLECTED]:
    setattr(_TracedInt, _name, _traced_operator(_name))

# Tensor methods that hand a value to Python: on what depends on the input, that value would be frozen.
_VALUE_READERS = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__contains__",
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero",
}  # fmt: skip
_QUIET_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


_PLAIN = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type,
)  # fmt: skip


class _OpaqueError(Exception):
    """An argument that a graph cannot hold, such as an array of another library."""


class _Recorder(TorchFunctionMode):
    """Writes the graph of one run."""

    def __init__(self, root: nn.Module, x: Tensor, leaves: set[type[nn.Module]]) -> None:
        super().__init__()
        self.root = root
        self.leaves = leaves
        self.device = x.device
        self.graph = fx.Graph()
        self.names = {module: name for name, module in root.named_modules()}
        self.constants = {id(p): name for name, p in (*root.named_parameters(), *root.named_buffers())}
        self.nodes = WeakTensorKeyDictionary()
        self.attributes: dict[str, fx.Node] = {}
        self.num_constants = 0
        self.stack: list[str] = []
        self.stream: list[fx.Node | str] = []  # nodes, and the modules entered ("+name") and left ("-name")
        self.paused = False
        self.observer = _Observer(self)
        self.aliases: dict[fx.Node, list[str]] = {}
        self.refs: dict[fx.Node, TensorRef] = {}
        self.returned = "nothing"
        self.output: Any = None
        self.returns_tensor = False

    # -- running

    def run(self, x: Tensor) -> None:
        """Record one forward pass."""
        name = _input_name(self.root)
        node = self.graph.placeholder(name)
        x = x.clone()
        self._keep(node, x)
        original = nn.Module.__call__
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._call_module(MethodType(original, module), module, args, kwargs)

        nn.Module.__call__ = call
        try:
            with self, self.observer:
                out = self.root(x)
        finally:
            nn.Module.__call__ = original
        self.output = out
        self.returned = _describe(out)
        self.returns_tensor = isinstance(out, Tensor) and out in self.nodes
        self.graph.output(self._argument(out) if self.returns_tensor else None)

    def trace(self, module: nn.Module, x: Tensor, notes: list[str]) -> Trace:
        """The trace of this run."""
        _drop_unused(self.graph)
        alive = set(self.graph.nodes)
        events = [event for event in self.observer.events if event.node in alive]
        aliases = {node: names for node, names in self.aliases.items() if node in alive}
        return Trace(module, self.graph, events, x, aliases, self.refs, notes)

    # -- modules

    def _call_module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = self.names.get(module)
        if name is None or self.paused:
            return call(*args, **kwargs)
        self.stack.append(name)
        self.stream.append("+" + name)
        if name and self._is_leaf(module):
            out = self._call(lambda: call(*args, **kwargs), "call_module", name, args, kwargs)
        else:
            out = call(*args, **kwargs)
        if isinstance(out, Tensor) and out in self.nodes and name:
            self.aliases.setdefault(self.nodes[out], []).append(name)
        self.stream.append("-" + name)
        self.stack.pop()
        return out

    def _is_leaf(self, module: nn.Module) -> bool:
        if isinstance(module, _LEAVES) or type(module) in self.leaves:
            return True
        return type(module).__module__.startswith("torch.nn.") and not any(module.children())

    # -- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read_property(func, args)
        if name == "size":
            sizes = self._sizes(args[0])
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return sizes if dim is None else sizes[dim]
        if name == "numel":
            return self._sizes(args[0]).numel()
        if name == "__iter__":
            return iter(self._function(torch.Tensor.unbind, "unbind", args[:1], {}))
        if name in _VALUE_READERS and any(self._depends_on_input(arg) for arg in args):
            raise ConversionError(
                f"{self.where()} reads the values of a tensor ({name}), so the network's course depends on its "
                f"input. {BY_HAND}"
            )
        return self._function(func, name, args, kwargs)

    def _read_property(self, func: Any, args: Any) -> Any:
        name = func.__self__.__name__
        if name == "shape":
            return self._sizes(args[0])
        if name not in _QUIET_PROPERTIES:
            return func(*args)
        return self._call(lambda: func(*args), "call_function", getattr, (args[0], name), {})

    def _function(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        op, target = _fx_target(func, name)
        return self._call(lambda: func(*args, **kwargs), op, target, args, kwargs)

    def _sizes(self, tensor: Tensor) -> torch.Size:
        """The shape, as integers that remember where they come from."""
        if tensor not in self.nodes:
            return tensor.shape
        sizes = []
        for dim, size in enumerate(tensor.shape):
            node = self.graph.call_method("size", (self.nodes[tensor], dim))
            node.meta["scalar"] = size
            sizes.append(_TracedInt(size, node))
        return torch.Size(sizes)

    def _device_node(self) -> fx.Node:
        """The node of the input's device, wherever the network names the device that it was traced on."""
        placeholder = next(iter(self.graph.nodes))
        node = self.graph.call_function(getattr, (placeholder, "device"))
        node.meta["scalar"] = self.device
        return node

    def _call(self, run: Callable[[], Any], op: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation and write its node, unless no tensor comes out."""
        try:
            node_args = tree_map(self._argument, tuple(args), is_leaf=_is_atom)
            node_kwargs = tree_map(self._argument, dict(kwargs), is_leaf=_is_atom)
        except _OpaqueError:
            return run()  # the observer objects if it depends on the input; else its result is a constant
        node = self.graph.create_node(op, target, node_args, node_kwargs)
        node.meta["line"] = self.where()
        node.meta["stack"] = tuple(self.stack)
        self.paused, self.observer.node = True, node
        try:
            out = run()
        finally:
            self.paused, self.observer.node = False, None
        if target is operator.setitem or _works_in_place(op, target):
            node.meta["effect"] = True
        if target is not operator.setitem and not self._keep_all(node, out):
            self.graph.erase_node(node)
            return out
        self.stream.append(node)
        return out

    def _keep_all(self, node: fx.Node, out: Any) -> bool:
        """Remember which node made each tensor of an output; False if there is no tensor in it."""
        if isinstance(out, Tensor):
            self._keep(node, out)
            return True
        if not isinstance(out, (tuple, list)) or not any(isinstance(part, (Tensor, tuple, list)) for part in out):
            return False
        kept = False
        for index, part in enumerate(out):
            child = self.graph.call_function(operator.getitem, (node, index))
            child.meta.update(line=node.meta["line"], stack=node.meta["stack"])
            if self._keep_all(child, part):
                kept = True
            else:
                self.graph.erase_node(child)
        return kept

    def _keep(self, node: fx.Node, tensor: Tensor) -> None:
        self.nodes[tensor] = node
        self.refs[node] = self.observer.ref(tensor)

    def _argument(self, value: Any) -> Any:
        """A value as the graph refers to it."""
        if isinstance(value, Tensor):
            return self.nodes[value] if value in self.nodes else self._attribute(value)
        if isinstance(value, _TracedInt):
            return value.node
        if isinstance(value, slice):
            return slice(*(self._argument(bound) for bound in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Size):
            return tuple(self._argument(size) for size in value)
        if isinstance(value, torch.device) and value == self.device:
            return self._device_node()
        if value is None or value is Ellipsis or isinstance(value, _PLAIN):
            return value
        raise _OpaqueError

    def _attribute(self, tensor: Tensor) -> fx.Node:
        """The node of a parameter, a buffer, or a tensor that existed before the run."""
        name = self.constants.get(id(tensor))
        if name is None:
            name = f"_constant{self.num_constants}"
            self.num_constants += 1
            setattr(self.root, name, nn.Buffer(tensor.detach().clone(), persistent=False))
            # The name holds for the original too: it may be read again.
            self.constants[id(tensor)] = name
            self.observer.alive.append(tensor)
        if name not in self.attributes:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_after(first):
                self.attributes[name] = self.graph.get_attr(name)
            self.attributes[name].meta["constant"] = True
            self.refs[self.attributes[name]] = self.observer.ref(tensor)
        return self.attributes[name]

    def _depends_on_input(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self.nodes and depends_on_input(self.nodes[value])

    # -- errors

    def where(self, error: Exception | None = None) -> str:
        """The module that runs or has failed, and the user's line in it."""
        name = self.stack[-1] if self.stack else ""
        module = type(self.root.get_submodule(name)).__name__
        label = f"{name} ({module})" if name else module
        line = _user_line(error)
        return f"{label} at {line}" if line else label


class _Observer(TorchDispatchMode):
    """Writes the ATen calls of one run."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.node: fx.Node | None = None
        self.events: list[Event] = []
        self.ids = WeakTensorKeyDictionary()
        self.num_ids = 0
        self.from_input: set[int] = set()
        self.alive: list[Tensor] = []

    def ref(self, tensor: Tensor) -> TensorRef:
        """The name of a tensor."""
        if tensor not in self.ids:
            self.ids[tensor] = self.num_ids
            self.num_ids += 1
            if self.num_ids == 1:  # the first tensor that is named is the input
                self.from_input.add(0)
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
            macs = _count_macs(func, ref_args, ref_kwargs, ref_out)
            self.events.append(Event(self.node, func, ref_args, ref_kwargs, ref_out, macs))
        return out

    def _refer(self, value: Any) -> Any:
        return self.ref(value) if isinstance(value, Tensor) else value


def refs(value: Any) -> list[TensorRef]:
    """All tensors in what an event holds."""
    if isinstance(value, TensorRef):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [ref for part in value for ref in refs(part)]


def _count_macs(op: Any, args: Any, kwargs: Any, out: Any) -> float:
    count = flop_registry.get(getattr(op, "overloadpacket", None))
    return 0 if count is None else count(*_shapes(args), **_shapes(kwargs), out_val=_shapes(out)) / 2


def _shapes(value: Any) -> Any:
    """What an event holds, with shapes for tensors."""
    if isinstance(value, TensorRef):
        return torch.Size(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_shapes(part) for part in value)
    return value


def _is_atom(value: Any) -> bool:
    return isinstance(value, (torch.Size, slice))


def _works_in_place(op: str, target: Any) -> bool:
    """Whether an operation changes its argument, so that it stays although nobody reads its result."""
    return op == "call_method" and target.endswith("_") and not target.endswith("__")


def _fx_target(func: Any, name: str) -> tuple[str, Any]:
    """How a graph calls a torch function."""
    if name == "__getitem__":
        return "call_function", operator.getitem
    if name == "__setitem__":
        return "call_function", operator.setitem
    is_method = type(func).__name__ in ("method_descriptor", "wrapper_descriptor")
    if is_method or getattr(func, "__module__", "") == "torch._tensor":
        return "call_method", name
    return "call_function", func


def _input_name(module: nn.Module) -> str:
    """The name that the module's forward gives its input."""
    names = [name for name in inspect.signature(module.forward).parameters if name not in ("args", "kwargs")]
    return names[0] if names else "input"


def _describe(value: Any) -> str:
    """What a network returned, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} that does not come from its input"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


_PACKAGE = Path(__file__).parent.parent
_NOT_THE_USERS = (
    str(Path(torch.__file__).parent),
    *(str(path) for path in _PACKAGE.iterdir() if path.name != "models"),
)


def _user_line(error: Exception | None) -> str | None:
    """The innermost line of code that is neither PyTorch's nor ours, as "file:line"."""
    if error is not None:
        lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    else:
        lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe(1))]
    for file, line in lines:
        if not file.startswith((*_NOT_THE_USERS, "<")):
            return f"{Path(file).name}:{line}"
    return None


def depends_on_input(node: fx.Node) -> bool:
    """Whether a node's value comes from the network's input, not only from its parameters."""
    if "from_input" not in node.meta:
        node.meta["from_input"] = node.op == "placeholder" or any(
            depends_on_input(argument) for argument in node.all_input_nodes if "scalar" not in argument.meta
        )
    return node.meta["from_input"]


def _drop_unused(graph: fx.Graph) -> None:
    """Erase nodes that nobody reads, except for what they change."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and "effect" not in node.meta:
            graph.erase_node(node)


class ByMode(nn.Module):
    """A value in training mode, another in evaluation mode: what `a if self.training else b` becomes."""

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """Choose by the mode that the module is in."""
        return in_training if self.training else in_evaluation


class _MismatchError(Exception):
    """The two modes do different things."""


def _merge_modes(evaluation: _Recorder, training: _Recorder) -> str | None:
    """Make the evaluation graph serve both modes; return the innermost module where that cannot be, if any.

    Where only a constant differs, the graph chooses it by the mode.
    """
    twins: dict[fx.Node, fx.Node] = {}
    stack = [""]
    for left, right in zip_longest(evaluation.stream, training.stream):
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            try:
                _merge_nodes(left, right, twins)
            except _MismatchError:
                return stack[-1]
        elif not isinstance(left, str) or left != right:
            return stack[-1]
        elif left[0] == "+":
            stack.append(left[1:])
        else:
            stack.pop()
    return None


def _merge_nodes(left: fx.Node, right: fx.Node, twins: dict[fx.Node, fx.Node]) -> None:
    """Pair two nodes, merging the arguments of the right one into the left one."""
    if (left.op, left.target) != (right.op, right.target):
        raise _MismatchError

    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a not in twins:  # a node outside the stream: a size, an attribute, a part of a tuple
                _merge_nodes(a, b, twins)
            if twins[a] is not b:
                raise _MismatchError
            return a
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(merge(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: merge(a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(merge(a.start, b.start), merge(a.stop, b.stop), merge(a.step, b.step))
        if type(a) is type(b) and a == b:
            return a
        if isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
            with left.graph.inserting_before(left):
                return left.graph.create_node("call_module", BY_MODE, (b, a))  # pyright: ignore[reportArgumentType]
        raise _MismatchError

    arguments = merge((tuple(left.args), dict(left.kwargs)), (tuple(right.args), dict(right.kwargs)))
    left.args, left.kwargs = arguments
    twins[left] = right


class NodeError(Exception):
    """A node of a graph that cannot run."""

    def __init__(self, node: fx.Node, cause: object) -> None:
        super().__init__(f"{node.meta.get('line', node.name)}: {str(cause).split(chr(10) + chr(10))[0]}")
        self.node = node


class GraphRunner(fx.Interpreter):
    """Runs a graph node by node, so that an error names its node."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        try:
            return super().run_node(n)
        except NodeError:
            raise
        except Exception as error:
            raise NodeError(n, f"{type(error).__name__}: {error}") from error


class _SizeReader(GraphRunner):
    """Notes the sizes that a graph reads."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.sizes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; remember a size."""
        value = super().run_node(n)
        if "scalar" in n.meta:
            self.sizes[n] = value
        return value


def _check_batch_size(traced: Trace, expected: Tensor) -> None:
    """Run the graph on one example: it must say what the base said of it, and tells which sizes follow the batch."""
    if not torch.isfinite(expected).all():
        raise ConversionError(
            "The base's outputs are not finite on the example inputs; check its weights and the inputs' range."
        )
    traced.module.eval()
    reader = _SizeReader(fx.GraphModule(traced.module, traced.graph).eval())
    doubt = (
        f"The base cannot be followed from a batch of {len(traced.input)} to one example; does its code turn the "
        f"batch size into a constant, or an example's output depend on the other examples in evaluation mode?"
    )
    with torch.no_grad(), keeping_state(traced.module, traced.input):
        try:
            got = reader.run(traced.input[:1])
        except NodeError as error:
            raise ConversionError(f"{doubt} The first failure is in {error}. {BY_HAND}") from error
    scale = expected.abs().max().clamp(min=1e-6)
    if got.shape[1:] != expected.shape[1:] or ((got - expected[: len(got)]).abs().max() / scale) > 1e-3:
        raise ConversionError(f"{doubt} {BY_HAND}")
    for node, size in reader.sizes.items():
        node.meta["follows_batch"] = size != node.meta["scalar"]
