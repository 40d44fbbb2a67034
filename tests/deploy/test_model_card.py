"""Models on the hub, and in timm's registry: against a hub that is a folder."""

from __future__ import annotations

import fnmatch
import json
import shutil

import huggingface_hub
import pytest
import timm
import torch
import yaml
from networks import Text, text_batch
from torch import nn

import ensemblenet
from ensemblenet import LoadError, convert, load, push_to_hub, register_timm, save
from ensemblenet.cli.main import main
from ensemblenet.cost import Cost
from ensemblenet.deploy.model_card import model_card
from ensemblenet.models import MNIST1DNet


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's three calls on a local folder, owner/name/file in it, with the layout of a repository."""
    root = tmp_path / "hub"

    def create_repo(repo_id, *, private=None, exist_ok=False):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (root / repo_id / ".gitattributes").write_text(f"private={private}")

    def copy(source, target, patterns):
        target.mkdir(parents=True, exist_ok=True)
        for file in source.rglob("*"):
            name = str(file.relative_to(source))
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)

    def upload_folder(*, repo_id, folder_path, allow_patterns, commit_message):
        copy(folder_path, root / repo_id, allow_patterns)

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        if not (root / repo_id).is_dir():
            raise FileNotFoundError("404 Client Error: Repository Not Found")
        cache = tmp_path / "cache" / repo_id.replace("/", "--") / (revision or "main")
        copy(root / repo_id, cache, allow_patterns)
        return str(cache)

    for function in (create_repo, upload_folder, snapshot_download):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    return root


@pytest.fixture(scope="module")
def model():
    return convert(MNIST1DNet(8), torch.randn(2, 40), num_heads=3, seed=1).eval()


def test_a_model_goes_up_and_comes_back(hub, model):
    address = push_to_hub(model, "someone/digits", description={"classes": list("0123456789")}, private=True)
    assert address == "hf://someone/digits"
    x = torch.randn(4, 40)
    assert torch.equal(load(address)(x), model(x))
    assert torch.equal(load(f"{address}@v1.0")(x), model(x))
    repository = hub / "someone" / "digits"
    files = {file.name for file in repository.iterdir()}
    assert files == {".gitattributes", "README.md", "data.json", "model.safetensors", "recipe.json"}
    assert (repository / ".gitattributes").read_text() == "private=True"


def test_nothing_else_comes_from_the_hub(hub, model, tmp_path):
    address = push_to_hub(model, "someone/digits")
    (hub / "someone" / "digits" / "pytorch_model.bin").write_bytes(b"a pickle")
    (hub / "someone" / "digits" / "modeling.py").write_text("raise SystemExit")
    load(address)
    assert sorted({file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()}) == [
        ".json",
        ".md",
        ".safetensors",
    ]


def write_run(folder, model):
    """What `fit` leaves, by hand."""
    test = {"first_accuracy_2": 0.96, "nll": 0.25, "ece": 0.0314, "agreement": 0.02}  # version 0.1 called it so
    row = {"error_mean": 3.25, "head_error_mean": 5.5, "seeds": 1, "test": test}
    folder.mkdir()
    save(model, folder / "model", {"task": "multiclass", "input_shape": [40], "classes": list("0123456789")})
    (folder / "results.json").write_text(json.dumps({"rows": [row]}))
    config = {
        "seed_everything": 7,
        "runs": "/home/me/runs",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": {"num_heads": 3},
            "codistillation_weight": 3.0,
        },
        "data": {"class_path": "mine.Data", "init_args": {"folder": "/home/me/secret", "batch_size": 100}},
        "trainer": {"max_epochs": 40, "default_root_dir": "/home/me", "precision": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_card_of_a_run(hub, model, tmp_path):
    run = write_run(tmp_path / "run", model)
    base_run = tmp_path / "base"
    base_run.mkdir()
    (base_run / "results.json").write_text(json.dumps({"rows": [{"error_mean": 4.125}]}))
    push_to_hub(run, "someone/digits", base_run=base_run, trust=True)
    card = (hub / "someone" / "digits" / "README.md").read_text()
    _, header, _ = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    [index] = metadata.pop("model-index")
    assert metadata == {"library_name": "ensemblenet", "tags": ["ensemblenet", "pytorch", "multiclass"]}
    [evaluation] = index["results"]
    assert (index["name"], evaluation["dataset"]) == ("digits", {"name": "Data", "type": "unknown", "split": "test"})
    assert {metric["name"]: metric["value"] for metric in evaluation["metrics"]} == {
        "NLL, nats": 0.25,
        "ECE": 0.0314,
        "error, %": 3.25,
        "one head, %": 5.5,
    }

    def sizes(cost: Cost) -> str:
        return f"{cost.parameters:,} | {cost.macs:,.0f} | {cost.activations:,.0f}"

    cost, first, head = model.cost, model.first(2).cost, model.first(1).cost
    lines = [line for line in card.splitlines() if line.startswith("|")]
    assert lines == [
        "|  | parameters | MACs | activations | time | test error, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| base | {sizes(model.base_cost)} | 1.00 | 4.12 |",
        f"| all 3 heads | {sizes(cost)} | {cost.time / model.base_cost.time:.2f} | 3.25 |",
        f"| first 2 heads | {sizes(first)} | {first.time / model.base_cost.time:.2f} | 4.00 |",
        f"| one head, mean | {sizes(head)} | {head.time / model.base_cost.time:.2f} | 5.50 |",
    ]
    assert "NLL in nats 0.25, ECE 0.0314" in card
    assert 'ensemblenet.load("hf://someone/digits")' in card
    assert "10 classes" in card
    settings = yaml.safe_load(card.split("## Training")[1].split("```yaml\n")[1].split("```")[0])
    assert settings["seed"] == 7
    assert settings["trainer"] == {"max_epochs": 40}
    assert settings["data"] == {"class_path": "mine.Data", "init_args": {"batch_size": 100}}
    assert "/home/me" not in card
    [row] = json.loads((hub / "someone" / "digits" / "results.json").read_text())["rows"]
    assert row["error_mean"] == 3.25
    assert row["test"] == {"first_accuracy_2": 0.96, "nll": 0.25, "ece": 0.0314, "divergence": 0.02}


def test_the_card_of_a_run_without_settings_of_the_trainer(hub, model, tmp_path):
    run = write_run(tmp_path / "run", model)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["trainer"], config["seed_everything"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    push_to_hub(run, "someone/digits", trust=True)
    card = (hub / "someone" / "digits" / "README.md").read_text()
    assert yaml.safe_load(card.split("## Training")[1].split("```yaml\n")[1].split("```")[0]).keys() == {
        "model",
        "data",
    }


def test_the_card_of_a_tagger_and_of_a_model_that_says_nothing():
    base = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6))
    model = convert(base, torch.randn(2, 4), task="multilabel")
    card = model_card(model, "a/b", results={"gap_mean": 61.5, "head_gap_mean": 60.0, "seeds": 3})
    assert "| GAP@20, % |" in card
    assert "| 61.50 |" in card
    assert "Seeds: 3." in card
    assert 'ensemblenet.load("hf://a/b", base=a_fresh_base)' in card
    plain = model_card(model, "a/b", {"preprocessing": {"mean": [0.5]}})
    assert "| parameters | MACs | activations | time |\n" in plain
    assert "mean:\n- 0.5\n" in plain
    assert "model-index" not in plain
    assert "\n\n\n" not in card + plain


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: load("hf://someone"), "hf://owner/name or hf://owner/name@revision, got 'hf://someone'"),
        (lambda model: load("hf://some/one/else"), "hf://owner/name@revision, got"),
        (lambda model: load("hf://no/where"), "hf://no/where cannot be fetched: 404 Client Error"),
        (lambda model: push_to_hub(model, "digits"), "A repository is named owner/name, got 'digits'"),
        (lambda model: push_to_hub(model, "a/b@c"), "A repository is named owner/name, got 'a/b@c'"),
        (lambda model: push_to_hub(MNIST1DNet(8), "a/b"), "Only a converted model"),
    ],
)
def test_mistakes(hub, model, call, message):
    with pytest.raises(LoadError, match=message):
        call(model)


def test_a_hub_that_refuses(hub, model, monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(LoadError, match=r"someone/digits cannot be written: Token is required. Is there a token\?"):
        push_to_hub(model, "someone/digits")


def test_without_a_connection(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"hf://someone/nothing-of-this-name cannot be fetched"):
        load("hf://someone/nothing-of-this-name")


# -- timm


@pytest.fixture
def registered(tmp_path):
    base = timm.create_model("test_resnet", num_classes=5)
    model = convert(base, torch.randn(2, 3, 32, 32), num_heads=2, seed=3).eval()
    nn.init.normal_(next(model.heads[0].parameters()))  # "trained"
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0, "interpolation": "bilinear"}
    save(model, tmp_path / "saved", {"classes": list("abcde"), "preprocessing": preprocessing})
    name = f"registered_{tmp_path.name}"
    register_timm(name, tmp_path / "saved")
    return name, model, tmp_path


def test_timm_creates_a_registered_model(registered):
    name, model, _ = registered
    assert timm.list_models(name) == [name]
    assert timm.is_model_pretrained(name)
    made = timm.create_model(name, pretrained=True, num_classes=5, in_chans=3, drop_rate=0.0)
    assert made.training
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(made.eval()(x), model(x))
    assert made.train()(x).shape == (2, 3, 5)
    assert made.num_classes == 5
    config = timm.data.resolve_model_data_config(made)
    assert config["input_size"] == (3, 32, 32)
    assert (config["mean"], config["crop_pct"]) == ((0.1, 0.2, 0.3), 1.0)
    assert timm.create_model(name, pretrained=True) is not made


def test_timm_creates_it_untrained(registered):
    name, model, _ = registered
    fresh = timm.create_model(name).eval()
    x = torch.randn(3, 3, 32, 32)
    assert fresh(x).shape == (3, 5)
    assert not torch.allclose(fresh(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 1}, "in_chans=1 must be 3. Convert and train another one"),
        ({"img_size": 64}, "img_size=64 is not one of its options"),
    ],
)
def test_what_a_registered_model_cannot_change(registered, options, message):
    name, _, _ = registered
    with pytest.raises(LoadError, match=message):
        timm.create_model(name, pretrained=True, **options)


@pytest.mark.parametrize("name", ["resnet18", "two words", "load"])
def test_names_that_are_taken(registered, name):
    _, _, folder = registered
    with pytest.raises(LoadError, match="A model needs a name of its own"):
        register_timm(name, folder / "saved")


def test_a_name_is_registered_once_and_from_the_hub(registered, hub):
    name, model, folder = registered
    with pytest.raises(LoadError, match="A model needs a name of its own"):
        register_timm(name, folder / "saved")
    register_timm(f"{name}_hub", push_to_hub(folder / "saved", "someone/net"))
    assert timm.create_model(f"{name}_hub", pretrained=True).num_heads == model.num_heads
    assert ensemblenet.load("hf://someone/net").task == "multiclass"


def test_commands_take_an_address(hub, tmp_path, capsys):
    model = convert(MNIST1DNet(8), torch.randn(2, 40), num_heads=2).eval()
    address = push_to_hub(model, "someone/digits", description={"classes": list("0123456789")})
    data = ["--data.class_path", "ensemblenet.data.MNIST1D", "--data.num_test", "50"]
    assert main(["test", address, *data]) == 0
    assert "someone/digits, test" in capsys.readouterr().out
    assert main(["predict", address, *data, "--output", str(tmp_path / "p.csv")]) == 0
    assert main(["export", address, "--format", "torch", "--output", str(tmp_path / "m.pt2")]) == 0
    assert main(["report", address, *data, "--output", str(tmp_path / "r.html")]) == 0
    assert "someone/digits" in (tmp_path / "r.html").read_text()
    capsys.readouterr()
    assert main(["test", "hf://someone/nothing", *data]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "hf://someone/nothing cannot be fetched" in line


def test_a_model_of_several_inputs_goes_up_and_comes_back(hub):
    model = convert(Text(), text_batch(), budget=1.5).eval()
    address = push_to_hub(model, "someone/text")
    again = load(address, Text())
    assert torch.equal(again(**text_batch(5)), model(**text_batch(5)))
    card = (hub / "someone" / "text" / "README.md").read_text()
    assert "# from ids: int64 (N, 12); mask: int64 (N, 12) to logits (N, C)" in card
    assert "pipeline_tag" not in card


def test_timm_has_no_models_of_several_inputs(tmp_path):
    saved = save(convert(Text(), text_batch(), budget=1.5), tmp_path / "saved")
    with pytest.raises(
        ensemblenet.EnsembleNetError, match=r"takes several inputs, .*; this needs a model of one tensor"
    ):
        register_timm("my_text", saved, Text())
    assert not timm.is_model("my_text")
