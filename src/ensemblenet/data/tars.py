"""Files in tars, found by their headers and read where they lie; nothing is unpacked."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from lightning.pytorch.utilities import rank_zero_warn

from ensemblenet.data.classes import class_name
from ensemblenet.data.listing import is_hidden
from ensemblenet.data.remote import RemoteFile
from ensemblenet.errors import DataError, first_line

__all__ = ["TarFile", "by_class", "files_of_tar"]

_LONGEST_LABEL = 1000  # bytes
_LONGEST_END = 2**20  # bytes of zeros behind the files that are looked at; most programs write up to 10 KiB


@dataclass(frozen=True)
class TarFile:
    """A file in a tar: where its bytes are.

    Args:
        tar: the tar.
        name: of the file in it; in a tar within the tar it begins with that one's name without `.tar`.
        begin: its first byte in the outer tar.
        size: its length in bytes.
        text: of a label, its beginning.
    """

    tar: Path | RemoteFile
    name: str
    begin: int
    size: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.name} of {self.tar}"

    def open(self) -> BinaryIO:
        """Its content, in memory; the tar is closed again, as open files must not pass to workers."""
        with self.tar.open("rb") as file:
            file.seek(self.begin)
            return io.BytesIO(file.read(self.size))


def by_class(files: Sequence[TarFile]) -> dict[str, list[tuple[str, TarFile]]]:
    """The files of each class, with names, as in class folders; what all files lie in is the split itself."""
    places = [PurePosixPath(file.name.removeprefix("/")).parts for file in files]
    while places and all(len(place) > 2 for place in places) and len({place[0] for place in places}) == 1:
        places = [place[1:] for place in places]
    found: dict[str, list[tuple[str, TarFile]]] = {}
    for place, file in zip(places, files, strict=True):
        of = class_name(place[0]) if len(place) > 1 else ""
        found.setdefault(of, []).append(("/".join(place), file))
    return found


def files_of_tar(path: Path | RemoteFile, suffixes: Sequence[str], label: str | None = None) -> list[TarFile]:
    """The files of a tar, in its order: those with some suffixes, through links within it and in tars within it.

    Of a tar on a server the list is kept on this machine: it needs to be fetched for it once.

    Args:
        path: an uncompressed tar, here or on a server.
        suffixes: in small letters; capitals in a file's name do not matter.
        label: the suffix of labels, which are listed with their texts.

    Raises:
        FetchError: its server does not give it.
        DataError: the tar is truncated or damaged, or claims more than it holds.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.tar")
        >>> with tarfile.open(path, "w") as tar:
        ...     member = tarfile.TarInfo("cat/0.png")
        ...     member.size = 3
        ...     tar.addfile(member, io.BytesIO(b"abc"))
        >>> [(file.name, file.open().read()) for file in files_of_tar(path, [".png"])]
        [('cat/0.png', b'abc')]
    """

    def find() -> list[list[Any]]:
        try:
            with path.open("rb") as file:
                return list(_files(path, file, suffixes, label))
        except DataError:
            raise
        except Exception as error:  # of a damaged header tarfile raises nearly any
            raise DataError(f"{path} is not a readable tar: {first_line(error)}") from error

    found = path.kept(f"files {suffixes} {label}", find) if isinstance(path, RemoteFile) else find()
    return [TarFile(path, *of) for of in found]


def _files(
    path: Path | RemoteFile,
    file: IO[bytes],
    suffixes: Sequence[str],
    label: str | None,
    folder: str = "",
    first: int = 0,
) -> Iterator[list[Any]]:
    """Name, first byte, size and text of each file."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = list(_members(path, tar, file))
        by_name = {member.name: member for member in members}
        for member in members:
            name = PurePosixPath(member.name)
            target = _target(member, by_name)
            if target is None or any(is_hidden(part) for part in name.parts):
                continue
            if target.issparse():
                raise DataError(
                    f"{path}: {name} is stored with holes, which are not read; make the tar without --sparse."
                )
            if name.suffix.lower() == ".tar" and not folder:
                inner = tar.extractfile(target)
                assert inner is not None
                yield from _files(path, inner, suffixes, label, f"{name.with_suffix('')}/", target.offset_data)
            elif (suffix := name.suffix.lower()) in suffixes or suffix == label:
                file.seek(target.offset_data)
                text = file.read(min(target.size, _LONGEST_LABEL)).decode(errors="replace") if suffix == label else ""
                yield [f"{folder}{name}", first + target.offset_data, target.size, text]


def _members(path: Path | RemoteFile, tar: tarfile.TarFile, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """What a tar holds; tarfile itself would go back to where a negative size leads, and end at a damaged header."""
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= member.offset:
            raise DataError(f"{path} is damaged: {member.name} has a negative size.")
        yield member
    file.seek(tar.offset)
    behind = file.read(_LONGEST_END)
    if behind.strip(b"\0"):
        raise DataError(f"{path} is damaged: neither a file nor zeros alone follow byte {tar.offset:,}.")
    if not behind:
        rank_zero_warn(f"{path} has no end mark: it may have been cut.")


def _target(member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The file that a member is, or is a link to; None for anything else."""
    if member.issym():
        member = by_name.get(
            posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname)), member
        )
    elif member.islnk():
        member = by_name.get(member.linkname, member)
    return member if member.isfile() else None
