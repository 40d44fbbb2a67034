"""Weights that a study keeps for its own later use: by a key, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ensemblenet.errors import LoadError
from ensemblenet.storage.atomic import atomic_path
from ensemblenet.weights import digest, read_header, read_weights, write_weights

__all__ = ["keep_weights", "take_weights"]


def keep_weights(network: nn.Module, folder: Path, key: str) -> None:
    """Write a network's weights under a key; the folder is made where it is missing."""
    folder.mkdir(exist_ok=True)
    with atomic_path(_file(folder, key)) as unfinished:
        write_weights(network, unfinished)


def take_weights(network: nn.Module, folder: Path, key: str) -> bool:
    """Load what was kept under a key into the same network; False where nothing was, or where it is damaged.

    Example:
        >>> import tempfile
        >>> folder, network = Path(tempfile.mkdtemp()), nn.Linear(2, 2)
        >>> keep_weights(network, folder, "seed 0")
        >>> take_weights(network, folder, "seed 0"), take_weights(network, folder, "seed 1")
        (True, False)
    """
    try:
        header = read_header(_file(folder, key))
        header.check_seal()
    except LoadError:
        return False
    read_weights(network, header.path)
    return True


def _file(folder: Path, key: str) -> Path:
    return folder / f"{digest(key)[:16]}.safetensors"
