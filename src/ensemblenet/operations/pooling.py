"""What changes positions alone: pooling, resizing, padding, windows, and pixels that become channels."""

from __future__ import annotations

from torch import fx, nn

from ensemblenet.operations.axes import concatenated, free, kept, multiplied, unify
from ensemblenet.operations.coupling import Event, Narrowed, Sizes, argument, name_of, refs, set_argument
from ensemblenet.operations.fusion import SHARED, Program, Value, arguments_of, per_channel, rewritten
from ensemblenet.operations.registry import Operation, register

__all__ = ["Padding", "Pooling"]

_LAYERS = [
    getattr(nn, f"{kind}Pool{rank}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for rank in (1, 2, 3)
]


@register("grid_sampler_2d", "grid_sampler_3d", "max_unpool2d", "max_unpool3d")
class PerChannel(Operation):
    """Operators that move what is in a channel to other positions."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        """(N, C, *): only positions change, and they keep the base's sizes."""
        (rank,) = (int(letter) for letter in event.name if letter in "123")
        before = sizes.axes(event.args[0])
        first = len(before) - rank
        for axis in before[first:]:
            axis.keep()
        for out in refs(event.out):
            sizes.set(out, [*before[:first], *(kept(size) for size in out.shape[first:])])


@register(
    # operators, with what pads by reflection or by the edges
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_max_pool2d",
    "mkldnn_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "upsample_linear1d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
    # functions
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "interpolate",
    # layers
    *_LAYERS, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d,
)  # fmt: skip
class Pooling(PerChannel):
    """What treats every channel alone."""

    is_whole = False

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        return per_channel(program, node)


@register("constant_pad_nd", "pad")
class Padding(Operation):
    """Padding with a constant, and the function that pads in any way."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        """Padded dimensions keep their sizes, but for channels; pads are given from the last dimension on."""
        axes = list(sizes.axes(event.args[0]))
        pads = event.args[1]
        own = argument(event.node, 1, "pad") if name_of(event.node) == "pad" else ()
        for k in range(len(pads) // 2):
            dim, (left, right) = len(axes) - 1 - k, pads[2 * k : 2 * k + 2]
            if own and axes[dim].is_free() and min(left, right) >= 0:
                axes[dim] = concatenated([free(left), axes[dim], free(right)])
            elif left or right:
                axes[dim].keep()
                axes[dim] = kept(event.out.shape[dim])
        sizes.set(event.out, axes)

    def renumber(self, narrowed: Narrowed, node: fx.Node, copy: fx.Node) -> None:
        """Channels of zeros beside the others, as on the shortcuts of a residual network, become fewer with them."""
        before, after = narrowed.axes(node.all_input_nodes[0]), narrowed.axes(node)
        pads = list(argument(copy, 1, "pad"))
        for k, (old, new) in enumerate(zip(before[::-1], after[::-1], strict=True)):
            if narrowed.size(new) != new.size != old.size:
                left = argument(node, 1, "pad")[2 * k]
                pads[2 * k] = narrowed.position(new, left.meta["scalar"] if isinstance(left, fx.Node) else left)
                pads[2 * k + 1] = narrowed.size(new) - narrowed.size(old) - pads[2 * k]
        set_argument(copy, 1, "pad", tuple(pads))

    def fuse(self, program: Program, node: fx.Node) -> Value | None:
        """As it is, or, where the function looks at positions alone, with heads as more channels."""
        _, pads, mode = arguments_of(node, input=None, pad=None, mode="constant")
        if program.is_shared(node):
            return program.same(node, SHARED)
        if mode == "constant":
            return rewritten(program, node, node.args, dict(node.kwargs))
        return per_channel(program, node) if len(pads) // 2 <= len(program.shape(node)) - 2 else None


@register("im2col")
class Unfold(Operation):
    """(N, C, H, W) to (N, C * window, L)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        batch, channels, *space = sizes.axes(event.args[0])
        for axis in space:
            axis.keep()
        window = kept(event.out.shape[1] // channels.size)
        sizes.set(event.out, [batch, multiplied([channels, window]), kept(event.out.shape[2])])


@register("col2im")
class Fold(Operation):
    """(N, C * window, L) to (N, C, H, W)."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        batch, columns, length = sizes.axes(event.args[0])
        length.keep()
        channels = free(event.out.shape[1])
        unify(columns, multiplied([channels, kept(columns.size // channels.size)]))
        sizes.set(event.out, [batch, channels, *(kept(size) for size in event.out.shape[2:])])


@register("pixel_shuffle", "pixel_unshuffle")
class PixelShuffle(Operation):
    """(N, C * r * r, H, W) and (N, C, H * r, W * r), either way."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        batch, channels, *space = sizes.axes(event.args[0])
        for axis in space:
            axis.keep()
        new = event.out.shape[1]
        if new > channels.size:
            after = multiplied([channels, kept(new // channels.size)])
        else:
            after = free(new)
            unify(channels, multiplied([after, kept(channels.size // new)]))
        sizes.set(event.out, [batch, after, *(kept(size) for size in event.out.shape[2:])])


@register("channel_shuffle", "native_channel_shuffle")
class ChannelShuffle(Operation):
    """(N, C, *) in groups of channels that change places."""

    def couple(self, sizes: Sizes, event: Event) -> None:
        axes = sizes.axes(event.args[0])
        groups = event.args[1]
        unify(axes[1], multiplied([kept(groups), free(axes[1].size // groups)]))
        sizes.set(event.out, list(axes))
