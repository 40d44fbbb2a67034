"""Where bases come from: what is recorded makes the same network again, or nothing is recorded."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from ensemblenet import LoadError, convert, load, save
from ensemblenet.cli import main
from ensemblenet.models.finding import find_source
from ensemblenet.models.sources import BaseSource, create, is_plain
from ensemblenet.recipe import Recipe

SMALL_ROPE = {"num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}


def again(base: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The base that is built from what is recorded of it."""
    source = find_source(base, shape)
    assert source is not None
    stored = json.loads(json.dumps({"factory": source.factory, "name": source.name, "arguments": source.arguments}))
    assert is_plain(stored)
    made = BaseSource(**stored).build()
    made.load_state_dict(base.state_dict())
    return made.eval()


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("vit_small_patch16_rope_mixed_224", {"img_size": 32}, (3, 32, 32)),  # no parameter shows the size
        ("test_vit", {"img_size": 96}, (3, 96, 96)),
        ("test_vit", {"img_size": 96, "class_token": False, "global_pool": "avg"}, (3, 96, 96)),
        ("test_vit", {"in_chans": 1, "num_classes": 0, "drop_path_rate": 0.1}, (1, 160, 160)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (3, 64, 64)),
        ("test_resnet", {"in_chans": 1, "global_pool": "max", "drop_rate": 0.3}, (1, 64, 64)),
        ("convnext_atto", {"drop_path_rate": 0.2, "global_pool": "max"}, (3, 64, 64)),
        ("levit_128s", {"num_classes": 3}, (3, 224, 224)),
    ],
)
def test_timm_networks_with_arguments_are_made_again(name: str, options: dict, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base = timm.create_model(name, **options).eval()
    made, x = again(base, shape), torch.randn(2, *shape)
    assert torch.equal(made(x), base(x))
    assert repr(made) == repr(base)


@pytest.mark.parametrize(
    "base",
    [
        lambda: timm.create_model("vit_small_patch16_rope_mixed_224", img_size=32, **SMALL_ROPE),
        lambda: timm.create_model("mobilenetv3_small_050", act_layer="silu"),
        lambda: timm.create_model("test_resnet").double(),
        lambda: changed(timm.create_model("test_vit"), lambda m: setattr(m.blocks[2].attn, "scale", 0.5)),
        lambda: changed(timm.create_model("test_vit"), lambda m: setattr(m.blocks[0], "norm1", nn.Identity())),
    ],
    ids=["arguments that cannot be seen", "another activation", "another dtype", "another number", "another layer"],
)
def test_nothing_is_recorded_rather_than_another_network(base: Callable[[], nn.Module]) -> None:
    assert find_source(base(), (3, 32, 32)) is None


@pytest.mark.parametrize(
    "base",
    [
        lambda: create("test_resnet", 5, options={"act_layer": "silu", "drop_path_rate": 0.1}),
        lambda: create("vit_small_patch16_rope_mixed_224", options={"img_size": 32, **SMALL_ROPE}),
        lambda: create("torchvision:squeezenet1_1", 5, options={"dropout": 0.2}),
        lambda: create("base_sources_own:make", options={"sizes": [20, 16], "act": {"name": "gelu"}}),
        lambda: torchvision.models.resnet18(num_classes=7),
        lambda: torchvision.models.mobilenet_v3_small(),
        lambda: torchvision.models.shufflenet_v2_x0_5(),
    ],
    ids=["timm", "timm's sizes", "torchvision", "own", "resnet18", "mobilenet", "shufflenet"],
)
def test_what_was_asked_for_is_recorded(
    base: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And loaded again without a word to pass; the user's own code where it is trusted."""
    (tmp_path / "base_sources_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    network = base().eval()
    shape = (20,) if isinstance(network, nn.Sequential) else (3, 32, 32)
    x = torch.randn(2, *shape)
    model = convert(network, x, 2, 1.2).eval()
    assert model.recipe is not None
    assert model.recipe.base is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directory = save(model, tmp_path / "saved")
    is_own = model.recipe.base.factory == "module"
    if is_own:
        with pytest.raises(LoadError, match="is code of the model's author"):
            load(directory)
    assert torch.equal(load(directory, trust=is_own)(x), model(x))
    assert find_source(copy.deepcopy(network), shape) == model.recipe.base


OWN = """
from torch import nn

def make(sizes, act):
    kinds = {"gelu": nn.GELU, "relu": nn.ReLU}
    return nn.Sequential(nn.Linear(*sizes), kinds[act["name"]](), nn.Linear(sizes[-1], 32), nn.ReLU(), nn.Linear(32, 3))
"""


def test_what_was_changed_since_is_not_recorded() -> None:
    network: Any = create("torchvision:squeezenet1_1", 5)
    network.classifier[0] = nn.Identity()
    assert find_source(network, (3, 32, 32)) is None


def test_save_says_what_loading_needs(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    with pytest.warns(UserWarning, match=r"load it with ensemblenet\.load\(directory, base=\.\.\.\)"):
        save(convert(base, torch.randn(2, 8)), tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torchvision:squeezenet1_1", "ensemblenet.load(directory)."),
        ("base_sources_convert:make", "ensemblenet.load(directory, trust=True), which imports base_sources_convert."),
        ("base_sources_convert:another", "ensemblenet.load(directory, base=...), where base is a fresh instance"),
    ],
)
def test_convert_says_how_to_load(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base_sources_convert.py").write_text(
        "from itertools import count\nfrom torch import nn\nnumbers = count()\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(14400, 3))\n"
        "def another():\n    network = make()\n    network.number = next(numbers)\n    return network\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--input-shape", "3,32,32", "--budget", "1.2", "--output", str(tmp_path / "saved")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["convert", name, *arguments]) == 0
    assert says in " ".join(capsys.readouterr().out.split())


def changed(network: nn.Module, change: Callable[[Any], None]) -> nn.Module:
    change(network)
    return network


def test_finding_a_source_draws_no_random_numbers() -> None:
    base = timm.create_model("test_resnet")
    state = torch.get_rng_state()
    find_source(base, (3, 64, 64))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_base_whose_size_no_parameter_shows_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = timm.create_model("vit_small_patch16_rope_mixed_224", num_classes=5, img_size=32)
    x = torch.randn(2, 3, 32, 32)
    model = convert(base, x, budget=0.9).eval()
    assert torch.equal(load(save(model, tmp_path / "rope"))(x), model(x))


def test_a_base_that_is_not_recorded_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = timm.create_model("test_vit", pos_embed="none", img_size=32)
    x = torch.randn(2, 3, 32, 32)
    directory = save(convert(base, x).eval(), tmp_path / "model")
    with pytest.raises(LoadError, match="pass a fresh instance"):
        load(directory)
    load(directory, base)


# -- transformers


def bert(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**small, vocab_size=50, max_position_embeddings=16, **options)
    return transformers.BertForSequenceClassification(config).eval()


def wide_resnet() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, id2label={0: "a cat", 1: "x/y", 2: "c"}
    )
    return transformers.ResNetForImageClassification(config).eval()


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=50, pad_token_id=0, num_labels=3)
    return transformers.LlamaForSequenceClassification(config).eval()


IDS = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (lambda: bert(num_labels=4), IDS),
        (lambda: bert(attn_implementation="eager", hidden_act="relu", problem_type="regression"), IDS),
        (llama, IDS),
        (wide_resnet, torch.randn(2, 3, 32, 32)),
    ],
    ids=["bert", "eager", "llama", "resnet"],
)
def test_networks_of_transformers_are_made_again(network: Callable[[], Any], x: torch.Tensor) -> None:
    torch.manual_seed(0)
    base = network()
    base.config._name_or_path = "/home/somebody/model"
    source = find_source(base, tuple(x.shape[1:]))
    assert source is not None
    assert (source.factory, source.name) == ("transformers", type(base).__name__)
    assert "somebody" not in json.dumps(source.arguments)
    made = again(base, tuple(x.shape[1:]))
    assert type(made) is type(base)
    assert made.config._attn_implementation == base.config._attn_implementation
    assert made.config.id2label == base.config.id2label
    assert torch.equal(made(x).logits, base(x).logits)


def test_code_of_others_is_no_source() -> None:
    """A class of the user's own that derives from one of transformers is not that one."""
    base = bert()
    base.__class__ = type("Mine", (type(base),), {})
    assert find_source(base, (8,)) is None


def recipe_with(source: BaseSource) -> str:
    model = convert(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(4, 8), budget=2.0)
    assert model.recipe is not None
    return replace(model.recipe, base=source).to_json()


def of_transformers(name: str = "BertModel", attention: str = "sdpa", **config: Any) -> BaseSource:
    return BaseSource("transformers", name, {"config": config, "attn_implementation": attention})


@pytest.mark.parametrize(
    "source",
    [
        of_transformers(auto_map={"AutoModel": "evil.Model"}),
        of_transformers(text_config={"auto_map": {"AutoModel": "evil.Model"}}),
        of_transformers(attention="someone/kernel"),
        of_transformers(experts_implementation="someone/kernel"),
        of_transformers(backbone="resnet18", use_pretrained_backbone=True),
        of_transformers(quantization_config={"quant_method": "gptq"}),
        of_transformers(_name_or_path="../elsewhere"),
        BaseSource("transformers", "BertModel", {"config": {}, "attn_implementation": "sdpa", "trust_remote_code": 1}),
        BaseSource("timm", "test_resnet", {"checkpoint_path": "weights.bin"}),
        BaseSource("timm", "test_resnet", {"global_pool": "../a"}),
        BaseSource("torchvision", "resnet18", {"weights": "DEFAULT"}),
        BaseSource("ensemblenet", "S3D", {"width": {"a": 1}}),
    ],
    ids=lambda source: str(source.arguments)[:60],
)
def test_a_stored_source_that_would_fetch_or_run_more_is_refused(source: BaseSource) -> None:
    with pytest.raises(LoadError, match="The recipe's base must be a factory, a name and plain arguments"):
        Recipe.from_json(recipe_with(source))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (of_transformers("os"), "transformers has no model 'os'"),
        (of_transformers("pipeline"), "transformers has no model 'pipeline'"),
        (of_transformers("AutoModel"), "transformers has no model 'AutoModel'"),
        (of_transformers("PreTrainedModel"), "cannot be built"),
        (of_transformers("BertModel", hidden_act="unheard"), "cannot be built"),
        (of_transformers("BertModel", attention="unheard"), "cannot be built"),
    ],
)
def test_what_transformers_does_not_know_is_a_load_error(source: BaseSource, message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(LoadError, match=message):
        source.build()
