"""What a trace cannot say is refused by the user's own line, and the ways out work; what it can say is not refused."""

import dataclasses
import functools
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from training_alike import Net, assert_trains_alike

import ensemblenet
from ensemblenet import ConversionError
from ensemblenet.operations import Operation, register
from ensemblenet.operations import registry as operations

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [1, 1, 1, 1], [2, 0, 0, 0]])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(operations, "_OPERATIONS", dict(operations._OPERATIONS))


class Words(Net):
    """Embeddings before the layers."""

    def __init__(self, run: Callable[[Any, Any], Tensor], **more: Any) -> None:
        super().__init__(run, **more)
        self.embed = nn.Embedding(10, 8)


# -- random numbers


class Dropped(nn.Module):
    """A layer that is left out by chance."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer, self.draw, self.own = nn.Linear(64, 64), draw, np.random.default_rng(0)

    def forward(self, h: Tensor) -> Tensor:
        if self.training and self.draw(self) < 0.5:
            return h
        return h + self.layer(h)


class KeptWhole(Dropped):
    """The same, to be kept whole."""


def _with(layer: nn.Module) -> Net:
    return Net(lambda net, x: net.last(net.layer(net.first(x)).relu()), layer=layer)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda layer: random.random(), "draws random numbers in Python or NumPy"),
        (lambda layer: random.choice([0.1, 0.9]), "draws random numbers in Python or NumPy"),
        (lambda layer: np.random.rand(), "draws random numbers in Python or NumPy"),
        (lambda layer: layer.own.random(), "draws random numbers in Python or NumPy"),
        (lambda layer: torch.rand(1), r"reads random numbers \(__bool__\)"),
        (lambda layer: torch.zeros(1).uniform_().item(), r"reads random numbers \(item\)"),
    ],
)
def test_a_course_that_depends_on_chance_is_refused(draw: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ConversionError, match=rf"^layer \(Dropped\) at test_refusals.py:\d+ {words}"):
        ensemblenet.split_points(_with(Dropped(draw)), X)


def test_chance_in_a_layer_that_is_kept_whole_is_its_own_affair(registered: None) -> None:
    @register(KeptWhole)
    class _Whole(Operation): ...

    ensemblenet.split_points(_with(KeptWhole(lambda layer: random.random())), X)


def test_random_tensors_and_rates_of_zero_are_followed() -> None:
    def noisy(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        if net.training and torch.rand([]) < 0.0:  # as transformers skips layers
            return net.last(h)
        scale = torch.rand(len(h), 1).round() if net.training else 1.0
        return net.last(net.middle(h) * 0.5 + h.detach() * 0 + h * scale if net.training else h + net.middle(h))

    with pytest.raises(ConversionError, match="different operations in training and evaluation mode"):
        ensemblenet.split_points(Net(noisy), X)  # a difference that is said to be one

    def rated(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        return net.last(h) if net.training and torch.rand([]) < 0.0 else net.last(F.dropout(h, 0.1, net.training))

    ensemblenet.split_points(Net(rated), X)


def test_a_trace_leaves_all_random_states_as_they_were() -> None:
    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore

    even = Net(lambda net, x: net.last(F.dropout(net.first(x), 0.5, net.training)))
    uneven = _with(Dropped(lambda layer: random.random() + np.random.rand()))
    before = states()
    ensemblenet.split_points(even, X)
    with pytest.raises(ConversionError):
        ensemblenet.split_points(uneven, X)
    assert states() == before


# -- values of the input


def _nothing_kept(net: Any, ids: Tensor) -> Tensor:
    keep = torch.ones(ids.shape[0], ids.shape[1], 1)
    keep[ids == 0] = 0
    h = net.first(net.embed(ids))
    return net.last((h * keep if keep.sum() > 3 else h).mean(1))


def _through_a_view(net: Any, ids: Tensor) -> Tensor:
    keep = torch.ones(ids.shape[0], ids.shape[1], 1)
    keep.view(-1)[0] = ids.float().mean()
    return net.last(net.first(net.embed(ids)).mean(1)) * keep.sum().item()


def _through_out(net: Any, ids: Tensor) -> Tensor:
    padding = torch.zeros(ids.shape, dtype=torch.bool)
    torch.eq(ids, 0, out=padding)
    return net.last(net.first(net.embed(ids)).mean(1)) * int(padding.any())


def _through_copy(net: Any, ids: Tensor) -> Tensor:
    lengths = torch.zeros(ids.shape[0])
    lengths.copy_((ids > 0).sum(1))
    return net.last(net.first(net.embed(ids)).mean(1)) * max(lengths.tolist())


@pytest.mark.parametrize("forward", [_nothing_kept, _through_a_view, _through_out, _through_copy])
def test_reading_what_was_written_from_the_input_is_refused(forward: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ConversionError, match=r"^Words at test_refusals.py:\d+ reads the values of a tensor"):
        ensemblenet.split_points(Words(forward), IDS)


def _masked_write(net: Any, ids: Tensor) -> Tensor:
    keep = torch.ones(ids.shape[0], ids.shape[1], 1)
    keep[ids == 0] = 0
    return net.last((net.first(net.embed(ids)).relu() * keep).mean(1))


def _unused_results(net: Any, ids: Tensor) -> Tensor:
    h = net.first(net.embed(ids))
    h[:, 2:].mul_(0.5)
    F.relu(h[:, :2], inplace=True)
    return net.last(h.mean(1))


def _last_words(net: Any, ids: Tensor) -> Tensor:
    return net.last(net.first(net.embed(ids)).relu()[torch.arange(ids.shape[0]), (ids > 0).sum(1) - 1])


def _one_hot(net: Any, ids: Tensor) -> Tensor:
    return net.last(net.middle(F.one_hot(ids, 64).float()).mean(1))


@pytest.mark.parametrize("forward", [_masked_write, _unused_results, _last_words, _one_hot])
def test_values_that_stay_in_tensors_are_followed(forward: Callable[[Any, Tensor], Tensor]) -> None:
    base = Words(forward)
    model = ensemblenet.convert(base, IDS, 1, 5.0, split_at="input", init="inherit").eval()
    for ids in (IDS, IDS.flip(0, 1), (IDS * 2) % 7):
        torch.testing.assert_close(model(ids), base.eval()(ids))


def _rows(net: Any, ids: Tensor) -> Tensor:
    h = net.embed(ids).mean(1)
    rows = torch.where(ids[:, 0] > 1)[0]
    return net.last(net.middle(torch.zeros(len(ids), 64).index_add(0, rows, net.first(h[rows]))))


@pytest.mark.parametrize(
    "forward",
    [
        _rows,
        lambda net, ids: net.last(net.first(net.embed(ids)[ids > 0]).mean(0, keepdim=True).expand(len(ids), -1)),
        lambda net, ids: net.last(net.first(torch.masked_select(net.embed(ids), ids[..., None] > 0).view(-1, 8))),
        lambda net, ids: net.last(net.first(net.embed(torch.unique(ids, return_inverse=True)[1])).mean(1)),
        lambda net, ids: net.last(net.first(net.embed(ids)[:, : (ids > 0).sum(1).max()]).mean(1)),
        lambda net, ids: net.last(net.middle(F.pad(F.one_hot(ids).float(), (0, 58))).mean(1)),
        lambda net, ids: net.last(net.first(net.embed(ids).repeat_interleave(ids[:, 0], 0)).mean(1)),
    ],
    ids=["where", "mask", "masked_select", "unique", "slice", "one_hot", "repeat_interleave"],
)
def test_shapes_that_depend_on_values_are_refused(forward: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ConversionError, match=r"^Words at test_refusals.py:\d+ makes a tensor whose shape depends"):
        ensemblenet.split_points(Words(forward), IDS)


class Experts(nn.Module):
    """Each example goes to one of four experts, and an expert without examples is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        choice, out = self.gate(h).argmax(-1), torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            rows = torch.where(choice == k)[0]
            if len(rows):
                out = out.index_add(0, rows, expert(h[rows]))
        return h + out


class WholeExperts(Experts):
    """The same, to be kept whole."""


def test_a_mixture_of_experts_is_refused_and_right_where_it_is_kept_whole(registered: None) -> None:
    x = torch.randn(64, 8)
    with pytest.raises(ConversionError, match=r"^layer \(Experts\) at test_refusals.py:\d+ makes .*register"):
        ensemblenet.split_points(_with(Experts()), x)

    @register(WholeExperts)
    class _Whole(Operation): ...

    base = _with(WholeExperts()).eval()
    whole = ensemblenet.convert(base, x, 1, 5.0, split_at="first", init="inherit").eval()
    torch.testing.assert_close(whole(x), base(x))
    model = ensemblenet.convert(base, x, split_at="input", budget=5.0)
    assert {name.split(".")[2] for name, _ in model.heads[0].named_parameters() if "experts" in name} == set("0123")
    model.train()(torch.randn(256, 8)).sum().backward()  # examples for every expert


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 64, batch_first=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.recurrent(packed)[1][-1]


class WholePacking(Packing):
    """The same, to be kept whole."""


def test_packed_sequences_are_refused_by_name_and_right_in_a_whole_layer(registered: None) -> None:
    forward = lambda net, ids: net.last(net.packing(net.embed(ids), (ids != 0).sum(1)))  # noqa: E731
    with pytest.raises(ConversionError, match=r"^packing \(Packing\) at test_refusals.py:\d+ packs sequences"):
        ensemblenet.split_points(Words(forward, packing=Packing()), IDS)

    @register(WholePacking)
    class _Whole(Operation): ...

    base = Words(forward, packing=WholePacking()).eval()
    model = ensemblenet.convert(base, IDS, 1, 5.0, split_at="input", init="inherit").eval()
    for ids in (IDS, IDS.flip(0)):
        torch.testing.assert_close(model(ids), base(ids))


# -- what is not refused


def _branch(drop: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x) * 1
        return net.last(h + net.middle(drop(net, h)))

    return forward


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((x.shape[0], 1), 0.9)) / 0.9 if self.training else x


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.Dropout(0.1, inplace=True), DropPath(), nn.Identity()])
def test_a_layer_that_returns_its_input_is_one_branch_of_two(layer: nn.Module) -> None:
    assert_trains_alike(Net(_branch(lambda net, h: net.layer(h)), layer=layer), X)


def test_functions_that_return_their_input_are_one_branch_of_two() -> None:
    assert_trains_alike(Net(_branch(lambda net, h: F.dropout(h, 0.1, net.training))), X)
    assert_trains_alike(Net(_branch(lambda net, h: h.contiguous().float())), X)


@functools.lru_cache
def _target(*sizes: int) -> tuple[int, ...]:
    return sizes


def test_sizes_are_not_taken_out_of_caches_of_functions() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        first = net.middle.bias.expand(_target(x.size(0), 1, 64))
        return net.last(torch.cat([first, h], 1).mean(1))

    base = Net(forward)
    base(SEQUENCES)  # the cache knows these sizes
    model = ensemblenet.convert(base, SEQUENCES, 1, 5.0, split_at="input", init="inherit").eval()
    assert model(torch.randn(5, 6, 8)).shape == (5, 3)
    assert all(type(size) is int for size in _target(2, 1, 64))


def test_tables_find_sizes() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        assert x.shape[1] in {3, 6}
        return net.last(net.first(x).mean(1) * {6: 2.0, 3: 1.0}[x.shape[1]])

    ensemblenet.split_points(Net(forward), SEQUENCES)


def test_einops_is_followed() -> None:
    einops = pytest.importorskip("einops")

    def forward(net: Any, x: Tensor) -> Tensor:
        h = einops.rearrange(net.first(x), "b n (h d) -> b h n d", h=4)
        h = net.middle(einops.rearrange(h.softmax(-2), "b h n d -> b n (h d)"))
        h = h + einops.repeat(net.middle.bias, "d -> b n d", b=x.shape[0], n=x.shape[1])
        return net.last(einops.reduce(h, "b n d -> b d", "mean"))

    base = Net(forward)
    for _ in range(2):  # its caches are full the second time
        model = ensemblenet.convert(base, SEQUENCES, 1, 5.0, split_at="input", init="inherit").eval()
        x = torch.randn(5, 6, 8)
        torch.testing.assert_close(model(x), base.eval()(x))
    assert ensemblenet.convert(base, SEQUENCES, budget=0.9).recipe.head.width < 1


def test_len_is_the_batch_size() -> None:
    model = ensemblenet.convert(Net(lambda net, x: net.last(net.first(x).view(len(x), 64))), X)
    assert model.eval()(torch.randn(7, 8)).shape == (7, 3)


@torch.jit.script
def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_scripted_code_is_one_operation_unless_it_has_weights() -> None:
    assert_trains_alike(Net(lambda net, x: net.last(_swish(net.first(x)))), X)
    forward = lambda net, x: net.last(net.scripted(net.first(x)))  # noqa: E731
    assert_trains_alike(Net(forward, scripted=torch.jit.script(Swish())), X)
    with pytest.raises(ConversionError, match=r"^scripted \(\w+\) at test_refusals.py:\d+ is a scripted module with"):
        ensemblenet.split_points(Net(forward, scripted=torch.jit.script(Deep())), X)


@dataclasses.dataclass
class Encoded:
    features: Tensor
    scale: Any = None


class EncodedTuple(NamedTuple):
    features: Tensor
    size: int


class Opaque:
    def __init__(self, features: Tensor) -> None:
        self.features = features


class Encoder(nn.Module):
    """Kept whole, because it does more in training mode."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(64, 64), wrap

    def forward(self, x: Tensor) -> Any:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.wrap(self.layer(x).relu())


class Scaled(nn.Module):
    def forward(self, x: Encoded) -> Tensor:
        return x.features * (x.scale + torch.randn_like(x.scale) if self.training else x.scale)


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda h: {"h": h, "none": None}, lambda out: out["h"]),
        (Encoded, lambda out: out.features),
        (lambda h: EncodedTuple(h, 3), lambda out: out.features),
        (lambda h: {"a": [h, {"b": (h * 2,)}]}, lambda out: out["a"][1]["b"][0]),
    ],
    ids=["dict", "dataclass", "named tuple", "nested"],
)
def test_whole_layers_return_tensors_in_containers(wrap: Callable[[Tensor], Any], take: Callable[[Any], Any]) -> None:
    base = Net(lambda net, x: net.last(take(net.encoder(net.first(x)))), encoder=Encoder(wrap))
    assert_trains_alike(base, X)
    assert ensemblenet.convert(base, X, budget=0.9).recipe.head.width < 1


def test_whole_layers_take_dataclasses() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        return net.last(net.scaled(Encoded(h, h.sigmoid())))

    assert_trains_alike(Net(forward, scaled=Scaled()), X)


def test_a_whole_layer_that_returns_something_else_is_named() -> None:
    base = Net(lambda net, x: net.last(net.encoder(net.first(x)).features), encoder=Encoder(Opaque))
    with pytest.raises(ConversionError, match=r"^encoder \(Encoder\) at .* returns Opaque"):
        ensemblenet.split_points(base, X)


# -- what modules assign


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return x - self.mean


def test_a_small_module_that_assigns_its_buffer_is_kept_whole() -> None:
    base = Net(lambda net, x: net.last(net.norm(net.first(x)).relu()), norm=RunningMean())
    model = assert_trains_alike(base, X)
    means = [value for name, value in model.named_buffers() if name.endswith("mean")]
    assert len(means) == 1
    assert means[0].abs().max() > 0
    assert torch.equal(base.norm.mean, torch.zeros(64))


def test_a_large_module_that_assigns_its_buffer_is_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        net.mean = 0.9 * net.mean + 0.1 * h.mean(0).detach()
        return net.last(h - net.mean)

    base = Net(forward)
    base.register_buffer("mean", torch.zeros(64))
    with pytest.raises(ConversionError, match=r"^Net assigns a new tensor to its buffer 'mean'"):
        ensemblenet.split_points(base, X)


def test_features_that_are_only_left_behind_are_no_matter() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.features = net.first(x)
        net.all_features.append(net.features)
        return net.last(net.middle(net.features).relu())

    base = Net(forward, all_features=[])
    base(X)  # so its features have a gradient's history
    assert_trains_alike(Net(forward, all_features=[]), X)
    base.all_features.clear()
    assert ensemblenet.convert(base, X, split_at="input").train()(X).shape == (2, 4, 3)


def test_memory_from_call_to_call_is_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        before = torch.zeros_like(h) if net.memory is None else net.memory
        net.memory = (h + before).detach().mean(0, keepdim=True)
        return net.last(h + 0.1 * before)

    with pytest.raises(ConversionError, match=r"^Net at test_refusals.py:\d+ reads self.memory"):
        ensemblenet.split_points(Net(forward, memory=None), X)


def _plain(net: Any, x: Tensor) -> Tensor:
    return net.last(net.middle(net.first(x)).relu())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("has_run", [False, True])
def test_weights_that_hooks_compute_are_copied(has_run: bool) -> None:
    base = Net(_plain)
    nn.utils.weight_norm(base.middle)
    if has_run:
        base(X)
    model = ensemblenet.convert(base, X, 1, 5.0, split_at="input", init="inherit").eval()
    torch.testing.assert_close(model(X), base.eval()(X))
    ensemblenet.convert(base, X, 2, 5.0, split_at="middle").train()(X).sum().backward()


def test_what_cannot_be_copied_is_named() -> None:
    base = Net(_plain)
    base.last.guard = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ConversionError, match=r"^The base cannot be copied, because of last.guard \(lock\)"):
        ensemblenet.split_points(base, X)
    base = Net(lambda net, x: net.last(F.linear(net.first(x), net.doubled)))
    base.doubled = base.middle.weight * 2
    with pytest.raises(ConversionError, match=r"^doubled of Net is a tensor that was computed from others"):
        ensemblenet.split_points(base, X)


def test_the_users_line_goes_before_a_librarys() -> None:
    einops = pytest.importorskip("einops")
    forward = lambda net, x: net.last(einops.rearrange(net.first(x), "b (h d) -> b d h", h=7))  # noqa: E731
    with pytest.raises(ConversionError, match=r"failed in Net at test_refusals.py:\d+: EinopsError"):
        ensemblenet.split_points(Net(forward), X)


def test_a_padded_encoder_is_opened_and_the_fast_path_is_left_as_it_was() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)

    def forward(net: Any, ids: Tensor) -> Tensor:
        h = net.encoder(net.first(net.embed(ids)), src_key_padding_mask=ids == 0)
        return net.last((h * (ids != 0)[..., None]).sum(1))

    ids = IDS[:2]
    base = Words(forward, encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model = ensemblenet.convert(base, ids, budget=0.9)
    assert model.recipe.head.width < 1
    assert torch.backends.mha.get_fastpath_enabled()
    model = ensemblenet.convert(base, ids, 1, 5.0, split_at="input", init="inherit").eval()
    torch.testing.assert_close(model(ids), base.eval()(ids), rtol=1e-4, atol=1e-5)
