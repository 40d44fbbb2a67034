"""Files and folders that are there complete or not at all, written under another name and renamed; and small texts."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensemblenet.errors import LoadError

__all__ = ["atomic_folder", "atomic_path", "read_json", "read_text", "write_json"]

_MOST_TEXT_BYTES = 1 << 24


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a name to write a file under; it takes the file's own name only when it is complete.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.json"
        >>> with atomic_path(path) as unfinished:
        ...     _ = unfinished.write_text("{}")
        ...     path.exists()
        False
        >>> path.read_text()
        '{}'
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder to write files into; it takes its own name only when they are complete.

    Args:
        path: where nothing is yet, or an empty folder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> with atomic_folder(path) as unfinished:
        ...     _ = (unfinished / "recipe.json").write_text("{}")
        ...     path.exists()
        False
        >>> [file.name for file in path.iterdir()]
        ['recipe.json']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write plain data for people to read, complete or not at all."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Read a small file that may come from anyone.

    Raises:
        LoadError: it is large, or not text.
    """
    if path.stat().st_size > _MOST_TEXT_BYTES:
        raise LoadError(f"{path} is larger than any {path.stem}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is not text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of JSON from a small file that may come from anyone.

    Raises:
        LoadError: it is something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.json"
        >>> write_json(path, {"rows": []})
        >>> read_json(path)
        {'rows': []}
    """
    try:
        data = json.loads(read_text(path))
    except LoadError:
        raise
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} must hold an object of JSON, got {type(data).__name__}.")
    return data
