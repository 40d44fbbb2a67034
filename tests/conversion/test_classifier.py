"""Networks with a classifier of other classes: all else is the base's, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import ensemblenet
from ensemblenet.conversion.classifier import with_classes
from ensemblenet.errors import ConversionError, LoadError
from ensemblenet.models import CifarResNet, create
from ensemblenet.models.sources import BaseSource

ROWS, IMAGES = torch.randn(4, 8), torch.randn(2, 3, 64, 64)


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def _dense() -> nn.Sequential:
    """Classes at each position, which are enlarged behind the classifier."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 3, 1), nn.Upsample(scale_factor=2))


class Auxiliary(nn.Module):
    """Its last call is not its classifier, and hidden layers are as wide as it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.classify, self.other = nn.Linear(8, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x).relu()
        return {"logits": self.classify(h), "other": self.other(h)}


@pytest.mark.parametrize(
    ("make", "x", "names"),
    [
        (_perceptron, ROWS, {"5.weight", "5.bias"}),
        (_dense, IMAGES, {"2.weight", "2.bias"}),
        (Auxiliary, ROWS, {"classify.weight", "classify.bias"}),
        (lambda: CifarResNet(8, 8), IMAGES, {"classifier.weight", "classifier.bias"}),
        (lambda: timm.create_model("test_vit", img_size=64), IMAGES, {"head.weight", "head.bias"}),
        (lambda: torchvision.models.squeezenet1_1(), IMAGES, {"classifier.1.weight", "classifier.1.bias"}),
        (lambda: torchvision.models.mobilenet_v3_small(), IMAGES, {"classifier.3.weight", "classifier.3.bias"}),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), IMAGES, {"fc.weight", "fc.bias"}),
    ],
)
@torch.no_grad()
def test_the_classifier_is_found_and_nothing_else_changes(
    make: Callable[[], nn.Module], x: Tensor, names: set[str]
) -> None:
    base = make().eval()
    state, random = {name: own.clone() for name, own in base.state_dict().items()}, torch.get_rng_state()
    layers = repr(base)
    network, fresh = with_classes(base, x, 7, seed=3)
    assert fresh == names
    assert repr(base) == layers
    assert all(torch.equal(own, state[name]) for name, own in base.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    own = network.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in state.keys() - names)
    features: list[Tensor] = []
    for one in (base, network):  # what the classifier is given
        layer = one.get_submodule(min(names).rpartition(".")[0])
        layer.register_forward_hook(lambda _, given, out: features.append(given[0]))
    shapes = [value.shape if isinstance(value := one(x), Tensor) else value["logits"].shape for one in (base, network)]
    assert torch.equal(*features)
    assert [7 if a != b else a for a, b in zip(*shapes, strict=True)] == list(shapes[1])
    again = with_classes(base, x, 7, seed=3)[0].state_dict()
    other = with_classes(base, x, 7, seed=4)[0].state_dict()
    assert all(torch.equal(again[name], own[name]) for name in names)
    assert not any(torch.equal(other[name], own[name]) for name in names)


def test_as_many_classes_as_before_are_fresh_too() -> None:
    base = _perceptron()
    network, fresh = with_classes(base, ROWS, 3)
    assert fresh == {"5.weight", "5.bias"}
    assert not torch.equal(network[5].weight, base[5].weight)  # pyright: ignore[reportIndexIssue]


def test_a_classifier_has_the_bases_dtype_and_is_trained_though_the_base_is_frozen() -> None:
    base = timm.create_model("test_resnet").double().requires_grad_(False)
    network, fresh = with_classes(base, IMAGES.double(), 5)
    assert {own.dtype for own in network.parameters()} == {torch.float64}
    assert {name for name, own in network.named_parameters() if own.requires_grad} == fresh


@pytest.mark.parametrize("make", [_perceptron, lambda: _perceptron().double()])
def test_a_head_of_full_width_is_the_base_but_for_a_classifier_of_its_own(make: Callable[[], nn.Module]) -> None:
    base = make().eval()
    x = ROWS.to(next(base.parameters()))
    model = ensemblenet.convert(base, x, 3, 9.0, "1", init="inherit", width=1.0, num_classes=5)
    bare = nn.Sequential(*list(base)[:5])  # pyright: ignore[reportArgumentType]
    for k in range(3):
        head = model.head(k).eval()
        classify = head.head.get_submodule("5")
        assert torch.equal(head(x), classify(bare(x)))
    weights = [model.heads[k].get_parameter("5.weight") for k in range(3)]
    assert not any(torch.equal(weights[i], weights[k]) for i, k in ((0, 1), (0, 2), (1, 2)))
    again = ensemblenet.convert(base, x, 3, 9.0, "1", init="inherit", width=1.0, num_classes=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    bound = 32**-0.5  # of the uniform distribution that PyTorch draws a linear layer from
    assert all(own.abs().max() <= bound and abs(own.std() - bound / 3**0.5) < 0.2 * bound for own in weights)


def test_repair_and_importance_leave_the_fresh_classifier_alone() -> None:
    base = _perceptron()
    batches = [(torch.randn(16, 8) + 2, torch.randint(5, (16,))) for _ in range(2)]
    options: dict[str, Any] = {"init": "inherit", "width": 0.5, "num_classes": 5}
    plain = ensemblenet.convert(base, ROWS, 2, 4.0, "input", **options, importance="magnitude")
    model = ensemblenet.convert(base, ROWS, 2, 4.0, "input", **options, calibration=batches)
    for one, other in zip(model.heads, plain.heads, strict=True):
        assert torch.equal(one.get_parameter("5.weight"), other.get_parameter("5.weight"))
        assert not torch.equal(one.get_parameter("3.bias"), other.get_parameter("3.bias"))


@pytest.mark.parametrize(
    ("make", "x", "source"),
    [
        (_perceptron, ROWS, None),
        (lambda: CifarResNet(8, 8), IMAGES, BaseSource("ensemblenet", "CifarResNet", {"num_classes": 5})),
        (lambda: timm.create_model("test_resnet"), IMAGES, BaseSource("timm", "test_resnet", {"num_classes": 5})),
        (lambda: create("torchvision:squeezenet1_1"), IMAGES, BaseSource("torchvision", "squeezenet1_1", {})),
    ],
)
def test_a_saved_model_knows_its_classes(
    make: Callable[[], nn.Module], x: Tensor, source: BaseSource | None, tmp_path: Path
) -> None:
    model = ensemblenet.convert(make(), x, 2, 2.0, init="inherit", num_classes=5).eval()
    assert model.recipe is not None
    assert model.recipe.num_classes == 5
    found = model.recipe.base
    assert (source is None) == (found is None)
    if source is not None and found is not None:
        assert (found.factory, found.name, found.arguments["num_classes"]) == (source.factory, source.name, 5)
    saved = ensemblenet.save(model, tmp_path / "model")
    bases = [make(), *([] if source is None else [None])]  # a base of the old classes, or by its name
    for base in bases:
        assert torch.equal(ensemblenet.load(saved, base)(x), model(x))
    with pytest.raises(LoadError, match=r"holds \S+ of shape|does not fit") as caught:
        ensemblenet.load(saved, nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)))
    assert "\n" not in str(caught.value)


class Sums(nn.Module):
    """Two layers make its output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.parametrize("make", [Sums, ByHand, Twice, lambda: nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3))])
def test_a_classifier_that_cannot_be_found_is_said_in_one_line(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConversionError, match=r"classifier of \w+ cannot be found: .* Give the base 5 classes") as said:
        ensemblenet.convert(make(), ROWS, num_classes=5)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        ({"num_classes": "ten"}, "num_classes must be an integer of at least 1, got 'ten'"),
        ({"num_classes": 5, "output": ["logits", "other"]}, "num_classes needs one output"),
        ({"num_classes": 5, "example_inputs": torch.randn(2, 9)}, "does not take the example inputs: RuntimeError"),
    ],
)
def test_bad_classes_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"example_inputs": ROWS, **options}
    with pytest.raises(ConversionError, match=said) as caught:
        ensemblenet.convert(Auxiliary(), **arguments)
    assert "\n" not in str(caught.value)


def test_transformers_classifier_is_found_and_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=32, patch_size=8, intermediate_size=64, **sizes)
    base, x = transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    model = ensemblenet.convert(base, x, 2, 2.0, init="inherit", num_classes=7)
    assert base.config.num_labels == 2
    assert model.recipe is not None
    assert model.recipe.base is not None
    assert len(model.recipe.base.arguments["config"]["id2label"]) == 7
    saved = ensemblenet.save(model.eval(), tmp_path / "model")
    for own in (None, base):
        assert torch.equal(ensemblenet.load(saved, own)(x), model(x))
