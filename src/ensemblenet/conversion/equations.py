"""What each ATen operator says about sizes: one small rule per operator.

A rule reads the axes of an operator's inputs, states which are equal, and gives the axes of its outputs. An operator
without a rule keeps the sizes of all it touches, so an unknown one costs width, never correctness. Add a rule of your
own with [`rule`][].

Shapes: N examples, C channels, D features of an attention head, * any dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ensemblenet.conversion.trace import Event, TensorRef, Trace, refs
from ensemblenet.operations.axes import Axis, concatenated, free, kept, multiplied, unify

__all__ = ["Equations", "Rule", "rule"]

Axes = list[Axis]


class Equations:
    """The axes of all tensors of a part of a network, and what its operators say about them.

    Args:
        trace: the traced network.
        nodes: the part: the nodes whose events count.
        entry: the tensor that enters the part.
        entry_axes: its axes.
        frozen: nodes whose tensors keep all their sizes, because running them narrowed has failed.
    """

    def __init__(
        self, trace: Trace, nodes: set[fx.Node], entry: TensorRef, entry_axes: Axes, frozen: set[fx.Node]
    ) -> None:
        self.trace = trace
        self.values: dict[int, Axes] = {entry.id: entry_axes}
        self.sources: dict[str, Axes] = {}
        self.groups: dict[fx.Node, Axis] = {}
        self.contracted: dict[str, Axes] = {}  # by weight: the axes that it sums over, its fan-in
        self.biases: set[str] = set()
        self.written: Axes = []  # what layers with weights write
        self.work: list[tuple[float, Axes]] = []  # MACs of an operator in the base, and the axes they grow with
        self._weight_of: dict[int, str] = {}  # tensors that are a reshaped weight
        self._parameters = {name for name, _ in trace.module.named_parameters()}
        for event in trace.events:
            if event.node in nodes:
                self._apply(event, frozen)
        for node in nodes:
            self._tie_attention(node)

    # -- for rules

    def axes(self, ref: TensorRef) -> Axes:
        """The axes of a tensor; a parameter's are unknown at first, any other constant keeps its sizes."""
        if ref.id not in self.values:
            new = free if ref.source in self._parameters else kept
            self.values[ref.id] = self._source(ref, new) if ref.source else [kept(size) for size in ref.shape]
        return self.values[ref.id]

    def vector(self, ref: TensorRef | None, axis: Axis) -> None:
        """State that a vector of parameters or statistics has one entry per position of an axis."""
        if ref is None:
            return
        if ref.source and ref.id not in self.values:
            self.values[ref.id] = self._source(ref, free)
        unify(self.axes(ref)[0], axis)

    def set(self, out: Any, axes: Axes) -> None:
        """Give the axes of an output; one that was written in place has them already."""
        assert isinstance(out, TensorRef)
        if tuple(axis.size for axis in axes) != out.shape:
            raise ValueError(f"rule gives sizes {[axis.size for axis in axes]} for a tensor of shape {out.shape}")
        if out.id in self.values:
            for old, new in zip(self.values[out.id], axes, strict=True):
                unify(old, new)
        else:
            self.values[out.id] = axes

    def keep(self, value: Any) -> None:
        """Keep all sizes of all tensors in a value."""
        for ref in refs(value):
            for axis in self.axes(ref):
                axis.keep()

    def weight(self, ref: TensorRef, contracted: Axes) -> None:
        """Note that a tensor multiplies features, if it is a parameter, and over which axes it sums."""
        name = ref.source or self._weight_of.get(ref.id)
        if name is not None:
            self.contracted.setdefault(name, contracted)

    def is_weight(self, ref: TensorRef) -> bool:
        """Whether a tensor is a parameter, perhaps reshaped."""
        return ref.source is not None or ref.id in self._weight_of

    # -- inside

    def _source(self, ref: TensorRef, new: Callable[[int], Axis]) -> Axes:
        assert ref.source is not None
        return self.sources.setdefault(ref.source, [new(size) for size in ref.shape])

    def _apply(self, event: Event, frozen: set[fx.Node]) -> None:
        inputs = refs((event.args, event.kwargs))
        handle = _find(event.op)
        try:
            if handle is None or any(0 in ref.shape for ref in inputs):
                raise NotImplementedError
            handle(self, event)
        except (NotImplementedError, ValueError, IndexError):
            self.keep((event.args, event.kwargs, event.out))
        if event.node in frozen:
            self.keep((event.args, event.kwargs, event.out))
        if inputs and all(self.is_weight(ref) for ref in inputs):
            largest = max(inputs, key=lambda ref: math.prod(ref.shape))
            for out in refs(event.out):
                self._weight_of[out.id] = largest.source or self._weight_of[largest.id]
        self._count(event)

    def _count(self, event: Event) -> None:
        if event.macs:
            self.work.append((event.macs, _work_axes(self, event)))

    def _tie_attention(self, node: fx.Node) -> None:
        """`nn.MultiheadAttention` wants its inner width to be its input's."""
        if node.op != "call_module":
            return
        module = self.trace.module.get_submodule(str(node.target))
        if isinstance(module, nn.MultiheadAttention):
            inner = self.sources[f"{node.target}.out_proj.weight"]
            unify(inner[1], inner[0])
            for argument in node.args[:3]:
                assert isinstance(argument, fx.Node)
                ref = self.trace.refs[argument]
                self.axes(ref)[-1].keep() if module.in_proj_weight is None else unify(self.axes(ref)[-1], inner[0])


def _work_axes(equations: Equations, event: Event) -> Axes:
    """The axes whose sizes multiply to an operator's MACs."""
    name = _name(event.op)
    if name == "convolution":
        weight = equations.axes(event.args[1])
        transposed = event.args[6]
        other = event.args[0] if transposed else event.out
        return [*equations.axes(other), *(weight[1:])]
    out = refs(event.out)[0]
    if name in ("mm", "bmm"):
        return [*equations.axes(out), equations.axes(event.args[0])[-1]]
    if name in ("addmm", "baddbmm"):
        return [*equations.axes(out), equations.axes(event.args[1])[-1]]
    return [*equations.axes(event.args[0]), equations.axes(event.args[1])[-2]]  # attention: (N, H, L, D) x S


# -- the table

Rule = Callable[[Equations, Event], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators, by their names without namespace and overload.

    Example:
        >>> @rule("my_operator")
        ... def my_operator(equations, event):
        ...     equations.set(event.out, equations.axes(event.args[0]))
    """

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def _name(op: Any) -> str:
    return op._schema.name.split("::")[-1]


def _find(op: Any) -> Rule | None:
    name = _name(op)
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in getattr(op, "tags", ()):
        return pointwise
    return found


@rule(
    "clone", "_to_copy", "detach", "alias", "contiguous", "copy", "fill", "native_dropout", "_softmax", "_log_softmax",
    "masked_fill", "cumsum", "roll", "flip", "bernoulli", "normal", "uniform", "zero", "lift_fresh", "where",
    "hardswish", "_prelu_kernel", "_safe_softmax", "as_strided", "zeros_like", "ones_like", "rand_like",
    "empty_like", "randn_like", "full_like",
)  # fmt: skip
def pointwise(equations: Equations, event: Event) -> None:
    """Every dimension meets its like, counted from the last; sizes of one are broadcast."""
    inputs = refs((event.args, event.kwargs))
    if _name(event.op) == "as_strided_" and event.out.shape != inputs[0].shape:
        raise NotImplementedError
    for out in refs(event.out):
        axes = [kept(1) for _ in out.shape]
        for ref in inputs:
            own = equations.axes(ref)
            for dim in range(-min(len(own), len(axes)), 0):
                if own[dim].size == 1:
                    continue
                if axes[dim].size == 1:
                    axes[dim] = own[dim]
                else:
                    unify(axes[dim], own[dim])
        equations.set(out, axes)


@rule("log_sigmoid_forward")
def log_sigmoid(equations: Equations, event: Event) -> None:
    """The result has the input's shape, and on a CPU a buffer comes with it."""
    result, *buffers = refs(event.out)
    equations.set(result, list(equations.axes(event.args[0])))
    for buffer in buffers:
        equations.set(buffer, [kept(size) for size in buffer.shape])


@rule("view", "_unsafe_view", "_reshape_alias", "reshape", "squeeze", "unsqueeze", "view_copy", "squeeze_copy")
def view(equations: Equations, event: Event) -> None:
    """Dimensions are multiplied and cut, in order."""
    before = equations.axes(event.args[0])
    equations.set(event.out, _reshape(before, event.out.shape))


def _reshape(before: Axes, shape: Sequence[int]) -> Axes:
    """Match runs of old dimensions with runs of new ones of the same product."""
    after = [free(size) for size in shape]
    i = j = 0
    while i < len(before) or j < len(after):
        olds, news = [], []
        old_size = new_size = 1
        while not olds or not news or old_size != new_size:
            if j < len(after) and (old_size > new_size or (olds and not news) or i == len(before)):
                news.append(j)
                new_size *= after[j].size
                j += 1
            elif i < len(before):
                olds.append(before[i])
                old_size *= before[i].size
                i += 1
            else:
                break
        if len(news) == 1:
            after[news[0]] = multiplied(olds)
        elif news:
            unify(multiplied(olds), multiplied([after[k] for k in news]))
    return after


@rule("permute")
def permute(equations: Equations, event: Event) -> None:
    """(d0, d1, ...) in another order."""
    before = equations.axes(event.args[0])
    equations.set(event.out, [before[dim] for dim in event.args[1]])


@rule("transpose", "t", "transpose_copy")
def transpose(equations: Equations, event: Event) -> None:
    """Two dimensions change places."""
    axes = list(equations.axes(event.args[0]))
    if len(axes) > 1:
        a, b = event.args[1:3] if len(event.args) > 2 else (0, 1)
        axes[a], axes[b] = axes[b], axes[a]
    if _name(event.op).endswith("_"):  # in place: the tensor's own dimensions change
        del equations.values[event.out.id]
    equations.set(event.out, axes)


@rule("expand")
def expand(equations: Equations, event: Event) -> None:
    """Sizes of one become larger; what they become is free only where the network's code writes a number."""
    before = equations.axes(event.args[0])
    shape = event.out.shape
    before = [kept(1)] * (len(shape) - len(before)) + before
    literal = _literal_sizes(event.node, shape)
    equations.set(
        event.out,
        [
            old if old.size == size else free(size) if is_literal else kept(size)
            for old, size, is_literal in zip(before, shape, literal, strict=True)
        ],
    )


def _literal_sizes(node: fx.Node, shape: Sequence[int]) -> list[bool]:
    """For a call of `expand`, which of its sizes are plain numbers in the graph."""
    if node.op != "call_method" or node.target != "expand":
        return [False] * len(shape)
    sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if len(sizes) != len(shape):
        return [False] * len(shape)
    return [isinstance(size, int) for size in sizes]


@rule("repeat")
def repeat(equations: Equations, event: Event) -> None:
    """Each dimension a number of times."""
    before = equations.axes(event.args[0])
    times = list(event.args[1])
    before = [kept(1)] * (len(times) - len(before)) + before
    equations.set(event.out, [multiplied([kept(n), axis]) for n, axis in zip(times, before, strict=True)])


@rule("zeros")
def zeros(equations: Equations, event: Event) -> None:
    """The first state of a recurrent layer, (layers, N, C), is as wide as the layer; other zeros keep their sizes."""
    if event.node.op != "call_module":
        raise NotImplementedError
    if not isinstance(equations.trace.module.get_submodule(str(event.node.target)), nn.GRU):
        raise NotImplementedError
    equations.set(event.out, [*(kept(size) for size in event.out.shape[:-1]), free(event.out.shape[-1])])


@rule("cat")
def cat(equations: Equations, event: Event) -> None:
    """One dimension adds up, the others are equal."""
    parts = [equations.axes(ref) for ref in event.args[0]]
    dim = (event.args[1] if len(event.args) > 1 else event.kwargs.get("dim", 0)) % len(parts[0])
    axes = list(parts[0])
    for other in parts[1:]:
        for d, axis in enumerate(other):
            if d != dim:
                unify(axes[d], axis)
    axes[dim] = concatenated(part[dim] for part in parts)
    equations.set(event.out, axes)


@rule("stack")
def stack(equations: Equations, event: Event) -> None:
    """A new dimension, the others are equal."""
    parts = [equations.axes(ref) for ref in event.args[0]]
    for other in parts[1:]:
        for left, right in zip(parts[0], other, strict=True):
            unify(left, right)
    dim = event.args[1] if len(event.args) > 1 else 0
    axes = list(parts[0])
    axes.insert(dim % (len(axes) + 1), kept(len(parts)))
    equations.set(event.out, axes)


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def split(equations: Equations, event: Event) -> None:
    """A dimension in segments; equal ones stay equal, as whoever asks for equal segments expects."""
    before = equations.axes(event.args[0])
    dim = (event.args[2] if len(event.args) > 2 else event.kwargs.get("dim", 0)) % len(before)
    if len(event.out) == 1:
        return equations.set(event.out[0], list(before))
    by_size: dict[int, Axis] = {}
    parts = [by_size.setdefault(out.shape[dim], free(out.shape[dim])) for out in event.out]
    unify(before[dim], concatenated(parts))
    for out, part in zip(event.out, parts, strict=True):
        equations.set(out, [*before[:dim], part, *before[dim + 1 :]])


@rule("slice")
def slice_(equations: Equations, event: Event) -> None:
    """A segment of a dimension."""
    before = equations.axes(event.args[0])
    dim, start, end, step = (*event.args[1:], *(0, None, None, 1)[len(event.args) - 1 :])
    dim, size = (dim or 0) % len(before), before[(dim or 0) % len(before)].size
    begin, stop, _ = slice(start, end).indices(size)
    axes = list(before)
    if step != 1:
        axes[dim].keep()
        axes[dim] = kept(event.out.shape[dim])
    elif stop - begin != size:
        axes[dim] = free(max(stop - begin, 0))
        unify(before[dim], concatenated([free(begin), axes[dim], free(size - stop)]))
    equations.set(event.out, axes)


@rule("glu")
def gated(equations: Equations, event: Event) -> None:
    """The first half of a dimension, gated by the second."""
    axes = list(equations.axes(event.args[0]))
    dim = (event.args[1] if len(event.args) > 1 else -1) % len(axes)
    half = free(axes[dim].size // 2)
    unify(axes[dim], concatenated([half, half]))
    axes[dim] = half
    equations.set(event.out, axes)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(equations: Equations, event: Event) -> None:
    """(N, C, *) in groups, which stay as many."""
    axes = equations.axes(event.args[0])
    groups = event.args[1]
    unify(axes[1], multiplied([kept(groups), free(axes[1].size // groups)]))
    equations.set(event.out, list(axes))


@rule("_weight_norm_interface")
def weight_norm(equations: Equations, event: Event) -> None:
    """Directions of a weight and their lengths along one dimension."""
    direction, length = (equations.axes(ref) for ref in event.args[:2])
    for own, axis in zip(length, direction, strict=True):
        if own.size != 1:
            unify(own, axis)
    equations.set(event.out[0], list(direction))
    equations.set(event.out[1], list(length))


@rule("select", "unbind", "index_select")
def select(equations: Equations, event: Event) -> None:
    """A position of a dimension, which keeps its size; the others stay."""
    before = list(equations.axes(event.args[0]))
    dim = (event.args[1] if len(event.args) > 1 else 0) % len(before)
    before[dim].keep()
    for out in refs(event.out):
        same_rank = len(out.shape) == len(before)
        equations.set(out, [*before[:dim], *([kept(out.shape[dim])] if same_rank else []), *before[dim + 1 :]])


@rule("index", "_unsafe_index")
def index(equations: Equations, event: Event) -> None:
    """Dimensions that are looked up keep their sizes; the others stay."""
    before = equations.axes(event.args[0])
    lookups = list(event.args[1]) + [None] * (len(before) - len(event.args[1]))
    looked_up = [dim for dim, lookup in enumerate(lookups) if lookup is not None]
    if any(lookups[dim].shape and math.prod(lookups[dim].shape) == 0 for dim in looked_up):
        raise NotImplementedError
    for dim in looked_up:
        before[dim].keep()
    rank = len(event.out.shape) - (len(before) - len(looked_up))
    adjacent = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    position = looked_up[0] if adjacent else 0
    rest = [axis for dim, axis in enumerate(before) if dim not in looked_up]
    new = [kept(size) for size in event.out.shape[position : position + rank]]
    equations.set(event.out, [*rest[:position], *new, *rest[position:]])


@rule("embedding")
def embedding(equations: Equations, event: Event) -> None:
    """Rows (V, D) looked up by (N, *): (N, *, D)."""
    rows, columns = equations.axes(event.args[0])
    rows.keep()
    equations.weight(event.args[0], [])
    equations.set(event.out, [*equations.axes(event.args[1]), columns])


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "max", "min", "prod", "logsumexp",
    "linalg_vector_norm", "norm", "any", "all", "argmax", "argmin", "median",
)  # fmt: skip
def reduce(equations: Equations, event: Event) -> None:
    """Some dimensions vanish or become one."""
    before = equations.axes(event.args[0])
    named = [event.kwargs.get("dim"), *event.args[1:3]]
    dims = next((dim for dim in named if isinstance(dim, (list, tuple))), None)
    if dims is None:
        dims = [dim for dim in named if isinstance(dim, int) and not isinstance(dim, bool)][-1:]
    gone = {dim % len(before) for dim in dims} if dims else set(range(len(before)))
    for out in refs(event.out):
        if len(out.shape) == len(before):
            axes = [kept(1) if dim in gone else axis for dim, axis in enumerate(before)]
        else:
            axes = [axis for dim, axis in enumerate(before) if dim not in gone]
        equations.set(out, axes)


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "upsample_linear1d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "_upsample_nearest_exact2d", "upsample_bilinear2d_aa",
    "mkldnn_max_pool2d", "mkldnn_max_pool3d", "_upsample_nearest_exact1d",
)  # fmt: skip
def spatial(equations: Equations, event: Event) -> None:
    """(N, C, *): only the spatial dimensions change, and they keep the base's sizes."""
    digits = [int(letter) for letter in _name(event.op) if letter in "123"]
    before = equations.axes(event.args[0])
    first = len(before) - digits[0]
    for axis in before[first:]:
        axis.keep()
    for out in refs(event.out):
        equations.set(out, [*before[:first], *(kept(size) for size in out.shape[first:])])


@rule("constant_pad_nd")
def constant_pad(equations: Equations, event: Event) -> None:
    """Padded dimensions keep their sizes; pads are given from the last dimension on."""
    axes = list(equations.axes(event.args[0]))
    pads = event.args[1]
    for k in range(len(pads) // 2):
        if pads[2 * k] or pads[2 * k + 1]:
            dim = len(axes) - 1 - k
            axes[dim].keep()
            axes[dim] = kept(event.out.shape[dim])
    equations.set(event.out, axes)


@rule("im2col")
def im2col(equations: Equations, event: Event) -> None:
    """(N, C, H, W) to (N, C * window, L)."""
    batch, channels, *space = equations.axes(event.args[0])
    for axis in space:
        axis.keep()
    window = kept(event.out.shape[1] // channels.size)
    equations.set(event.out, [batch, multiplied([channels, window]), kept(event.out.shape[2])])


@rule("col2im")
def col2im(equations: Equations, event: Event) -> None:
    """(N, C * window, L) to (N, C, H, W)."""
    batch, columns, length = equations.axes(event.args[0])
    length.keep()
    channels = free(event.out.shape[1])
    unify(columns, multiplied([channels, kept(columns.size // channels.size)]))
    equations.set(event.out, [batch, channels, *(kept(size) for size in event.out.shape[2:])])


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(equations: Equations, event: Event) -> None:
    """(N, C * r * r, H, W) and (N, C, H * r, W * r), either way."""
    batch, channels, *space = equations.axes(event.args[0])
    for axis in space:
        axis.keep()
    new = event.out.shape[1]
    if new > channels.size:
        after = multiplied([channels, kept(new // channels.size)])
    else:
        after = free(new)
        unify(channels, multiplied([after, kept(channels.size // new)]))
    equations.set(event.out, [batch, after, *(kept(size) for size in event.out.shape[2:])])


@rule("mm", "bmm", "matmul")
def matrix_product(equations: Equations, event: Event) -> None:
    """(*, A, B) x (*, B, C) = (*, A, C)."""
    _multiply(equations, event.args[0], event.args[1], event.out)


@rule("addmm", "baddbmm")
def add_matrix_product(equations: Equations, event: Event) -> None:
    """bias + (*, A, B) x (*, B, C)."""
    bias, left, right = event.args[:3]
    _multiply(equations, left, right, event.out)
    axes, own = equations.axes(event.out), equations.axes(bias)
    for dim in range(-len(own), 0):
        if own[dim].size != 1:
            unify(own[dim], axes[dim])
    if bias.source:
        equations.biases.add(bias.source)


def _multiply(equations: Equations, left: TensorRef, right: TensorRef, out: TensorRef) -> None:
    a, b = equations.axes(left), equations.axes(right)
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    unify(a[-1], b[-2])
    for weight, columns in ((left, a[-2]), (right, b[-1])):
        if equations.is_weight(weight):
            equations.weight(weight, [a[-1]])
            equations.written.append(columns)
    equations.set(out, [*a[:-1], b[-1]])


@rule("convolution", "_convolution")
def convolution(equations: Equations, event: Event) -> None:
    """(N, C, *) with weights (C_out, C / groups, *), or (C, C_out / groups, *) if transposed."""
    features, weight, bias = event.args[:3]
    transposed, groups = event.args[6], event.args[8]
    batch, channels, *space = equations.axes(features)
    first, second, *kernel = equations.axes(weight)
    new_space = [kept(size) for size in event.out.shape[2:]]
    for dim, (axis, window) in enumerate(zip(space, kernel, strict=True)):
        if window.size == 1 and axis.size == new_space[dim].size:
            new_space[dim] = axis  # a kernel of one passes positions through
        else:
            axis.keep()
        window.keep()
    if groups == 1:
        unify(channels, first if transposed else second)
        out = second if transposed else first
    else:
        group = free(groups)
        out = _grouped(channels, first, second, group, transposed=transposed)
        equations.groups[event.node] = group
    equations.weight(weight, [first if transposed else second])
    equations.written.append(out)
    if bias is not None:
        equations.vector(bias, out)
        if bias.source:
            equations.biases.add(bias.source)
    equations.set(event.out, [batch, out, *new_space])


def _grouped(channels: Axis, first: Axis, second: Axis, group: Axis, *, transposed: bool) -> Axis:
    """The output channels of a grouped convolution."""
    unify(channels, multiplied([group, free(channels.size // group.size) if transposed else second]))
    if transposed:
        unify(first, channels)
        return multiplied([group, second])
    unify(first, multiplied([group, free(first.size // group.size)]))
    return first


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm", "_batch_norm_impl_index",
)  # fmt: skip
def batch_norm(equations: Equations, event: Event) -> None:
    """(N, C, *) with vectors of C."""
    axes = equations.axes(event.args[0])
    for ref in event.args[1:5]:
        if isinstance(ref, TensorRef):
            equations.vector(ref, axes[1])
    outs = refs(event.out)
    equations.set(outs[0], list(axes))
    for other in outs[1:]:
        if len(other.shape) == 1 and other.shape[0] == axes[1].size:
            equations.set(other, [axes[1]])


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(equations: Equations, event: Event) -> None:
    """(*, normalized) with weights of the normalised dimensions."""
    axes = equations.axes(event.args[0])
    for ref in event.args[2:4]:
        if isinstance(ref, TensorRef):
            for own, axis in zip(equations.axes(ref), axes[-len(ref.shape) :], strict=True):
                unify(own, axis)
    first, *others = refs(event.out)
    equations.set(first, list(axes))
    for other in others:
        equations.set(other, [kept(1) if size == 1 else axis for size, axis in zip(other.shape, axes, strict=True)])


@rule("native_group_norm")
def group_norm(equations: Equations, event: Event) -> None:
    """(N, C, *) in groups, with vectors of C."""
    features, weight, bias = event.args[:3]
    axes = equations.axes(features)
    groups = event.args[6]
    if groups > 1:
        group = free(groups)
        unify(axes[1], multiplied([group, free(axes[1].size // groups)]))
        equations.groups[event.node] = group
    for ref in (weight, bias):
        equations.vector(ref, axes[1])
    equations.set(event.out[0], list(axes))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(equations: Equations, event: Event) -> None:
    """Queries (N, H, L, D), keys (N, H, S, D), values (N, H, S, E): (N, H, L, E)."""
    query, key, value = (equations.axes(ref) for ref in event.args[:3])
    for dim in (0, 1):
        unify(query[dim], key[dim])
        unify(query[dim], value[dim])
    unify(query[3], key[3])
    unify(key[2], value[2])
    mask = event.kwargs.get("attn_mask")
    if mask is not None:
        for own, axis in zip(equations.axes(mask), (*query[:3], key[2]), strict=True):
            if own.size != 1:
                unify(own, axis)
    equations.set(event.out[0], [*query[:3], value[3]])
