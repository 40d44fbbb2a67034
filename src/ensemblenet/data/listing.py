"""Files in folders, every one once, whatever links and hidden folders there are; and shards, at URLs too."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from ensemblenet.data.classes import class_name
from ensemblenet.data.remote import RemoteFile, expanded, find_remote, find_whole, is_url, joined
from ensemblenet.errors import DataError

__all__ = ["class_folders", "find_in", "find_shards", "is_hidden"]


# that file systems and servers make beside the user's own
_OF_SYSTEMS = {"__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "#recycle"}


def is_hidden(name: str) -> bool:
    """Whether a name is one that systems and editors give to files of their own, such as `.ipynb_checkpoints`.

    Example:
        >>> is_hidden("._cat.jpg"), is_hidden("__MACOSX"), is_hidden("cat.jpg")
        (True, True, False)
    """
    return name.startswith(".") or name in _OF_SYSTEMS


def find_in(folder: Path, suffixes: Sequence[str], outside: Iterable[Path] = ()) -> list[Path]:
    """The files with some suffixes at any depth in a folder, sorted; hidden ones are left out.

    Links are followed, each real folder is entered once, and rather under its own name than by a link. A link to a
    file that is gone is named too: reading it then says so.

    Args:
        folder: to look in.
        suffixes: in small letters; capitals in a file's name do not matter.
        outside: folders that are not entered, by whatever link.

    Raises:
        DataError: a folder that cannot be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.PNG", "a.png", "notes.txt", ".hidden.png"):
        ...     (folder / name).touch()
        >>> (folder / "loop").symlink_to(folder)
        >>> [path.name for path in find_in(folder, [".png"])]
        ['a.png', 'b.PNG']
    """
    found: list[Path] = []
    entered = {_identity(path) for path in outside}
    places, links = deque([folder]), deque[Path]()
    while places or links:
        place = (places or links).popleft()
        if (identity := _identity(place)) in entered:
            continue
        entered.add(identity)
        for entry in _entries(place):
            if _is_folder(entry):
                (links if entry.is_symlink() else places).append(place / entry.name)
            elif PurePath(entry.name).suffix.lower() in suffixes and (entry.is_symlink() or entry.is_file()):
                found.append(place / entry.name)
    return sorted(found)


def class_folders(split: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each class: a class is a folder directly in the split, and its files lie in it at any depth.

    Args:
        split: the folder of the class folders.
        suffixes: of the files, in small letters.

    Returns:
        Files, maybe none, by the name of the class; under "" those that lie in no class's folder. Folders whose names
        differ only in how accents are encoded are one class. Folders that are links to the split, or to what it lies
        in, are no classes.

    Raises:
        DataError: a folder that cannot be read.
    """
    outside = [split, *split.resolve().parents]
    around = {_identity(path) for path in outside}
    found: dict[str, list[Path]] = {}
    for entry in _entries(split):
        place = split / entry.name
        if not _is_folder(entry):
            if place.suffix.lower() in suffixes:
                found.setdefault("", []).append(place)
        elif _identity(place) not in around:
            found.setdefault(class_name(entry.name), []).extend(find_in(place, suffixes, outside))
    return found


def find_shards(folder: Path | str, pattern: str, fit: bool = True) -> Sequence[Path | RemoteFile]:
    """The files that a pattern such as `train-{0000..1023}.tar` names, sorted.

    Args:
        folder: of the data, or its URL.
        pattern: in the folder, or a URL.
        fit: whether those at a URL must all fit on this machine at once.

    Raises:
        DataError: there are none, or too little room for them.
        FetchError: their server fails.
    """
    if is_url(place := joined(folder, pattern)):
        return find_whole(str(place)) if fit else find_remote(str(place))
    if found := sorted({path for part in expanded(pattern) for path in Path(folder).glob(part)}):
        return found
    raise DataError(f"No shards match {pattern} in {folder}; a pattern is such as train-*.tar.")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
