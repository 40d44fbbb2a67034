"""A trained network comes back from its run's folder, or from a saved directory, as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ensemblenet
from ensemblenet.data import MNIST1D
from ensemblenet.errors import LoadError
from ensemblenet.inputs import Inputs
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.restore import data_module, restore, store
from ensemblenet.training.fit import fit


def run(tmp_path, conversion):
    settings = {
        "name": "tiny",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": conversion,
            "heads": "fused",
        },
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"num_train": 60, "num_val": 20, "num_test": 50, "batch_size": 20},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return fit(["--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")])


@pytest.mark.parametrize("conversion", [None, {"num_heads": 2}])
def test_a_run_restores_what_it_tested(tmp_path: Path, conversion: dict[str, Any] | None) -> None:
    folder = run(tmp_path, conversion)
    restored = restore(folder)
    [row] = json.loads((folder / "results.json").read_text())["rows"]
    data = data_module(restored)
    assert isinstance(data, MNIST1D)
    data.setup()
    x, y = data.test
    with torch.inference_mode():
        wrong = (restored.network(x).argmax(1) != y).float().mean()
    assert 100 * wrong.item() == pytest.approx(row["error_mean"], abs=1e-3)
    assert (restored.task, restored.inputs.shape, restored.num_classes()) == ("multiclass", (40,), 10)
    assert restored.classes == list("0123456789")
    assert not restored.network.training


def test_a_base_of_integers_is_given_integers(tmp_path: Path) -> None:
    arguments = {"num_embeddings": 10, "embedding_dim": 3}
    base = {"class_path": "torch.nn.Embedding", "init_args": arguments}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"base": base}, "data": {"class_path": "any.Data"}}))
    store(torch.nn.Embedding(**arguments), "multiclass", Inputs.of(torch.tensor([1, 2])), {}, tmp_path)
    restored = restore(tmp_path, trust=True)
    assert (restored.inputs.dtype, restored.num_classes()) == ("int64", 3)
    (tmp_path / "model" / "data.json").write_text('{"task": "multiclass", "input_shape": [], "input_dtype": "load"}')
    with pytest.raises(LoadError, match=r"data.json: input_dtype must be a dtype's name, got 'load'\.$"):
        restore(tmp_path, trust=True)


def test_other_data_of_the_same_kind(tmp_path: Path) -> None:
    restored = restore(run(tmp_path, None))
    assert data_module(restored, {"num_test": 30}).sizes == (60, 20, 30)  # pyright: ignore
    with pytest.raises(LoadError, match="folder"):
        data_module(restored, {"folder": "x"})


def test_a_saved_directory(tmp_path: Path) -> None:
    model = ensemblenet.convert(MNIST1DNet(8), torch.randn(2, 40), seed=1).eval()
    ensemblenet.save(model, tmp_path / "saved", {"classes": list("abcdefghij")})
    restored = restore(tmp_path / "saved")
    x = torch.randn(3, 40)
    assert torch.equal(restored.network(x), model(x))
    assert (restored.classes, restored.task, restored.config) == (list("abcdefghij"), "multiclass", None)
    with pytest.raises(LoadError, match="is no run's folder and so does not know its data"):
        data_module(restored)


def test_a_base_that_only_the_user_can_make(tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    model = ensemblenet.convert(base, torch.randn(2, 4)).eval()
    ensemblenet.save(model, tmp_path / "saved")
    with pytest.raises(LoadError, match="pass a fresh instance"):
        restore(tmp_path / "saved")
    assert torch.equal(restore(tmp_path / "saved", base).network(torch.ones(1, 4)), model(torch.ones(1, 4)))


def missing_weight(folder):
    tensors = load_file(folder / "model" / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_weight, "does not hold the weights of this network"),
        (lambda f: (f / "model" / "model.safetensors").unlink(), "holds no weights: model.safetensors is missing"),
        (lambda f: (f / "model" / "model.safetensors").write_bytes(b"x"), "damaged or not a safetensors file"),
        (lambda f: (f / "model" / "data.json").write_text("["), "data.json is not JSON"),
        (lambda f: (f / "model" / "data.json").write_text("[]"), "must hold an object of JSON, got list"),
        (lambda f: (f / "model" / "data.json").unlink(), "does not name task and input_shape"),
        *(
            (lambda f, file=file, text=text: (f / file).write_text(text), rf"{file} (is not JSON|must hold)")
            for file, text in (
                ("results.json", ""),
                ("results.json", '{"rows": [{"meth'),
                ("results.json", "[1]"),
                ("results.json", '{"rows": 3}'),
                ("data.json", '{"task": '),
                ("environment.json", "["),
            )
        ),
    ],
)
def test_a_damaged_run(tmp_path: Path, spoil: Callable[..., Any], message: str) -> None:
    folder = run(tmp_path, None)
    spoil(folder)
    with pytest.raises(LoadError, match=message):
        restore(folder)
