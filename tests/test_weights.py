"""Weights on disk: a damaged file is found by its checksum, and the message names it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ensemblenet import LoadError
from ensemblenet.models.sources import ModelNameError, create
from ensemblenet.weights import read_checkpoint, read_header, read_weights, write_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight


def flipped(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_weights(Tied(), path, {"made": "here"})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole)
        flipped(path, place, place % 8)
        with pytest.raises(LoadError, match=r"model\.safetensors is damaged"):
            read_header(path).check_seal()


def test_weights_come_back_and_other_readers_read_them(tmp_path: Path) -> None:
    path, network, other = tmp_path / "model.safetensors", Tied(), Tied()
    write_weights(network, path)
    header = read_header(path)
    assert header.shapes == {"first.bias": (6,), "first.weight": (6, 6), "last.weight": (6, 6)}
    read_weights(other, path)
    assert torch.equal(other.last.weight, network.first.weight)
    assert torch.equal(load_file(path)["first.bias"], network.first.bias)


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(nn.Linear(4, 3).state_dict(), path)
    read_header(path).check_seal()


def test_a_write_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="No such file"):  # `atomic_folder` names the file
        write_weights(nn.Linear(4, 3), tmp_path / "gone" / "model.safetensors")


class Other:
    """What no checkpoint of ours holds."""


CHECKPOINT = {"state_dict": {"weight": torch.arange(600.0)}, "epoch": 3}


def test_a_damaged_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(CHECKPOINT, path)
    whole = path.read_bytes()
    harmless, messages = 0, set()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole)
        flipped(path, place, place % 8)
        try:
            read = read_checkpoint(path)
        except LoadError as error:
            messages.add(str(error))
            continue
        harmless += 1
        assert torch.equal(read["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])
        assert read["epoch"] == 3
    assert harmless < len(whole) / 14
    assert all(str(path) in message and "weights_only" not in message for message in messages)


def test_a_part_that_is_called_a_folder_is_damage(tmp_path: Path) -> None:
    """One bit of a zip file's directory, with which PyTorch gives what lay in memory before."""
    path = tmp_path / "last.ckpt"
    torch.save(CHECKPOINT, path)
    data = path.read_bytes()
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    flipped(path, entry + 38, 4)
    with pytest.raises(LoadError, match=r"last\.ckpt is damaged: \S+/data/0 in it"):
        read_checkpoint(path)


@pytest.mark.parametrize("size", [0, 1, 100, 1500])
def test_a_truncated_checkpoint(tmp_path: Path, size: int) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(CHECKPOINT, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(LoadError, match=r"last\.ckpt is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("how", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_other_objects_are_not_read_and_nobody_is_told_to_read_them(tmp_path: Path, how: Any) -> None:
    path = tmp_path / "last.ckpt"
    how({"model": Other()}, path)
    with pytest.raises(LoadError, match=r"last\.ckpt is damaged, or holds more than tensors and plain data") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(LoadError, match="There is no file"):
        read_checkpoint(tmp_path / "gone.ckpt")


def spoil_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def spoil_pickle(path: Path) -> None:
    torch.save({"model": Other()}, path)


def spoil_half(path: Path) -> None:
    torch.save(create("test_resnet").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def spoil_other_network(path: Path) -> None:
    torch.save(create("test_vit").state_dict(), path)


@pytest.mark.parametrize("spoil", [spoil_tensor, spoil_pickle, spoil_half, spoil_other_network])
def test_weights_to_begin_with_that_are_none(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "base.pth"
    spoil(path)
    with pytest.raises(ModelNameError, match=r"base\.pth") as caught:
        create("test_resnet", weights=str(path))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_weights_to_begin_with_are_compared_with_their_checksum(tmp_path: Path) -> None:
    path, network = tmp_path / "base.safetensors", create("test_resnet")
    write_weights(network, path)
    again = create("test_resnet", weights=str(path))
    assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["ensemblenet.sha256"]
    flipped(path, path.stat().st_size - 5)
    with pytest.raises(LoadError, match=r"base\.safetensors is damaged: its SHA-256"):
        create("test_resnet", weights=str(path))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(LoadError, match=r"base\.safetensors is damaged or not a safetensors file"):
        create("test_resnet", weights=str(path))
