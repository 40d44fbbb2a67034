"""Heads without some of the base's blocks, against the base with those blocks taken out by hand."""

import copy
import importlib
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ensemblenet
from ensemblenet.conversion.blocks import depths_behind, find_runs
from ensemblenet.conversion.split import find_cuts
from ensemblenet.conversion.trace import trace
from ensemblenet.errors import BudgetError, ConversionError
from ensemblenet.models import CifarResNet
from ensemblenet.recipe import Recipe
from ensemblenet.testing import check_conversion

IMAGES, ROWS = torch.randn(4, 3, 16, 16), torch.randn(4, 8)
SQUARES = torch.randn(2, 3, 64, 64)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.skip(x)
        return F.relu(out, inplace=True)


class Layers(nn.Module):
    """Layers in a loop of `forward`, with no module around each."""

    def __init__(self, number: int = 4, residual: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(number))
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(number))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + torch.tanh(layer(norm(x))) if self.residual else torch.relu(layer(norm(x)))
        return self.last(x)


class Attending(nn.Module):
    """A small transformer: in each layer attention and a perceptron, each added to the stream."""

    def __init__(self, number: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(6, 32))
        self.layers = nn.ModuleList(nn.ModuleDict(self._layer()) for _ in range(number))
        self.classify = nn.Linear(32, 3)

    @staticmethod
    def _layer() -> dict[str, nn.Module]:
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
        perceptron = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        return {"norm": nn.LayerNorm(32), "attention": attention, "perceptron": perceptron}

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for layer in self.layers:
            y = layer["norm"](x)  # type: ignore[index]
            x = x + layer["attention"](y, y, y, need_weights=False)[0]  # type: ignore[index]
            x = x + layer["perceptron"](x)  # type: ignore[index]
        return self.classify(x.mean(1))


def _stages() -> nn.Sequential:
    stages = [
        nn.Sequential(*[Residual(a if i == 0 else b, b, s if i == 0 else 1) for i in range(3)])
        for a, b, s in ((16, 16, 1), (16, 32, 2))
    ]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )


def _plain() -> nn.Sequential:
    hidden = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1))]
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *hidden, nn.Linear(32, 3))


class Nothing(nn.Module):
    """In the place of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _without(base: nn.Module, names: list[str]) -> nn.Module:
    shorter = copy.deepcopy(base)
    for name in names:
        shorter.set_submodule(name, Nothing())
    return shorter


def _without_layers(base: nn.Module, numbers: list[int]) -> nn.Module:
    shorter = copy.deepcopy(base)
    for lists in (m for m in shorter.children() if isinstance(m, nn.ModuleList)):
        for number in reversed(numbers):
            del lists[number]
    return shorter


# a base, its inputs, a depth, how many blocks heads are without, and the base without them, made by hand
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, float, int, Callable[[nn.Module], nn.Module]]] = {
    "stages": (_stages, IMAGES, 0.0, 4, lambda base: _without(base, ["2.1", "2.2", "3.1", "3.2"])),
    "stages, half": (_stages, IMAGES, 0.5, 2, lambda base: _without(base, ["2.2", "3.2"])),
    "loop": (Layers, ROWS, 0.0, 3, lambda base: _without_layers(base, [1, 2, 3])),
    "loop, two of three": (Layers, ROWS, 0.67, 1, lambda base: _without_layers(base, [3])),
    "loop of plain layers": (lambda: Layers(residual=False), ROWS, 0.34, 2, lambda base: _without_layers(base, [1, 3])),
    "attention": (Attending, torch.randn(4, 6, 8), 0.34, 2, lambda base: _without_layers(base, [1, 3])),
    "sequential": (_plain, ROWS, 0.0, 3, lambda base: _without(base, [str(n) for n in range(5, 14)])),
}


@pytest.mark.parametrize("name", CASES)
def test_heads_are_the_base_without_the_blocks(name: str) -> None:
    make, x, depth, number, shorten = CASES[name]
    base = make().eval()
    model = ensemblenet.convert(base, x, 2, 4.0, "input", depth=depth, width=1.0, init="inherit").eval()
    assert model.recipe is not None
    assert len(model.recipe.head.dropped) == number
    expected = shorten(base)
    for inputs in (x, x[:1], torch.cat([x, x])):
        torch.testing.assert_close(model(inputs), expected(inputs), rtol=1e-5, atol=1e-6)
    for head in model.heads:
        assert sum(p.numel() for p in head.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_base_without_the_blocks(name: str) -> None:
    make, x, depth, _, shorten = CASES[name]
    base = make().double().eval()
    x = x.double()
    model = ensemblenet.convert(base, x, 1, 4.0, "input", depth=depth, width=1.0, init="inherit").eval()
    expected = shorten(base)
    model(x).square().sum().backward()
    expected(x).square().sum().backward()
    ours, theirs = (sorted(p.grad.norm().item() for p in net.parameters()) for net in (model, expected))  # type: ignore[union-attr]
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_short_models_keep_the_promises(name: str, tmp_path: Path) -> None:
    make, x, *_ = CASES[name]
    check_conversion(make(), x, budget=0.9)
    model = ensemblenet.convert(make(), x, budget=0.8).eval()
    assert model.recipe is not None
    assert model.recipe.head.dropped
    assert Recipe.from_json(model.recipe.to_json()) == model.recipe
    ensemblenet.save(model, tmp_path / "saved")
    torch.testing.assert_close(ensemblenet.load(tmp_path / "saved", make()).eval()(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(ensemblenet.fuse(copy.deepcopy(model))(x), model(x), rtol=1e-4, atol=1e-5)


def test_plans_count_what_measuring_counts() -> None:
    for depth in (0.0, 0.5, 1.0):
        model = ensemblenet.convert(_stages(), IMAGES, 2, 4.0, "1", depth=depth)
        measured = ensemblenet.measure_cost(model, IMAGES)
        assert model.cost is not None
        assert (model.cost.parameters, model.cost.macs) == (measured.parameters, measured.macs)


def test_blocks_are_spread_evenly() -> None:
    cuts = find_cuts(trace(CifarResNet(depth=32, width=8), torch.zeros(2, 3, 16, 16)))  # five blocks a stage
    kept = {round(depth.share, 2): [end for _, end in depth.names] for depth in depths_behind(find_runs(cuts), cuts[0])}
    assert kept[0.5] == [
        name for n, end in enumerate(("stages.0", "stages.1", "stages")) for name in (f"stages.{n}.block2", end)
    ]
    assert len(kept[0.25]) == 9
    assert kept[1.0] == []


NO_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "norms": lambda: nn.Sequential(nn.Linear(8, 32), *[nn.LayerNorm(32) for _ in range(4)], nn.Linear(32, 3)),
    "activations": lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.ReLU(), nn.Tanh(), nn.Linear(32, 3)),
    "other sizes": lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("name", NO_BLOCKS)
def test_what_is_no_block_is_not_dropped(name: str) -> None:
    for asked in ({"shape": "short"}, {"depth": 0.5}):
        with pytest.raises(ConversionError, match="no blocks that heads could drop"):
            ensemblenet.convert(NO_BLOCKS[name](), ROWS, **asked)
    with pytest.raises(ConversionError, match="Heads behind '0' have no blocks to drop"):
        ensemblenet.convert(NO_BLOCKS[name](), ROWS, split_at="0", shape="short")
    model = ensemblenet.convert(NO_BLOCKS[name](), ROWS)
    assert model.recipe is not None
    assert model.recipe.head.depth == 1.0


class Reused(nn.Module):
    """Layers of which the network asks more than the tensor that they give: a size of what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 8, 1)
        self.layers = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(3))
        self.classify = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, length = self.first(x), 0
        for layer in self.layers:
            inside = layer(F.pad(x, (1, 1)))
            length = inside.shape[-1]
            x = x + inside[..., 1:-1]
        return self.classify(x.sum(-1) / length)


def test_blocks_that_others_look_into_stay() -> None:
    x = torch.randn(4, 8, 10)  # a size inside of the last layer is read behind it
    runs = find_runs(find_cuts(trace(Reused(), x)))
    assert [block.end.point.name for run in runs for block in run.blocks[1:]] == ["add#2"]


def test_shape_width_and_depth_that_are_given_are_kept() -> None:
    base, budget = CifarResNet(depth=20, width=16), 0.95
    narrow = ensemblenet.convert(base, IMAGES, budget=budget, shape="narrow").recipe
    short = ensemblenet.convert(base, IMAGES, budget=budget, shape="short").recipe
    assert narrow is not None
    assert short is not None
    assert (narrow.head.depth, short.head.width) == (1.0, 1.0)
    assert narrow.head.width < 1
    assert short.head.depth < 1
    given = ensemblenet.convert(base, IMAGES, budget=budget, width=0.5, depth=0.5).recipe
    assert given is not None
    assert (given.head.width, given.head.depth) == (0.5, 0.5)
    with pytest.raises(
        BudgetError, match=r"2 heads of width 1 and depth 1 do not fit .* would cost [12]\.\d+ of the par"
    ):
        ensemblenet.convert(base, IMAGES, budget=budget, split_at="stem", width=1.0, depth=1.0)
    with pytest.raises(BudgetError, match=r"2 heads of depth 0\.9 do not fit"):
        ensemblenet.convert(base, IMAGES, budget=0.0001, depth=0.9)


def test_one_network_alone_may_be_short_and_wide() -> None:
    base = CifarResNet(depth=20, width=16)
    model = ensemblenet.convert(base, IMAGES, num_heads=1, budget=0.95, split_at="input", depth=0.0)
    assert model.recipe is not None
    assert model.cost is not None
    assert model.base_cost is not None
    assert model.recipe.head.width > 1.3
    assert 0.85 < max(model.cost.share_of(model.base_cost)) <= 0.95
    measured = ensemblenet.measure_cost(model, IMAGES)
    assert (measured.parameters, measured.macs) == (model.cost.parameters, model.cost.macs)
    wide = ensemblenet.convert(base, IMAGES, budget=4.0, width=1.5, depth=0.5, split_at="input")
    convolutions = [m.out_channels for m in wide.heads[0].modules() if isinstance(m, nn.Conv2d)]
    assert sorted(set(convolutions)) == [24, 48, 96]
    check = wide.train()(IMAGES)
    check.square().mean().backward()
    with pytest.raises(ConversionError, match="channels that no base has"):
        ensemblenet.convert(base, IMAGES, budget=4.0, width=1.5, init="inherit")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shape": "long"}, "shape must be one of"),
        ({"depth": 1.5}, "depth must be a share of the base's blocks, 0 to 1, got 1.5"),
        ({"depth": True}, "depth must be a share"),
        ({"width": 0}, "width must be a share of the base's channels"),
        ({"width": float("nan")}, "width must be a share"),
        ({"shape": "short", "width": 0.5}, 'shape="short" and width=0.5 exclude each other'),
        ({"shape": "narrow", "depth": 0.5}, 'shape="narrow" and depth=0.5 exclude each other'),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, float], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        ensemblenet.convert(_stages(), IMAGES, **asked)  # type: ignore[arg-type]


def test_as_many_heads_as_stay_whole() -> None:
    deep, shallow = CifarResNet(depth=44, width=16), CifarResNet(depth=8, width=16)
    found = [ensemblenet.convert(base, IMAGES, num_heads="auto", budget=0.95).recipe for base in (deep, shallow)]
    assert all(recipe is not None for recipe in found)
    many, two = found
    assert many is not None
    assert two is not None
    assert many.num_heads > 2
    assert many.head.width >= 1
    assert many.head.depth < 1
    assert two.num_heads == 2


def test_plans_are_ranked_as_auto_takes_them() -> None:
    base = CifarResNet(depth=20, width=16)
    found = ensemblenet.plans(base, IMAGES, budget=0.95)
    ranked = sorted((plan for plan in found if plan.rank is not None), key=lambda plan: plan.rank or 0)
    assert [plan.rank for plan in ranked] == [0, 1, 2, 3]
    recipe = ensemblenet.convert(base, IMAGES, budget=0.95).recipe
    assert recipe is not None
    assert (ranked[0].split.name, ranked[0].head) == (recipe.split_at, recipe.head)


def test_a_time_may_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    base = CifarResNet(depth=20, width=16)
    names = [
        plan.split.name for plan in sorted(ensemblenet.plans(base, IMAGES), key=lambda p: (p.rank is None, p.rank))
    ]
    told = iter([1.4, 1.2, 1.0])
    module = importlib.import_module("ensemblenet.conversion.convert")
    monkeypatch.setattr(module, "time_share", lambda *_: next(told))
    budget = ensemblenet.Budget(time=1.05, measured=True)
    recipe = ensemblenet.convert(base, IMAGES, budget=budget).recipe
    assert recipe is not None
    assert recipe.split_at == names[2]
    told = iter([2.0] * 5)
    with pytest.raises(BudgetError, match=r"No plan .* at most 1\.05 of the base's time: 2\.00 at 'stem', 2\.00 at "):
        ensemblenet.convert(base, IMAGES, budget=budget)
    told = iter([2.0])
    with pytest.raises(BudgetError, match=r"at most 1\.05 .* 2\.00 at 'stem'. Use fewer heads"):
        ensemblenet.convert(base, IMAGES, budget=budget, split_at="stem")
    with pytest.raises(BudgetError, match="needs a share of the time to measure"):
        ensemblenet.convert(base, IMAGES, budget=ensemblenet.Budget(measured=True))


def test_measuring_changes_neither_the_base_nor_the_model() -> None:
    base = CifarResNet(depth=20, width=16).eval()
    before = copy.deepcopy(base.state_dict())
    budget = ensemblenet.Budget(time=10.0, measured=True)
    measured, plain = (ensemblenet.convert(base, IMAGES, budget=b, seed=3) for b in (budget, 1.0))
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, measured.state_dict()[name])


def test_heads_are_laid_out_in_memory_as_the_base() -> None:
    base = CifarResNet(depth=14, width=16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for init in ("fresh", "inherit"):
        model = ensemblenet.convert(base, IMAGES, budget=0.9, init=init)  # type: ignore[arg-type]
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                assert layer.weight.is_contiguous(memory_format=torch.channels_last)


# of small networks of timm's, the size of images and the modules that heads of no depth are without
TIMM = {
    "resnet18": (64, r"layer\d\.1"),
    "test_convnext": (64, r"stages\.\d\.blocks\.[1-9]"),
    "test_vit": (160, r"blocks\.[1-9]\d*"),
    "regnety_002": (64, r"s[34]\.b([2-9]|1\d)"),
}


@pytest.mark.parametrize("name", TIMM)
def test_blocks_of_timm_networks_are_their_modules(name: str) -> None:
    timm = pytest.importorskip("timm")
    size, pattern = TIMM[name]
    base, x = timm.create_model(name).eval(), torch.randn(2, 3, size, size)
    model = ensemblenet.convert(base, x, 1, 4.0, "input", depth=0.0, width=1.0, init="inherit").eval()
    skipped = [name for name, _ in base.named_modules() if re.fullmatch(pattern, name)]
    assert model.recipe is not None
    assert len(model.recipe.head.dropped) == len(skipped) > 0
    torch.testing.assert_close(model(x), _without(base, skipped)(x), rtol=1e-4, atol=1e-5)


def test_a_container_behind_one_that_changes_the_shape_is_no_block() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
    base = nn.Sequential(stem, nn.Sequential(Residual(16, 16), Residual(16, 16)), nn.Flatten(), nn.LazyLinear(3))
    base(IMAGES)
    runs = find_runs(find_cuts(trace(base, IMAGES)))
    assert [block.begin.point.name for run in runs for block in run.blocks[1:]] == ["1.0"]


@pytest.mark.parametrize("shape", ["narrow", "auto"])
def test_plans_that_take_the_time_of_the_base_come_first(shape: str) -> None:
    timm = pytest.importorskip("timm")
    base, x = timm.create_model("resnet18"), torch.randn(2, 3, 224, 224)
    found = ensemblenet.plans(base, x, shape=shape)  # type: ignore[arg-type]
    whole = ensemblenet.measure_cost(base, x)
    [chosen] = [plan for plan in found if plan.rank == 0]
    shares = chosen.cost.shares_of(whole)
    assert max(shares.activations, shares.time) <= 1.05
    # nearer to the stem nothing keeps to it; short heads do much earlier than narrow ones
    earlier = [plan.cost.shares_of(whole) for plan in found if 0.05 <= plan.split.macs_share < chosen.split.macs_share]
    assert all(max(one.activations, one.time) > 1.05 for one in earlier)
    assert (chosen.split.macs_share > 0.5) == (shape == "narrow")


def test_where_no_plan_takes_the_time_of_the_base_the_fastest_is_taken() -> None:
    sizes = (3, 64, 72, 80, 88)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    base = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))
    whole = ensemblenet.measure_cost(base, SQUARES)
    found = [plan for plan in ensemblenet.plans(base, SQUARES) if (plan.width or 0.0) >= 0.6]
    slowness = {plan.split.name: max(plan.cost.shares_of(whole)[2:]) for plan in found}
    model = ensemblenet.convert(base, SQUARES, min_width=0.6)
    assert model.recipe is not None
    assert 1.05 < slowness[model.recipe.split_at] == min(slowness.values())


def test_small_bases_without_blocks_are_split_early() -> None:
    layers = [layer for size in range(16, 96) for layer in (nn.Linear(size, size + 1), nn.Tanh())]
    base = nn.Sequential(nn.Linear(8, 16), *layers, nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 3))
    [chosen] = [plan for plan in ensemblenet.plans(base, ROWS) if plan.rank == 0]
    assert chosen.split.macs_share < 0.1


@pytest.mark.parametrize("num_heads", [2, 3, 4])
@pytest.mark.parametrize(("sizes", "multiple"), [((64, 768, 512, 1280, 640), 32), ((64, 768, 768, 768), 16)])
def test_wide_layers_have_channels_that_fill_tiles(sizes: tuple[int, ...], multiple: int, num_heads: int) -> None:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    base = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
    model = ensemblenet.convert(base, torch.randn(2, 64), num_heads, split_at="input", shape="narrow")
    found = [layer.out_features for layer in model.heads[0].modules() if isinstance(layer, nn.Linear)]
    assert [size % multiple for size in found[:-1]] == [0] * len(layers[::2])
    assert model.cost is not None
    assert model.base_cost is not None
    assert max(model.cost.share_of(model.base_cost)) >= 0.95


def layers_of_width(number: int) -> list[nn.Module]:
    return [layer for _ in range(number) for layer in (nn.Linear(64, 64), nn.ReLU())]


@pytest.mark.parametrize(
    ("blocks", "shortens"),
    [
        pytest.param(layers_of_width(6), False, id="plain"),
        pytest.param(
            [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(6)], True, id="normalised behind"
        ),
        pytest.param(
            [nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True) for _ in range(6)],
            True,
            id="normalised in front",
        ),
    ],
)
def test_heads_that_inherit_drop_only_blocks_that_add_to_what_they_take(
    blocks: list[nn.Module], shortens: bool
) -> None:
    base = nn.Sequential(nn.Linear(16, 64), nn.Sequential(*blocks), nn.Flatten(), nn.Linear(8 * 64, 10))
    x = torch.randn(2, 8, 16)
    # where heads are fresh, or are told to be short, blocks of all kinds are dropped
    fresh, short = (ensemblenet.convert(base, x, **more) for more in ({}, {"shape": "short", "init": "inherit"}))
    inherited = ensemblenet.convert(base, x, init="inherit")
    dropped = [bool(model.recipe.head.dropped) for model in (fresh, short, inherited)]  # type: ignore[union-attr]
    assert dropped == [True, True, shortens]
