"""Weights of one's own: every usual wrapper is taken off, and what does not fit is told by name and shape."""

from __future__ import annotations

import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.models import create
from ensemblenet.models.sources import ModelNameError

State = dict[str, Tensor]
WRAPPED: dict[str, Callable[[State], Any]] = {
    "plain.pth": lambda state: state,
    "model.pth": lambda state: {"epoch": 3, "model": state, "args": {"lr": 0.1}},
    "lightning.ckpt": lambda state: {"state_dict": {f"model.{key}": own for key, own in state.items()}, "epoch": 3},
    "parallel.pth": lambda state: {"state_dict": {f"module.{key}": own for key, own in state.items()}},
    "compiled.pt": lambda state: {f"module._orig_mod.{key}": own for key, own in state.items()},
    "old.pth": lambda state: {key: own for key, own in state.items() if "num_batches" not in key},
    "averaged.pth": lambda state: {
        "model": {key: own + 1 for key, own in state.items()},
        "model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{key}": own for key, own in state.items()},
    },
    "fit.ckpt": lambda state: {
        "state_dict": {f"network.{key}": own for key, own in state.items()} | {"metrics.val.count": torch.zeros(1)}
    },
}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_networks")
    setattr(module, "small", lambda num_classes=3: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, num_classes)))  # noqa: B010
    monkeypatch.setitem(sys.modules, "own_networks", module)


@pytest.mark.parametrize("file", [*WRAPPED, "plain.safetensors"])
def test_wrappers_are_taken_off(file: str, tmp_path: Path) -> None:
    trained = create("test_resnet", 10)
    state = trained.state_dict()
    if file.endswith("safetensors"):
        save_file(state, tmp_path / file)
    else:
        torch.save(WRAPPED[file](state), tmp_path / file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = create("test_resnet", 10, str(tmp_path / file))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    "name", ["test_vit", "torchvision:squeezenet1_1", "ensemblenet.models:CifarResNet", "own_networks:small"]
)
def test_any_network_takes_weights_and_other_classes_begin_anew(name: str, own: None, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    state = create(name, 3).state_dict()
    save_file(state, file)
    assert all(torch.equal(tensor, state[key]) for key, tensor in create(name, 3, str(file)).state_dict().items())
    with pytest.warns(UserWarning, match=r"weights.safetensors has 3 classes and .* 7: .* begins anew"):
        other = create(name, 7, str(file)).state_dict()
    kept = {key for key, tensor in other.items() if tensor.shape == state[key].shape}
    assert len(state) - len(kept) == 2
    assert all(torch.equal(other[key], state[key]) for key in kept)


def test_a_network_that_knows_older_layouts_reads_them(tmp_path: Path) -> None:
    """timm's: positions of images of another size."""
    file = tmp_path / "weights.pth"
    torch.save(create("test_vit").state_dict(), file)
    larger = create("test_vit", weights=str(file), options={"img_size": 192})
    assert larger.get_parameter("pos_embed").shape[1] > create("test_vit").get_parameter("pos_embed").shape[1]


@pytest.mark.parametrize("name", ["test_resnet", "own_networks:small"])
def test_weights_of_another_network_are_told_by_names_and_shapes(name: str, own: None, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": nn.Sequential(*(nn.Linear(9, 4) for _ in range(3))).state_dict()}, file)
    with pytest.raises(ModelNameError) as caught:
        create(name, 3, str(file))
    said = str(caught.value)
    assert "\n" not in said
    theirs, ours = (
        re.findall(r"has ((?:[\w.]+ \([\d, ]*\)(?:, )?)+) and ([\d,]+) more", said)
        if "resnet" in name
        else (
            (said.partition("the file has ")[2].partition("; the network has ")[0], ""),
            (said.partition("the network has ")[2], ""),
        )
    )
    assert "0.weight (4, 9)" in theirs[0]
    assert ours[0].startswith("conv1.0.weight" if "resnet" in name else "0.weight (5, 4), 0.bias (5,), 2.weight (3, 5)")
    assert "weights_only" not in said


class Other:
    """What a pickle of a whole network holds."""


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Other(), "is not a state dict of tensors alone: .* as safetensors"),
        ({"epoch": 3}, "holds no state dict"),
        (torch.zeros(3), "holds no state dict"),
        (None, "weights.pth: .*[Nn]o such file"),
    ],
)
def test_a_file_that_is_no_state_dict_ends_a_command_in_one_line(
    made: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.pth"
    if made is not None:
        torch.save(made, file)
    assert main(["convert", "test_resnet", "--weights", str(file), "--output", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(said, error)
    assert error.count("\n") == 0
    assert "weights_only" not in error


def test_commands_take_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, saved = tmp_path / "weights.safetensors", tmp_path / "saved"
    base = create("test_resnet", 3)
    save_file(base.state_dict(), file)
    named = ["test_resnet", "--weights", str(file), "--num-classes", "3", "--input-shape", "3,32,32"]
    split = ["--split-at", "layer3", "--budget", "2"]
    assert main(["info", *named]) == 0
    assert main(["convert", *named, *split, "--init", "inherit", "--freeze", "trunk", "--output", str(saved)]) == 0
    model = ensemblenet.load(saved)
    assert model.trunk_is_frozen
    state = base.state_dict()
    assert all(torch.equal(own, state[name]) for name, own in model.trunk.state_dict().items())
    capsys.readouterr()
    assert main(["info", str(saved), "--weights", str(file)]) == 2
    assert "--weights is for a network by name" in capsys.readouterr().err
