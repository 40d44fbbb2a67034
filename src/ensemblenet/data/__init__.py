"""Data modules; each yields batches of inputs and targets, and is loaded when it is first used."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ensemblenet.extras import require

require("train")

# The class of each data format, and its file, which imports the libraries that the format needs.
_HOMES = {
    "DataModule": "module",
    "ImageData": "images",
    "Kinetics": "kinetics",
    "MNIST1D": "mnist1d",
    "ParquetImages": "parquet_images",
    "YouTube8M": "youtube8m",
}

__all__ = ["MNIST1D", "DataModule", "ImageData", "Kinetics", "ParquetImages", "YouTube8M"]

if TYPE_CHECKING:
    from ensemblenet.data.images import ImageData
    from ensemblenet.data.kinetics import Kinetics
    from ensemblenet.data.mnist1d import MNIST1D
    from ensemblenet.data.module import DataModule
    from ensemblenet.data.parquet_images import ParquetImages
    from ensemblenet.data.youtube8m import YouTube8M


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ensemblenet.data' has no attribute {name!r}")
    value = getattr(import_module(f"ensemblenet.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def load_all() -> None:
    """Import each data module whose libraries are installed; only then do configurations take its short name."""
    for home in _HOMES.values():
        with suppress(ImportError):
            import_module(f"ensemblenet.data.{home}")
