"""A few lines of a recipe make no network that its weights are not those of, and fill no memory."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ensemblenet import LoadError, convert, load, save
from ensemblenet.inputs import Inputs
from ensemblenet.models import MNIST1DNet
from ensemblenet.models.sources import create
from ensemblenet.storage import limits
from ensemblenet.storage.restore import restore, store
from ensemblenet.weights import Header

X = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(convert(MNIST1DNet(8), X).eval(), tmp_path / "saved")


def change(folder: Path, edit: Callable[[Any], Any]) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    edit(recipe)
    (folder / "recipe.json").write_text(json.dumps(recipe))


def without_notes(path: Path) -> None:
    """As versions up to 0.1.0 wrote weights."""
    save_file(load_file(path), path)


def refused_at_once(call: Callable[[], Any], match: str) -> None:
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(LoadError, match=match) as caught:
        call()
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert "\n" not in str(caught.value)


def of(factory: str, name: str, **arguments: Any) -> Callable[[Any], Any]:
    return lambda recipe: recipe.update(base={"factory": factory, "name": name, "arguments": arguments})


SMALL_BERT = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 10}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of("ensemblenet", "MNIST1DNet", width=10**5), "more than its weights justify|but the base has"),
        (of("ensemblenet", "MNIST1DNet", num_classes=10**7), "more than its weights justify|but the base has"),
        (of("ensemblenet", "CifarResNet", depth=6 * 10**5 + 2), "over .* layers and tensors"),
        (of("timm", "resnet50", num_classes=10**7), "more than its weights justify"),
        (of("timm", "vit_giant_patch14_224"), "more than its weights justify"),
        (of("timm", "test_vit", img_size=10**5), "more than its weights justify"),
        (of("torchvision", "regnet_y_400mf", num_classes=10**7), "more than its weights justify"),
        (of("timm", "resnet50", num_classes=10**9), "base must be a factory, a name and plain arguments"),
        (
            of(
                "transformers",
                "BertModel",
                config=SMALL_BERT | {"num_hidden_layers": 10**6},
                attn_implementation="sdpa",
            ),
            "over .* layers and tensors",
        ),
        (lambda recipe: recipe["inputs"]["tensors"][0].update(shape=[10**9]), "more than its weights justify"),
        (lambda recipe: recipe["inputs"]["tensors"][0].update(shape=[10**6, 10**6]), "more than its weights justify"),
        (lambda recipe: recipe["inputs"]["tensors"][0].update(shape=[10**6]), "more than its weights justify"),
        (lambda recipe: recipe.update(num_heads=1024), "has 1024 heads, the weights have 2"),
    ],
)
@pytest.mark.parametrize("has_notes", [True, False])
def test_what_the_weights_do_not_justify_is_never_made(
    saved: Path, edit: Callable[[Any], Any], message: str, has_notes: bool
) -> None:
    create("test_resnet")  # imports timm, which is not to be counted
    create("torchvision:squeezenet1_1")
    pytest.importorskip("transformers").BertModel  # noqa: B018
    change(saved, edit)
    if not has_notes:
        without_notes(saved / "model.safetensors")
    refused_at_once(lambda: load(saved), message)


def test_a_base_that_is_brought_is_compared_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblenet.storage.checkpoint.rebuild", None)
    with pytest.raises(LoadError, match=r"but the base has .*; is it the base that was converted\?$"):
        load(saved, MNIST1DNet(2000))
    change(saved, lambda recipe: recipe["inputs"]["tensors"][0].update(shape=[10**9]))
    refused_at_once(lambda: load(saved, MNIST1DNet(8)), "more than its weights justify")


def test_many_heads_in_few_tensors(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if not name.startswith("heads.1.") or "bias" in name}, path)
    refused_at_once(lambda: load(saved), "heads 0 and 1 hold tensors of other shapes")


def test_the_author_who_is_trusted_may_do_more(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_notes(saved / "model.safetensors")
    monkeypatch.setattr(limits, "_MOST_WRITTEN", (1000, 0))
    with pytest.raises(LoadError, match=r"write over 1,000 numbers.* If you trust whoever saved it, pass trust=True"):
        load(saved)
    assert load(saved, trust=True).num_heads == 2


def test_the_header_says_how_much_an_example_writes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a small network of large inputs, whose weights justify little, is loaded nevertheless."""
    monkeypatch.setattr(limits, "_MOST_WRITTEN", (0, 0))
    monkeypatch.setattr(limits, "_MOST_WRITTEN_SAID", (0, limits._MOST_WRITTEN_SAID[1]))
    assert load(saved).num_heads == 2
    with safe_open(str(saved / "model.safetensors"), framework="pt") as file:
        assert int(file.metadata()["ensemblenet.activations"]) == round(load(saved).base_cost.activations)  # pyright: ignore


@pytest.mark.parametrize("width", [10**5, 9])
def test_the_base_of_a_run_is_compared_first(tmp_path: Path, width: int) -> None:
    store(MNIST1DNet(8), "multiclass", Inputs.of(X), {}, tmp_path)
    base = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": width}}
    data = {"class_path": "ensemblenet.data.MNIST1D"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"base": base}, "data": data}))
    refused_at_once(lambda: restore(tmp_path), "more than its weights justify|is it the base that was trained")


def test_networks_that_cannot_be_made_without_memory_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = convert(create("torchvision:regnet_y_400mf", 5), x, 2, 1.2).eval()
    assert torch.equal(load(save(model, tmp_path / "saved"))(x), model(x))


@pytest.mark.parametrize(
    ("width", "shape", "kept", "fits"),
    [
        (0.5, (8, 8), (4, 4), True),
        (0.5, (8, 8), (8, 4), True),
        (0.5, (1000, 8), (4, 4), False),
        (1.0, (8,), (8,), True),
    ],
)
def test_sizes_of_a_base_and_of_a_head(
    tmp_path: Path, width: float, shape: tuple[int, ...], kept: tuple[int, ...], fits: bool
) -> None:
    base = nn.ParameterDict({"w": torch.zeros(shape)})
    recipe: Any = type("Shape", (), {"head": type("Head", (), {"width": width})})
    header = Header(tmp_path, {"heads.0.w": kept}, {})
    if fits:
        limits.check_base(base, header, recipe)
    else:
        with pytest.raises(LoadError, match=r"heads\.0\.w of shape \(4, 4\), but the base has \(1000, 8\)"):
            limits.check_base(base, header, recipe)


def test_hooks_do_not_stay(saved: Path) -> None:
    load(saved)
    assert not nn.modules.module._global_parameter_registration_hooks
