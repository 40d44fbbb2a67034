"""Linear layers, products of matrices and tables of rows. Heads are batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ensemblenet.operations.axes import kept, unify
from ensemblenet.operations.coupling import Axes, Event, LayerSizes, Sizes, TensorRef, argument
from ensemblenet.operations.fusion import FIRST, SHARED, Program, Value, aligned_value, arguments_of
from ensemblenet.operations.registry import Operation, register

__all__ = ["Linear", "linear"]


@register(nn.Linear, "timm.Linear", "linear")
class Linear(Operation):
    """Linear layers, and the function."""

    def narrow(self, layer: nn.Linear, base: nn.Linear, sizes: LayerSizes) -> None:
        layer.out_features, layer.in_features = layer.weight.shape

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """One batched product; what all heads read is read once."""
        if node.op != "call_module":
            x, weight, bias = arguments_of(node, input=None, weight=None, bias=None)
            if program.value(weight).layout is SHARED or (bias is not None and program.value(bias).layout is SHARED):
                return None
            bias = None if bias is None else program.first(bias)
            return Value(program.call(linear, program.first(x), program.first(weight), bias), FIRST)
        weight, bias = program.parameter(node, "weight"), program.parameter(node, "bias")
        if program.is_shared(node):
            return Value(program.call(linear_of_shared, program.value(node.args[0]).node, weight, bias), FIRST)
        return Value(program.call(linear, program.first(node.args[0]), weight, bias), FIRST)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(K, *, C) by weights (K, O, C) to (K, *, O)."""
    rows = x.reshape(len(weight), -1, x.shape[-1])
    weight = weight.transpose(1, 2)
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
    return out.view(*x.shape[:-1], out.shape[-1])


def linear_of_shared(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(*, C), read once, by weights (K, O, C) to (K, *, O)."""
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, (len(weight), -1)).movedim(-2, 0)


@register(nn.Bilinear)
class Bilinear(Operation):
    """(N, *, I) and (N, *, J) with weights (O, I, J) to (N, *, O)."""

    def couple_whole(self, sizes: Sizes, node: fx.Node, layer: nn.Bilinear) -> Axes:
        weight, bias = (sizes.parameter_ref(node, name) for name in ("weight", "bias"))
        if weight is None:  # computed from others, by a parametrisation
            raise NotImplementedError
        out, *factors = sizes.axes(weight)
        *rows, left = sizes.value(argument(node, 0, "input1"))
        unify(left, factors[0])
        unify(sizes.value(argument(node, 1, "input2"))[-1], factors[1])
        sizes.weight(weight, factors, out)
        if bias is not None:
            sizes.vector(bias, out)
            sizes.bias(bias)
        sizes.set(node, [*rows, out])
        return [*rows, out, *factors]

    def narrow(self, layer: nn.Bilinear, base: nn.Bilinear, sizes: LayerSizes) -> None:
        layer.out_features, layer.in1_features, layer.in2_features = layer.weight.shape


@register("mm", "bmm", "matmul", "__matmul__")
class MatrixProduct(Operation):
    """(*, A, B) x (*, B, C) = (*, A, C)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        _multiply(sizes, event.args[0], event.args[1], event.out)

    def work(self, sizes: Sizes, event: Event) -> Axes:
        return [*sizes.axes(event.out), sizes.axes(event.args[0])[-1]]

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        ranks = [len(program.shape(argument)) for argument in node.args]
        if program.is_shared(node):
            return program.same(node, SHARED)
        if min(ranks) < 2:
            return None
        factors = [aligned_value(program, factor, max(ranks)) for factor in node.args if isinstance(factor, fx.Node)]
        return Value(program.call(torch.matmul, *factors), FIRST)


@register("mv", "dot", "vdot")
class VectorProduct(Operation):
    """(A, B) x (B) = (A), and (B) x (B)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        left, right = event.args[:2]
        if event.name != "mv":
            sizes.vector(left, sizes.axes(right)[0])
        *rows, columns = sizes.axes(left)
        sizes.vector(right, columns)
        for ref in (left, right):
            if sizes.is_weight(ref):
                sizes.weight(ref, [columns])
        sizes.set(event.out, rows)

    def work(self, sizes: Sizes, event: Event) -> Axes:
        return list(sizes.axes(event.args[0]))


@register("addmm", "baddbmm")
class AddedMatrixProduct(Operation):
    """bias + (*, A, B) x (*, B, C)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        bias, left, right = event.args[:3]
        _multiply(sizes, left, right, event.out)
        axes, own = sizes.axes(event.out), sizes.axes(bias)
        for dim in range(-len(own), 0):
            if own[dim].size != 1:
                unify(own[dim], axes[dim])
        sizes.bias(bias)

    def work(self, sizes: Sizes, event: Event) -> Axes:
        return [*sizes.axes(event.out), sizes.axes(event.args[1])[-1]]


def _multiply(sizes: Sizes, left: TensorRef, right: TensorRef, out: TensorRef) -> None:
    a, b = sizes.axes(left), sizes.axes(right)
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    unify(a[-1], b[-2])
    for weight, columns in ((left, a[-2]), (right, b[-1])):
        if sizes.is_weight(weight):
            sizes.weight(weight, [a[-1]], columns)
    sizes.set(out, [*a[:-1], b[-1]])


@register("_embedding_bag", "_embedding_bag_forward_only")
class EmbeddingBag(Operation):
    """Rows (V, D) looked up by bags of positions and combined: (bags, D), with notes on the bags."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        rows, columns = sizes.axes(event.args[0])
        rows.keep()
        sizes.weight(event.args[0], [])
        first, *notes = event.out
        sizes.set(first, [kept(first.shape[0]), columns])
        for note in notes:
            axes = [columns if size == columns.size and len(note.shape) == 2 else kept(size) for size in note.shape]
            sizes.set(note, axes)


@register(nn.Embedding, nn.EmbeddingBag, "embedding")
class Embedding(Operation):
    """Rows (V, D) looked up by (N, *): (N, *, D)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        rows, columns = sizes.axes(event.args[0])
        rows.keep()
        sizes.weight(event.args[0], [])
        sizes.set(event.out, [*sizes.axes(event.args[1]), columns])

    def narrow(self, layer: nn.Embedding, base: nn.Embedding, sizes: LayerSizes) -> None:
        layer.embedding_dim = layer.weight.shape[1]
