"""What heads inherit, against slow versions of importance written for each layer type."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ensemblenet
from ensemblenet.conversion.importance import deal
from ensemblenet.errors import ConversionError
from ensemblenet.models import CifarResNet

ROWS, IMAGES = torch.randn(6, 8), torch.randn(4, 3, 8, 8)
BATCHES = [(torch.randn(6, 8), torch.randint(3, (6,))) for _ in range(3)]


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))


def _convolutions() -> nn.Sequential:
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def _grouped() -> nn.Sequential:
    layers = [nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=8), nn.GroupNorm(8, 32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


class Attends(nn.Module):
    """One layer of attention in a stream of 32 features, 8 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.classify = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 3)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1).expand(-1, 3, -1)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 8, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.classify(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.classify = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.steps(x.unsqueeze(1))[0][:, -1])


def _made_uneven(base: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return base.eval()


Values = dict[str, Tensor]


# For each kind of layer, the squares that count for each channel or attention head, by name of the values.
def _of_perceptron(v: Values) -> Tensor:
    return torch.stack(
        [(v["0.weight"][c] ** 2).sum() + v["1.weight"][c] ** 2 + (v["3.weight"][:, c] ** 2).sum() for c in range(32)]
    )


def _of_convolutions(v: Values) -> Tensor:
    return torch.stack(
        [(v["0.weight"][c] ** 2).sum() + v["1.weight"][c] ** 2 + (v["3.weight"][:, c] ** 2).sum() for c in range(32)]
    )


def _of_groups(v: Values) -> Tensor:
    found = []
    for group in range(8):
        own = slice(4 * group, 4 * group + 4)
        parts = (v["0.weight"][own], v["1.weight"][own], v["2.weight"][own], v["5.weight"][:, own])
        found.append(torch.stack([(part**2).sum() for part in parts]).sum())
    return torch.stack(found)


def _of_attention(v: Values) -> Tensor:
    found = []
    for head in range(8):
        rows = [32 * part + 4 * head + feature for part in range(3) for feature in range(4)]
        columns = slice(4 * head, 4 * head + 4)
        found.append((v["qkv.weight"][rows] ** 2).sum() + (v["out.weight"][:, columns] ** 2).sum())
    return torch.stack(found)


def _of_recurrent(v: Values) -> Tensor:
    found = []
    for c in range(32):
        gates = [32 * gate + c for gate in range(3)]
        found.append((v["steps.weight_ih_l0"][gates] ** 2).sum() + (v["steps.weight_hh_l0"][gates] ** 2).sum())
        found[-1] = found[-1] + (v["steps.weight_hh_l0"][:, c] ** 2).sum() + (v["classify.weight"][:, c] ** 2).sum()
    return torch.stack(found)


# a base, its inputs, the parameter that shows what was kept, how many of its rows stand for one, and the slow version
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor, str, int, Callable[[Values], Tensor]]] = {
    "linear": (_perceptron, ROWS, "0.weight", 1, _of_perceptron),
    "convolution": (_convolutions, IMAGES, "0.weight", 1, _of_convolutions),
    "groups": (_grouped, IMAGES, "0.weight", 4, _of_groups),
    "attention": (Attends, ROWS, "qkv.weight", 4, _of_attention),
    "recurrent": (Recurrent, ROWS, "steps.weight_ih_l0", 1, _of_recurrent),
}


def _kept(head: nn.Module, base: nn.Module, name: str, size: int) -> list[int]:
    """Which channels, or groups of them, a head has, found by values alone: biases are never narrowed twice."""
    bias = name.replace("weight", "bias")
    own, whole = head.get_parameter(bias).tolist(), base.get_parameter(bias).tolist()
    return sorted({whole.index(value) // size for value in own})


@pytest.mark.parametrize("name", KINDS)
def test_one_head_keeps_the_largest(name: str) -> None:
    make, x, parameter, size, slow = KINDS[name]
    base = _made_uneven(make())
    model = ensemblenet.convert(base, x, 1, 4.0, "input", init="inherit", importance="magnitude", width=0.5)
    scores = slow(dict(base.named_parameters()))
    kept = [place for place in _kept(model.heads[0], base, parameter, size) if place < len(scores)]
    assert 0 < len(kept) < len(scores)
    assert kept == sorted(scores.topk(len(kept)).indices.tolist())


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    base = _made_uneven(_perceptron())
    squares = {name: torch.zeros_like(parameter) for name, parameter in base.named_parameters()}
    for inputs, targets in BATCHES:
        base.zero_grad()
        F.cross_entropy(base(inputs), targets).backward()
        for name, parameter in base.named_parameters():
            assert parameter.grad is not None
            squares[name] += (parameter * parameter.grad).detach() ** 2
    base.zero_grad()
    values = {name: square.sqrt() for name, square in squares.items()}
    scores = _of_perceptron(values) + torch.stack(
        [values["0.bias"][c] ** 2 + values["1.bias"][c] ** 2 for c in range(32)]
    )
    # before the repair, which is another test's: a bias is kept as it is where nothing scales it
    options: dict[str, Any] = {"init": "inherit", "importance": "taylor", "width": 0.5}
    model = ensemblenet.convert(base, ROWS, 1, 4.0, "input", **options, calibration=BATCHES)
    kept = [base[1].weight.tolist().index(value) for value in model.heads[0].get_parameter("1.weight").tolist()]  # type: ignore[union-attr, operator]
    assert sorted(kept) == sorted(scores.topk(len(kept)).indices.tolist())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_scale_is_the_normalisations_and_magnitude_elsewhere() -> None:
    base = _made_uneven(_convolutions())
    model = ensemblenet.convert(base, IMAGES, 1, 4.0, "input", init="inherit", importance="scale", width=0.5)
    for layer, scores in (
        ("0", base.get_parameter("1.weight").abs()),
        ("3", base.get_parameter("3.weight").square().sum((1, 2, 3)) + base.get_parameter("7.weight").square().sum(0)),
    ):
        kept = _kept(model.heads[0], base, f"{layer}.weight", 1)
        assert kept == sorted(scores.topk(len(kept)).indices.tolist())


def test_a_function_sees_each_group_whole() -> None:
    base = _made_uneven(_perceptron())
    seen: dict[str, tuple[int, ...]] = {}

    def last(group: list[tuple[str, Tensor]]) -> Tensor:
        seen.update({name: tuple(values.shape) for name, values in group})
        return torch.arange(len(group[0][1]))

    model = ensemblenet.convert(base, ROWS, 1, 4.0, "input", init="inherit", importance=last, width=0.5)
    assert _kept(model.heads[0], base, "0.weight", 1) == list(range(16, 32))
    assert seen == {"0.weight": (32, 8), "0.bias": (32, 1), "1.weight": (32, 1), "1.bias": (32, 1), "3.weight": (32, 3)}


# -- heads together


def test_cards_are_dealt_so_that_all_are_kept() -> None:
    for number, size, heads in itertools.product(range(1, 9), range(1, 13), range(1, 5)):
        if number > size:
            continue
        order = torch.randperm(size).tolist()
        hands = [deal(order, number, head, heads) for head in range(heads)]
        assert all(hand == sorted(set(hand)) and len(hand) == number for hand in hands)
        together = set().union(*hands)
        if heads * number >= size:
            assert together == set(range(size))
        else:
            assert len(together) == number // 2 + heads * (number - number // 2)
            assert all(set(order[: number // 2]) <= set(hand) for hand in hands)


def test_heads_share_the_largest_and_keep_all_together() -> None:
    base = _made_uneven(_convolutions())
    model = ensemblenet.convert(base, IMAGES, 3, 4.0, "input", init="inherit", importance="magnitude", width=0.5)
    kept = [_kept(head, base, "0.weight", 1) for head in model.heads]
    order = _of_convolutions(dict(base.named_parameters())).argsort(descending=True).tolist()
    assert set().union(*map(set, kept)) == set(range(32))
    assert set(order[:8]) <= set.intersection(*map(set, kept))
    assert kept[0] != kept[1] != kept[2]


def test_the_seed_decides_between_equals_alone() -> None:
    base = _convolutions()

    def kept(seed: int, importance: str, network: nn.Module) -> list[int]:
        options: dict[str, Any] = {"init": "inherit", "importance": importance, "width": 0.5}
        model = ensemblenet.convert(network, IMAGES, 1, 4.0, "input", seed, **options)
        return _kept(model.heads[0], network, "0.weight", 1)

    assert kept(0, "scale", base) == kept(0, "scale", base) != kept(1, "scale", base)  # all scales are 1
    assert kept(0, "random", base) != kept(1, "random", base)
    uneven = _made_uneven(base)
    assert kept(0, "scale", uneven) == kept(1, "scale", uneven)


@pytest.mark.parametrize("importance", ["magnitude", "scale", "taylor", "loss", "random"])
def test_a_head_of_full_width_and_depth_is_the_base_to_the_bit(importance: Any) -> None:
    base = CifarResNet(depth=14, width=8, num_classes=3).train()
    for _ in range(2):
        base(torch.randn(8, 3, 8, 8))
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))]
    options: dict[str, Any] = {"init": "inherit", "importance": importance, "calibration": batches}
    model = ensemblenet.convert(base, IMAGES, 1, 2.0, "stem", **options).eval()
    assert torch.equal(model(IMAGES), base.eval()(IMAGES))
    state = {name.removeprefix("trunk.").removeprefix("heads.0."): own for name, own in model.state_dict().items()}
    assert all(torch.equal(state[name], own) for name, own in base.state_dict().items())


# -- blocks


class Added(nn.Sequential):
    def __init__(self, size: int) -> None:
        super().__init__(nn.Linear(32, size), nn.ReLU(), nn.Linear(size, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Stream(nn.Module):
    """Layers that are added to a stream; `sizes` of what is inside of each, and what each is multiplied by."""

    def __init__(self, sizes: tuple[int, ...] = (16,) * 5, changes: tuple[float, ...] = (1, 0.1, 2, 0.2, 1)) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.layers = nn.ModuleList(Added(n) for n in sizes)
        with torch.no_grad():
            for layer, change in zip(self.layers, changes, strict=True):
                for parameter in layer[2].parameters():  # type: ignore[index, union-attr]
                    parameter *= change

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def _layers(head: nn.Module, base: Stream) -> list[int]:
    """Which layers' values a head has, in order; the weights inside are never scaled without calibration."""
    places = [n for n in range(5) if any(name.startswith(f"layers.{n}.") for name, _ in head.named_parameters())]
    inside = [layer[0].weight for layer in base.layers]  # type: ignore[index]
    own = [head.get_parameter(f"layers.{n}.0.weight") for n in places]
    return [next(n for n, weight in enumerate(inside) if torch.equal(weight, one)) for one in own]  # type: ignore[arg-type]


def test_short_heads_keep_other_blocks_and_all_together() -> None:
    base = Stream().eval()
    options: dict[str, Any] = {"init": "inherit", "importance": "magnitude", "depth": 0.5, "width": 1.0}
    model = ensemblenet.convert(base, ROWS, 2, 4.0, "input", **options)
    kept = [_layers(head, base) for head in model.heads]
    assert sorted(set(kept[0]) | set(kept[1])) == [0, 1, 2, 3, 4]
    assert all(own == sorted(own) and own[0] == 0 and len(own) == 3 for own in kept)
    for head, own in zip(model.heads, kept, strict=True):
        x = base.first(ROWS)
        for n in own:
            x = base.layers[n](x)
        torch.testing.assert_close(head(ROWS), base.last(x))


def test_calibration_keeps_the_blocks_that_turn_the_stream_most() -> None:
    base, batches = Stream().eval(), BATCHES[:1]
    x, turns = base.first(batches[0][0]), []
    for layer in base.layers:
        given = layer(x)
        turns.append((1 - F.cosine_similarity(x, given)).mean().item())
        x = given
    options: dict[str, Any] = {"init": "inherit", "depth": 0.25, "width": 1.0, "calibration": batches}
    model = ensemblenet.convert(base, ROWS, 1, 4.0, "input", **options)
    assert turns[_kept_layer(model.heads[0], base)] == max(turns[1:])


def _kept_layer(head: nn.Module, base: Stream) -> int:
    """The layer whose values the one behind the first has, which repair has scaled."""
    (kept,) = {
        n
        for n, layer in enumerate(base.layers)
        for name, own in head.named_parameters()
        if name.endswith("0.weight") and name != "layers.0.0.weight"
        if torch.allclose(F.normalize(own), F.normalize(layer[0].weight), atol=1e-5)  # type: ignore[index]
    }
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_by_loss_the_block_without_which_it_is_highest_stays(seed: int) -> None:
    torch.manual_seed(seed)
    base, losses = Stream().eval(), []
    for left_out in range(1, 5):
        of_batches = []
        for x, y in BATCHES:
            x = base.first(x)
            for n, layer in enumerate(base.layers):
                x = x if n == left_out else layer(x)
            of_batches.append(F.cross_entropy(base.last(x), y).item())
        losses.append(sum(of_batches))
    options: dict[str, Any] = {"init": "inherit", "importance": "loss", "depth": 0.25, "width": 1.0}
    model = ensemblenet.convert(base, ROWS, 1, 4.0, "input", **options, calibration=BATCHES)
    assert losses[_kept_layer(model.heads[0], base) - 1] == max(losses)


def test_blocks_of_other_sizes_stay_where_they_are() -> None:
    base = Stream(sizes=(16, 16, 24, 16, 24)).eval()
    options: dict[str, Any] = {"init": "inherit", "importance": "magnitude", "depth": 0.5, "width": 1.0}
    with pytest.warns(UserWarning, match="All heads begin alike"):
        model = ensemblenet.convert(base, ROWS, 2, 4.0, "input", **options)
    assert _layers(model.heads[0], base) == _layers(model.heads[1], base) == [0, 1, 3]


def test_narrow_and_short_heads_deal_out_the_channels_of_the_blocks_that_they_share(tmp_path: Any) -> None:
    base = _made_uneven(Stream())
    options: dict[str, Any] = {"init": "inherit", "importance": "magnitude", "depth": 0.5, "width": 0.5}
    model = ensemblenet.convert(base, ROWS, 3, 4.0, "input", **options).eval()
    x = torch.randn(5, 8)
    torch.testing.assert_close(ensemblenet.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)
    ensemblenet.save(model, tmp_path / "saved")
    again = ensemblenet.load(tmp_path / "saved", Stream())
    assert torch.equal(again.eval()(x), model(x))


# -- what cannot be


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "taylor without data": ({"importance": "taylor"}, "needs data: pass calibration="),
    "loss without data": ({"importance": "loss"}, "needs data: pass calibration="),
    "scale without normalisation": ({"importance": "scale"}, "no normalisation"),
    "no such importance": ({"importance": "size"}, "importance must be one of .*'size'"),
    "fresh heads": ({"importance": "magnitude", "init": "fresh"}, 'pass init="inherit"'),
    "fresh heads with data": ({"calibration": BATCHES, "init": "fresh"}, 'pass init="inherit"'),
    "no batches": ({"calibration": []}, "has no batches"),
    "no loader": ({"calibration": 3}, "must be a loader"),
    "no targets": ({"calibration": [torch.randn(6, 8)]}, "must be a loader|targets"),
    "another rank": ({"calibration": [(torch.randn(6, 2, 8), torch.zeros(6).long())]}, r"got inputs of float32 \(N, 2"),
    "another width": (
        {"calibration": [(torch.randn(6, 9), torch.zeros(6).long())]},
        r"calibration batch of shape \(6, 9",
    ),
    "no such class": ({"calibration": [(torch.randn(6, 8), torch.full((6,), 7))]}, "calibration batch of shape"),
    "a score too few": ({"importance": lambda group: torch.zeros(2)}, r"each of \d+ channels"),
    "no score": ({"importance": lambda group: 1.0}, "got float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str) -> None:
    options, message = BAD[name]
    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    with pytest.raises(ConversionError, match=message) as error:
        ensemblenet.convert(base, ROWS, **{"init": "inherit", "split_at": "input", **options})
    assert "\n" not in str(error.value)
    assert not re.search(r"  ", str(error.value))


def test_quantised_weights_are_refused_by_name() -> None:
    base = torch.ao.quantization.quantize_dynamic(_perceptron(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ConversionError, match=r"^0 \(Linear\) is quantised"):
        ensemblenet.convert(base, ROWS, init="inherit")


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_adapters_are_inherited_as_they_are_or_refused_by_name() -> None:
    base = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Adapted(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 3))
    model = ensemblenet.convert(base, ROWS, 1, 2.0, "input", init="inherit").eval()
    assert torch.equal(model(ROWS), base.eval()(ROWS))
    assert [name for name, own in model.named_parameters() if not own.requires_grad] == [
        f"heads.0.2.layer.{name}" for name in ("weight", "bias")
    ]
    with pytest.raises(ConversionError, match=r"2\.layer\.bias, 2\.layer\.weight"):
        ensemblenet.convert(base, ROWS, 2, 1.0, "input", init="inherit")
