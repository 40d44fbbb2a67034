"""Shards in the TFRecord format, here or on any server that fsspec knows; without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of these (4 bytes), its data, and a checksum of the data
(4 bytes); checksums are CRC-32C, masked. The format is that of TensorFlow's documentation.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
from fsspec.compression import compr
from fsspec.utils import infer_compression

from ensemblenet.data.loading import OnBroken
from ensemblenet.data.remote import (
    RemoteFile,
    checked_place,
    expanded,
    find_urls,
    in_threads,
    is_url,
    joined,
    remote_file,
)
from ensemblenet.errors import DataError

__all__ = ["DamageError", "Record", "Shard", "find_shards", "index_shard", "index_shards"]

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_AROUND = _HEADER.size + _CHECKSUM.size  # bytes of a record besides its data
_ENDINGS = (".tfrecord", ".tfrecords", ".tfrecord.gz", ".tfrecords.gz")
_UNREADABLE = (OSError, EOFError, zlib.error)
_LARGEST = 2**28  # bytes of a record: a few of gzip may claim any number
_BUFFER = 2**16  # bytes; a file of small records is read in half the time that Python's 8 KB take


class Record(NamedTuple):
    """One record: its file, its first byte in it, and its data."""

    path: str
    offset: int
    data: bytes

    def error(self, problem: str) -> DataError:
        """The error that says where the record is and what is wrong with it."""
        return DataError(f"{self.path}: the record at byte {self.offset:,} {problem}")


class DamageError(DataError):
    """A record whose bytes are not those that were written."""


@dataclass(frozen=True)
class Shard:
    """A file of records.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/a.tfrecord"
        >>> with open(path, "wb") as file:
        ...     for data in (b"one", b"two"):
        ...         header = struct.pack("<Q", len(data))
        ...         parts = header, _CHECKSUM.pack(_masked(header)), data, _CHECKSUM.pack(_masked(data))
        ...         _ = file.write(b"".join(parts))
        >>> [record.data for record in index_shard(path).read()]
        [b'one', b'two']

    Attributes:
        path: of a file here, or on a server.
        offsets: the first byte of each record, and the end of the last one: one number more than records, int64. In
            a gzip file they count decompressed bytes.
    """

    path: str | RemoteFile
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record | DamageError]:
        """The records from `start` to `stop`, in order, with their checksums compared.

        Args:
            start: number of the first record.
            stop: number of the record to stop before; None reads to the end.

        Returns:
            Each record, or in the place of a damaged one the error that names it.

        Raises:
            DataError: the file cannot be opened.
        """
        offsets = self.offsets[start : (len(self) if stop is None else stop) + 1].tolist()
        if len(offsets) < 2:
            return
        with _open(self.path, _BUFFER) as file:
            file.seek(offsets[0])
            for offset, end in pairwise(offsets):
                record = _read_record(file, str(self.path), offset, end)
                yield record
                if isinstance(record, DamageError):
                    file.seek(end)

    def read(self, start: int = 0, stop: int | None = None, on_broken: OnBroken = "error") -> Iterator[Record | None]:
        """The records from `start` to `stop`, in order, with damaged ones an error or None.

        Args:
            start: number of the first record.
            stop: number of the record to stop before; None reads to the end.
            on_broken: "error" raises at a damaged record; "skip" yields None in its place and warns.

        Raises:
            DataError: a record is damaged, or the file cannot be read.
        """
        for record in self.records(start, stop):
            if isinstance(record, Record):
                yield record
            elif on_broken == "error":
                raise record
            else:
                warnings.warn(f"{record} Skipped.", stacklevel=2)
                yield None


def _read_record(file: IO[bytes], path: str, offset: int, end: int) -> Record | DamageError:
    try:
        block = file.read(end - offset)
    except _UNREADABLE as error:
        return DamageError(f"{path}: the record at byte {offset:,} cannot be read: {error}.")
    data = block[_HEADER.size : -_CHECKSUM.size]  # the index has compared the header
    if len(block) < end - offset or _masked(data) != int.from_bytes(block[-_CHECKSUM.size :], "little"):
        return DamageError(
            f"{path}: the record at byte {offset:,} is damaged: its checksum does not fit its {len(data):,} bytes."
        )
    return Record(path, offset, data)


def _masked(data: bytes) -> int:
    """The checksum as the format stores it: rotated right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# -- finding shards


def find_shards(patterns: str | Sequence[str], folder: str | None = None) -> list[str]:
    """The files that patterns name, sorted.

    Args:
        patterns: paths, or patterns with `*`, `?`, `[]` and braces, or folders, which stand for the TFRecord files in
            them; or URLs, such as `s3://bucket/train*.tfrecord`.
        folder: what patterns without a protocol or a leading slash are relative to.

    Raises:
        DataError: a pattern that no file matches.

    Example:
        >>> import tempfile, pathlib
        >>> folder = tempfile.mkdtemp()
        >>> for name in ("train1.tfrecord", "train0.tfrecord", "notes.txt"):
        ...     pathlib.Path(folder, name).touch()
        >>> [path.removeprefix(folder) for path in find_shards(folder)]
        ['/train0.tfrecord', '/train1.tfrecord']
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if folder is not None:
        patterns = [str(joined(folder, pattern)) for pattern in patterns]
    return sorted({path for pattern in patterns for path in _matches(pattern)})


def _matches(pattern: str) -> list[str]:
    if is_url(pattern):
        return find_urls(pattern, _ENDINGS)
    names: list[str] = []
    for path in map(str, map(checked_place, expanded(pattern))):
        if os.path.isdir(path):
            names += [os.path.join(path, name) for name in os.listdir(path) if name.endswith(_ENDINGS)]
        elif any(character in path for character in "*?["):
            names += filter(os.path.isfile, glob(path, recursive=True))
        else:
            names += [path] if os.path.exists(path) else []
    if not names:
        raise DataError(f"No files match {pattern}; give a file, a pattern, or a folder of {', '.join(_ENDINGS)}.")
    return names


@contextmanager
def _open(path: str | RemoteFile, buffer: int = -1) -> Iterator[IO[bytes]]:
    """Open a file, with a buffer of so many bytes."""
    try:
        file = (Path(path) if isinstance(path, str) else path).open("rb", buffer)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}") from error
    known: dict[Any, Any] = compr
    decompress = known[infer_compression(str(path))]
    with file, nullcontext(file) if decompress is None else decompress(file, mode="rb") as content:
        yield content


# -- finding records


def index_shards(paths: Sequence[str], on_broken: OnBroken = "error") -> list[Shard]:
    """Find the records of several files, as [`index_shard`][ensemblenet.data.tfrecord.index_shard] does of one."""
    return in_threads(lambda path: index_shard(path, on_broken), paths, "Reading headers")


def index_shard(path: str, on_broken: OnBroken = "error") -> Shard:
    """Find the records of a file from their headers; a remote file is fetched for it, a gzip file is read to its end.

    Args:
        path: of a file here, or a URL; one that ends in `.gz` is decompressed.
        on_broken: for a damaged header, after which no record can be found: "error" raises; "skip" warns and leaves
            out the rest of the file.

    Raises:
        DataError: the file is no TFRecord file, is truncated or damaged, or claims a record of over 256 MiB.
    """
    offsets = array("q", [0])  # an eighth of the memory of a list
    source = remote_file(path) if is_url(path) else path
    with _open(source) as file:
        try:
            for end in _ends(file, path):
                offsets.append(end)
        except DamageError as error:
            if on_broken == "error":
                raise
            warnings.warn(f"{error} The rest of the file is left out.", stacklevel=2)
    return Shard(source, np.array(offsets, np.int64))


def _ends(file: IO[bytes], path: str) -> Iterator[int]:
    """The end of each record."""
    offset = 0
    try:
        while header := file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                raise _truncated(path, offset)
            length, checksum = _HEADER.unpack(header)
            if _masked(header[:8]) != checksum:
                if offset == 0:
                    raise DataError(f"{path} is not a TFRecord file: it does not begin with a record's header.")
                raise DamageError(f"{path}: the header at byte {offset:,} is damaged: its checksum does not fit.")
            if length > _LARGEST:
                raise DamageError(
                    f"{path}: the record at byte {offset:,} claims {length:,} bytes; up to {_LARGEST:,} are read."
                )
            end = offset + length + _AROUND
            file.seek(end - 1)
            if not file.read(1):
                raise _truncated(path, offset)
            yield end
            offset = end
    except _UNREADABLE as error:
        if offset == 0:
            raise DataError(f"{path} cannot be read: {error}") from error
        raise DamageError(f"{path}: what follows byte {offset:,} cannot be read: {error}.") from error


def _truncated(path: str, offset: int) -> DamageError:
    return DamageError(f"{path}: the record at byte {offset:,} is truncated: the file ends within it.")
