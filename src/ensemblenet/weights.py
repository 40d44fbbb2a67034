"""Weights on disk with a checksum: safetensors files, and what `torch.save` wrote, read as tensors alone."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from ensemblenet.errors import LoadError, first_line

__all__ = [
    "Header",
    "damaged_part",
    "digest",
    "read_checkpoint",
    "read_header",
    "read_state",
    "read_weights",
    "write_weights",
]

_PREFIX = "ensemblenet."  # of what is ours in a file's metadata, beside the names of tied tensors
_SEAL = "sha256"
_UNSEALED = "0" * 64  # in the place of the checksum while it is worked out
_BLOCK_BYTES = 1 << 20
_IS_FOLDER = 0x10  # in a part's attributes: PyTorch would then leave its memory as it happens to be


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself before any tensor is read.

    Attributes:
        path: of the file.
        shapes: of all tensors by name; a tied one stands under each of its names.
        notes: what [`write_weights`][ensemblenet.weights.write_weights] was told; empty in files of others.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    notes: Mapping[str, str]

    def check_seal(self) -> None:
        """Compare the file with its checksum, where it has one: versions up to 0.1.0 wrote none.

        Raises:
            LoadError: they differ.
        """
        seal = self.notes.get(_SEAL)
        if self.notes and (seal is None or _digest_of(self.path, seal) != seal):
            raise LoadError(
                f"{self.path} is damaged: its SHA-256 is not the one that was saved with it. Copy it again."
            )


def digest(text: str) -> str:
    """The SHA-256 of a text.

    Example:
        >>> digest("")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(text.encode()).hexdigest()


def write_weights(network: nn.Module, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write a network's weights as safetensors, with a checksum of the whole file in its header.

    Args:
        network: whose state is written; tied tensors once.
        path: of the file.
        notes: more to keep in the header.

    Raises:
        SafetensorError: it cannot be written, as on a full disk.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> write_weights(nn.Linear(8, 3), path, {"made": "by hand"})
        >>> header = read_header(path)
        >>> header.check_seal()
        >>> header.shapes["weight"], header.notes["made"]
        ((3, 8), 'by hand')
    """
    own = {_SEAL: _UNSEALED, **(notes or {})}
    save_model(network, str(path), {_PREFIX + name: value for name, value in own.items()})
    seal = _digest_of(path, _UNSEALED)
    with path.open("r+b") as file:
        _, header = _read_raw_header(file)
        file.seek(-len(header), os.SEEK_CUR)
        file.write(header.replace(_UNSEALED.encode(), seal.encode(), 1))


def read_header(path: Path) -> Header:
    """Read what a safetensors file holds, but none of its tensors.

    Raises:
        LoadError: there is no such file, or it is damaged or another one.
    """
    if not path.is_file():
        raise LoadError(f"{path.parent} holds no weights: {path.name} is missing.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is damaged or not a safetensors file: {first_line(error)}") from error
    notes = {name.removeprefix(_PREFIX): text for name, text in metadata.items() if name.startswith(_PREFIX)}
    tied = {name: shapes[kept] for name, kept in metadata.items() if kept in shapes}
    return Header(path, tied | shapes, notes)


def read_weights(network: nn.Module, path: Path) -> None:
    """Read weights into a network that has the same names and shapes.

    Raises:
        LoadError: the file is damaged, or of another network.
    """
    try:
        load_model(network, str(path))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise LoadError(f"{path} does not hold the weights of this network: {first_line(error)}") from error


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read what `torch.save` wrote: tensors and plain data alone; the checksums of its parts are compared.

    Args:
        path: of the file.
        map_location: where tensors go, as for `torch.load`.

    Raises:
        LoadError: there is no such file, it is damaged, or it holds other objects, which would run code.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "last.ckpt")
        >>> torch.save({"step": 3}, path)
        >>> read_checkpoint(path)
        {'step': 3}
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"There is no file {path}.")
    try:
        if zipfile.is_zipfile(path) and (damaged := damaged_part(path)) is not None:
            raise LoadError(f"{path} is damaged: {damaged} in it has another checksum than was written.")
        return torch.load(path, map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadError(f"{path} is damaged, or holds more than tensors and plain data, which is not read.") from error
    except LoadError:
        raise
    except Exception as error:  # whatever a damaged file makes of the readers
        raise LoadError(f"{path} is damaged or not a file of PyTorch: {first_line(error)}") from error


def read_state(path: str | os.PathLike[str], network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict by the names that a network has for them: safetensors, or what `torch.save` wrote.

    What training programs wrap around a state dict is taken off: a dictionary with it under a name such as "model" or
    "state_dict", averaged weights first, and prefixes such as "module.".

    Args:
        path: of the file.
        network: whose names count; a prefix that its own names have stays.

    Raises:
        LoadError: what [`read_checkpoint`][ensemblenet.weights.read_checkpoint] raises, or it holds no state dict.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "last.pth")
        >>> network = nn.Linear(8, 3)
        >>> wrapped = {f"module.{name}": own for name, own in network.state_dict().items()}
        >>> torch.save({"model": wrapped, "epoch": 3}, path)
        >>> sorted(read_state(path, network))
        ['bias', 'weight']
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        read_header(path).check_seal()
        found: Any = load_file(str(path))
    else:
        found = read_checkpoint(path)
    while isinstance(found, Mapping) and (inner := next((key for key in _WRAPPERS if _is_state(found.get(key))), None)):
        found = found[inner]
    state = {name: own for name, own in found.items() if isinstance(own, Tensor)} if _is_state(found) else {}
    if not state:
        raise LoadError(f"{path} holds no state dict: save network.state_dict(), best as safetensors.")
    own_names = network.state_dict().keys()
    while prefix := next((one for one in _PREFIXES if _has(state, one) and not _has(own_names, one)), None):
        state = {name.removeprefix(prefix): own for name, own in state.items() if name.startswith(prefix)}
    return state


# under which names programs keep a state dict, and what they put in front of its names
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "network", "module")
_PREFIXES = ("module.", "_orig_mod.", "network.", "model.", "net.")


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and any(isinstance(value, Tensor | Mapping) for value in found.values())


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def damaged_part(path: Path) -> str | None:
    """The name of the first part of what `torch.save` wrote that is not as it was written, if there is one.

    PyTorch itself does not compare the CRC-32 of each part.

    Raises:
        BadZipFile: it is no such file, or its table of parts is damaged.
    """
    with zipfile.ZipFile(path) as parts:
        folders = [part.filename for part in parts.infolist() if part.external_attr & _IS_FOLDER]
        return next(iter(folders), None) or parts.testzip()


def _digest_of(path: Path, seal: str) -> str:
    """The SHA-256 of a safetensors file as it was before its checksum was put in."""
    with path.open("rb") as file:
        size, header = _read_raw_header(file)
        found = hashlib.sha256(size + header.replace(seal.encode(), _UNSEALED.encode(), 1))
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _read_raw_header(file: Any) -> tuple[bytes, bytes]:
    """The length of a safetensors file's header, eight bytes, and the header; the tensors follow."""
    size = file.read(8)
    return size, file.read(int.from_bytes(size, "little"))
