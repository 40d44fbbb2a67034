"""Files and folders that are there complete or not at all, written under another name and renamed; and small texts."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ensemblenet.errors import LoadError, first_line

__all__ = [
    "atomic_folder",
    "atomic_path",
    "errors_name",
    "folders_above",
    "read_json",
    "read_text",
    "remove_unfinished",
    "write_json",
]

_MOST_TEXT_BYTES = 1 << 24
_UNFINISHED = re.compile(r"\..+\.\d+")
# how PyTorch and safetensors say that a file could not be written: they know no errno
_NOT_WRITTEN = re.compile(r"I/O error|os error|PytorchStreamWriter|inline_container|iostream error")


@contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Makes the folders that a file or folder is to lie in; those that are still empty after an error go again.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "newer" / "results.json"
        >>> with suppress(ValueError), folders_above(path):
        ...     print(path.parent.exists())
        ...     raise ValueError
        True
        >>> path.parents[1].exists()
        False
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a name to write a file under; it takes the file's own name only when it is complete.

    The folders that it is to lie in are made.

    Raises:
        OSError: it cannot be written; the error names the file.

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
    with folders_above(path):
        try:
            with errors_name(path, unfinished):
                yield unfinished
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                unfinished.replace(path)
        finally:
            with suppress(OSError):
                unfinished.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder to write files into; it takes its own name only when they are complete.

    Folder and files get the permissions that the umask leaves, however they were written.

    Args:
        path: where nothing is yet, or an empty folder.

    Raises:
        OSError: it cannot be written; the error names the folder.

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
    with folders_above(path):
        with errors_name(path, path.parent):
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=f".{os.getpid()}", dir=path.parent))
        try:
            unfinished = aside / path.name
            with errors_name(path, unfinished):
                unfinished.mkdir()
                mode = unfinished.stat().st_mode  # what the umask leaves; safetensors gives files to their owner alone
                yield unfinished
                for file in unfinished.rglob("*"):
                    file.chmod(mode & (0o777 if file.is_dir() else 0o666))
                unfinished.replace(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed left in a folder and below it; only its one writer may.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in (".last.ckpt.4711", ".hidden", "last.ckpt"):
        ...     (folder / name).touch()
        >>> remove_unfinished(folder)
        >>> sorted(path.name for path in folder.iterdir())
        ['.hidden', 'last.ckpt']
    """
    for path in [path for path in folder.rglob(".*") if _UNFINISHED.fullmatch(path.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write plain data for people to read, complete or not at all; NaN and infinity, which JSON lacks, become null."""
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def errors_name(path: Path, unfinished: Path) -> Iterator[None]:
    """Errors of writing name what was to be written: a full disk's name nothing, others the name aside.

    Args:
        path: what is to be written.
        unfinished: where it is written first.

    Raises:
        OSError: instead of other errors by which libraries say that a file could not be written.
    """
    try:
        yield
    except OSError as error:
        named = error.filename is not None and not str(error.filename).startswith(str(unfinished))
        if named or error.errno is None:
            raise
        reason, said = os.strerror(error.errno), error.strerror or ""  # PyArrow's is long, and no text of the system
        raise OSError(error.errno, said if said.startswith(reason) else reason, str(path)) from error
    except (RuntimeError, SafetensorError) as error:
        if not _NOT_WRITTEN.search(str(error)):
            raise
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        said = f"Write error; is the disk full? ({first_line(error)})"
        raise OSError(errno.EIO, said, str(path)) from error


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
