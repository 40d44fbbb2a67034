"""Narrowing rules, one small network for each kind of coupling."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet import BudgetError, EnsembleNet, convert, fuse
from ensemblenet.conversion.trace import trace
from ensemblenet.operations import Event, LayerSizes, Operation, Sizes, register
from ensemblenet.testing import check_conversion, check_full_width


class Between(nn.Module):
    """A network around one operation on 64 channels."""

    def __init__(self, middle: nn.Module, channels: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))).mean((2, 3))


class Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


MIDDLES = {
    "depthwise": nn.Conv2d(64, 64, 3, padding=1, groups=64),
    "depthwise, multiplied": nn.Sequential(nn.Conv2d(64, 128, 3, padding=1, groups=64), nn.Conv2d(128, 64, 1)),
    "grouped": nn.Conv2d(64, 64, 3, padding=1, groups=16),
    "two groups": nn.Conv2d(64, 64, 3, padding=1, groups=2),
    "transposed": nn.ConvTranspose2d(64, 64, 2, 2),
    "transposed, grouped": nn.ConvTranspose2d(64, 64, 2, 2, groups=8),
    "group normalisation": nn.GroupNorm(8, 64),
    "instance normalisation": nn.InstanceNorm2d(64, affine=True),
    "layer normalisation": Function(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (64,)).permute(0, 3, 1, 2)),
    "parametric relu": nn.PReLU(64),
    "split": Function(lambda x: torch.cat([part.relu() for part in x.split(16, dim=1)], 1)),
    "uneven split": Function(lambda x: torch.cat([x.split([16, 48], 1)[1], x.split([16, 48], 1)[0]], 1)),
    "gate": nn.Sequential(nn.Conv2d(64, 128, 1), nn.GLU(dim=1)),
    "slices": Function(lambda x: torch.cat([x[:, :24].relu(), x[:, 24:].tanh()], dim=1)),
    "narrow": Function(lambda x: torch.cat([x.narrow(1, 24, 40), x.narrow(1, 0, 24)], dim=1)),
    "shuffle": Function(shuffle),
    "shuffle, as a layer": nn.ChannelShuffle(2),
    "pixels": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(256, 256, 1), nn.PixelShuffle(2)),
    "unflatten": Function(lambda x: x.unflatten(1, (4, 16)).softmax(1).flatten(1, 2)),
    "unflatten, as a layer": nn.Sequential(nn.Unflatten(1, (4, 16)), nn.Flatten(1, 2)),
    "einsum": Function(
        lambda x: torch.einsum("nchw,ndhw->ncd", x, x.softmax(1))[..., None] * x.mean((2, 3))[:, None, :, None]
    ),
    "weights": nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 3, padding=1)),
    "padding": Function(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "upsampling": nn.Upsample(scale_factor=2, mode="bilinear"),
    "window": Function(lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2)),
    "windows": Function(lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))),
    "local response": nn.Sequential(nn.LocalResponseNorm(5), Function(lambda x: F.local_response_norm(x, 5))),
    "unit vectors": Function(lambda x: F.normalize(x)),
    "as another": Function(lambda x: x * x.mean(1, keepdim=True).expand_as(x)),
    "zeros beside": nn.Sequential(Function(lambda x: F.pad(x, (0, 0, 0, 0, 0, 64))), nn.Conv2d(128, 64, 1)),
    "zeros on both sides": nn.Sequential(
        Function(lambda x: F.pad(x, (0, 0, 0, 0, x.shape[1] // 2, 32))), nn.Conv2d(128, 64, 1)
    ),
    "repeated kernel": Function(lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3).repeat(64, 1, 1, 1), groups=64)),
    "one repeated kernel, transposed": Function(
        lambda x: F.conv_transpose2d(x, torch.ones(1, 1, 2, 2).repeat(x.size(1), 1, 1, 1), stride=2, groups=64)
    ),
    "channels as positions": Function(
        lambda x: (
            x * F.conv1d(x.mean((2, 3)).unsqueeze(1), torch.ones(1, 1, 3), padding=1).sigmoid()[:, 0, :, None, None]
        )
    ),
    "unpooled": Function(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    "sampled": Function(
        lambda x: F.grid_sample(x, F.affine_grid(torch.eye(2, 3).expand(x.size(0), -1, -1), [x.size(0), 1, 4, 4]))
    ),
    "gathered": Function(
        lambda x: x.flatten(2).gather(2, torch.arange(9).expand(x.size(0), 64, -1)).unflatten(2, (3, 3))
    ),
    "taken": Function(lambda x: x.take_along_dim(x.mean(1, keepdim=True).argsort(2), 2)),
    "scattered": Function(
        lambda x: torch.zeros(x.size(0), 64, 1, 1).index_add(3, torch.zeros(8).long(), x.amax(2, keepdim=True))
    ),
}


def put(x: Tensor) -> Tensor:
    x = x.movedim(1, -1).clone()
    x[(torch.arange(8) > 3).expand(x.size(0), 8, 8)] = torch.zeros(64)
    return x.movedim(-1, 1)


MIDDLES["put"] = Function(put)


def converted(middle: nn.Module, budget: float = 0.9) -> EnsembleNet:
    torch.manual_seed(0)
    return convert(Between(middle), torch.randn(2, 3, 8, 8), split_at="input", budget=budget)


def channels_left(model: EnsembleNet) -> int:
    last = model.heads[0].get_submodule("last")
    assert isinstance(last, nn.Conv2d)
    assert last.weight.shape[1] == last.in_channels
    return last.in_channels


@pytest.mark.parametrize("name", [name for name in MIDDLES if name != "einsum"])
def test_channels_shrink_through(name: str) -> None:
    model = converted(MIDDLES[name])
    assert model.recipe is not None
    assert model.recipe.head.pinned == ()
    assert channels_left(model) < 60
    assert model.heads[0].get_submodule("first").out_channels < 64


def test_channels_that_are_a_contraction_of_themselves_shrink() -> None:
    model = converted(MIDDLES["einsum"])
    assert model.eval()(torch.randn(3, 3, 8, 8)).shape == (3, 5)


def test_an_operator_without_a_rule_keeps_its_sizes() -> None:
    model = converted(Function(lambda x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real), budget=2.0)
    assert channels_left(model) == 64


class Summary(nn.Module):
    """A layer whose own numbers the algebra cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.width = 64

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.width, "another width"
        return x * self.weight[:, None, None]


def test_what_fails_narrowed_keeps_its_width_and_users_classes_mend_it() -> None:
    class Leaf(Summary, nn.Dropout):  # a leaf, so that its code runs as it is
        def __init__(self) -> None:
            nn.Dropout.__init__(self)
            self.weight = nn.Parameter(torch.ones(64))
            self.width = 64

    with pytest.raises(BudgetError, match="do not fit"):
        converted(Leaf())

    @register(Leaf)
    class LeafOperation(Operation):
        def narrow(self, layer: Leaf, base: Leaf, sizes: LayerSizes) -> None:
            layer.width = layer.weight.numel()

    model = converted(Leaf())
    assert model.recipe is not None
    assert model.recipe.head.pinned == ()
    assert model.heads[0].get_submodule("middle").width == channels_left(model) < 60


def test_users_classes_for_operators() -> None:
    sort = Function(lambda x: x.sort(dim=2).values)
    assert channels_left(converted(sort, budget=2.0)) == 64

    @register("sort")
    class Sort(Operation):
        def couple(self, sizes: Sizes, event: Event) -> None:
            for out in event.out:
                sizes.set(out, list(sizes.axes(event.args[0])))

    assert channels_left(converted(sort)) < 60


class Stream(nn.Module):
    """A residual stream of 64 from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(4))
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def test_a_residual_stream_enters_a_head_through_a_projection() -> None:
    x = torch.randn(4, 8)
    model = convert(Stream(), x, split_at="add#2")
    head = model.heads[0]
    projection = head.get_submodule("projection")
    assert isinstance(projection, nn.Linear)
    assert projection.in_features == 64
    assert projection.out_features == head.get_submodule("last").in_features < 64


def test_a_stream_that_ends_at_the_first_layer_needs_none() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    model = convert(net, torch.randn(4, 8), split_at="1")
    assert not hasattr(model.heads[0], "projection")
    assert model.heads[0].get_submodule("2").in_features == 64


def test_normaliser_free_convolutions_divide_by_the_new_fan_in() -> None:
    from timm.layers import ScaledStdConv2d

    net = nn.Sequential(
        ScaledStdConv2d(3, 64, 3), nn.ReLU(), ScaledStdConv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 5, 1)
    )
    model = convert(net, torch.randn(2, 3, 8, 8), split_at="input")
    layer = model.heads[0].get_submodule("2")
    assert layer.scale == pytest.approx(
        net[2].gamma_in if hasattr(net[2], "gamma_in") else layer.weight[0].numel() ** -0.5
    )


def test_multihead_attention_narrows_by_whole_heads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 64)
            self.attention = nn.MultiheadAttention(64, 8, batch_first=True)
            self.last = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.last((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))

    model = convert(Block(), torch.randn(2, 5, 8), split_at="input")
    attention = model.heads[0].get_submodule("attention")
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.num_heads < 8
    assert attention.embed_dim == attention.num_heads * 8 == attention.in_proj_weight.shape[1]


def test_rules_never_contradict_the_tensors() -> None:
    """Every event's axes have the sizes of its tensors."""
    from ensemblenet.conversion.equations import Equations
    from ensemblenet.operations.axes import kept

    for middle in MIDDLES.values():
        traced = trace(Between(middle), torch.randn(2, 3, 8, 8))
        ref = traced.refs[traced.input_nodes[0]]
        equations = Equations(traced, set(traced.graph.nodes), ref, [kept(size) for size in ref.shape], set(), {})
        for refs in traced.refs.values():
            assert math.prod(axis.size for axis in equations.axes(refs)) == math.prod(refs.shape)


class RecurrentHead(nn.Module):
    """The last state of a recurrent network, classified."""

    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.recurrent = nn.GRU(16, 32, 2, batch_first=True, bidirectional=bidirectional)
        self.last = nn.Linear(64 if bidirectional else 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(self.first(x))
        return self.last(states[:, -1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gated_recurrent_units_are_narrowed(bidirectional: bool) -> None:
    x = torch.randn(3, 5, 6)
    model = convert(RecurrentHead(bidirectional), x, 2, 0.9, "first").eval()
    for head in model.heads:
        layer = head.get_submodule("recurrent")
        assert layer.hidden_size < 32
        assert layer.weight_hh_l1.shape == (3 * layer.hidden_size, layer.hidden_size)
        assert layer.input_size == layer.weight_ih_l0.shape[1] == 16
        assert layer(torch.randn(2, 7, 16))[0].shape == (2, 7, layer.hidden_size * (1 + bidirectional))
    assert model(x).shape == (3, 4)


@pytest.mark.parametrize("operation", [F.logsigmoid, lambda x: x.clone().transpose_(2, 3)])
def test_operations_that_let_channels_through(operation: Callable[..., Any]) -> None:
    model = convert(Between(Function(operation)), torch.randn(2, 3, 8, 8), 2, 0.9, "input")
    assert all(head.get_submodule("first").out_channels < 64 for head in model.heads)


class Loop(nn.Module):
    """A recurrent network by hand, whose first state the network makes itself."""

    def __init__(self, begin: Callable[["Loop", Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.begin = 96, begin
        self.first, self.enter, self.step, self.last = (nn.Linear(*w) for w in ((12, 64), (64, 96), (96, 96), (96, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        state = self.begin(self, x)
        for k in range(x.shape[1]):
            state = torch.tanh(self.enter(x[:, k]) + self.step(state))
        return self.last(state)


def written(net: Loop, x: Tensor) -> Tensor:
    states = x.new_empty((x.size(0), 2, net.hidden))
    states[:, 0] = net.enter(x[:, 0])
    states[:, 1] = 1.0
    return states.sum(1)


BEGINNINGS: dict[str, Callable[[Loop, Tensor], Tensor]] = {
    "zeros": lambda net, x: torch.zeros(x.shape[0], net.hidden, device=x.device, dtype=x.dtype),
    "ones, a tuple": lambda net, x: torch.ones((x.shape[0], 96)),
    "full": lambda net, x: torch.full(size=(x.size(0), 96), fill_value=0.5),
    "new zeros": lambda net, x: x.new_zeros(x.size(0), 96),
    "new full": lambda net, x: x.new_full((x.size(0), 96), 0.5),
    "like another": lambda net, x: torch.full_like(net.enter(x[:, 0]), 0.5),
    "expanded": lambda net, x: torch.zeros(1, 1).expand(x.size(0), 96),
    "a vector, repeated": lambda net, x: torch.zeros(96).repeat(x.size(0), 1),
    "as another's size": lambda net, x: (y := net.enter(x[:, 0])) + torch.zeros(x.size(0), y.size(1)),
    "written": written,
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_tensors_that_the_network_makes_are_as_wide_as_what_they_meet(name: str) -> None:
    torch.manual_seed(0)
    base, x = Loop(BEGINNINGS[name]), torch.randn(3, 7, 12)
    assert check_conversion(base, x, budget=0.9, split_at="input").width > 0.6
    check_full_width(base, x, "input")
    model = convert(base, x, budget=0.9, split_at="input").eval()
    assert model.recipe is not None
    assert model.recipe.head.pinned == ()
    assert model(torch.randn(5, 7, 12)).shape == (5, 5)
    torch.testing.assert_close(fuse(model)(x), model(x))


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / 64 + 1e-6),
        lambda x: F.normalize(x, dim=-1) * 64**0.5,
        lambda x: x / (x.norm(dim=-1, keepdim=True) * 64**-0.5),
        lambda x: F.rms_norm(x, (64,)),
    ],
)
def test_a_norm_by_hand_divides_by_the_channels_that_are_left(norm: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 64), Function(norm), nn.Linear(64, 5)), torch.randn(3, 16)
    check_full_width(base, x, "input")
    head = convert(base, x, budget=0.9, split_at="input").heads[0]
    seen: list[Tensor] = []
    last = head.get_submodule("2")
    last.register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    head(x)
    assert seen[0].shape[1] < 40
    torch.testing.assert_close(seen[0].square().mean(1), torch.ones(3), rtol=1e-3, atol=0)


def test_bilinear_layers_bags_and_products_with_vectors_are_narrowed() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pair, self.last = nn.Linear(16, 64), nn.Bilinear(64, 64, 32), nn.Linear(32, 5)
            self.bags, self.vector = nn.EmbeddingBag(10, 64), nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) + self.bags(torch.zeros(x.size(0), 3, dtype=torch.long, device=x.device))
            x = x + (x @ self.vector).unsqueeze(1) * torch.dot(self.vector, self.vector)
            return self.last(self.pair(x, x.relu()))

    torch.manual_seed(0)
    base, x = Rare(), torch.randn(3, 16)
    assert 0.4 < check_conversion(base, x, budget=0.9, split_at="input").width < 1
    check_full_width(base, x, "input")


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_attention_uses_its_budget_however_many_heads_it_has(num_heads: int) -> None:
    class Attention(nn.Module):
        """A layer of PyTorch's and one by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.qkv, self.last = nn.Linear(16, 256), nn.Linear(256, 768), nn.Linear(256, 5)
            self.attention = nn.MultiheadAttention(256, num_heads, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            n, length, width = x.shape
            x = x + self.attention(x, x, x, need_weights=False)[0]
            parts = self.qkv(x).reshape(n, length, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(n, length, width)
            return self.last(x.mean(1))

    torch.manual_seed(0)
    base, x = Attention(), torch.randn(2, 6, 16)
    report = check_conversion(base, x, budget=0.9, split_at="input")
    assert max(report.parameters_share, report.macs_share) > 0.75
    head = convert(base, x, budget=0.9, split_at="input").heads[0]
    layer = head.get_submodule("attention")
    assert num_heads == 1 or layer.head_dim % 4 == 0
    torch.testing.assert_close(fuse(convert(base, x, budget=0.9).eval())(x), convert(base, x, budget=0.9).eval()(x))


def test_a_budget_that_nothing_fits_names_the_buffer_that_keeps_the_width() -> None:
    class Spline(nn.Module):
        """As in Kolmogorov-Arnold networks: every channel is compared with a grid of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 3)
            self.register_buffer("grid", torch.linspace(-1, 1, 5).repeat(64, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x)[..., None] - self.grid).relu().sum(-1))

    with pytest.raises(BudgetError, match=r"What keeps its width there: the buffer grid\."):
        convert(Spline(), torch.randn(4, 8), split_at="input")


def test_attention_whose_values_alone_are_narrowed_costs_what_it_runs() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.qkv, self.out = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 32)
            self.last = nn.Linear(32, 3)
            self.register_buffer("angles", torch.rand(8))  # keeps the width of queries and keys, as positions do

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            q, k, v = self.qkv(x).view(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q * self.angles, k * self.angles, v)
            return self.last((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))

    assert check_conversion(Turned(), torch.randn(4, 12, 6)).width < 1
