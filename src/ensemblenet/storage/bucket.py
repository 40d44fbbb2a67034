"""Run folders in a bucket: a folder of this machine stands for each, and finished files go up.

A run writes and locks its folder on this machine, as any other. After each checkpoint what has changed is uploaded in
the order in which it was written, so a kill leaves in the bucket what it leaves on a disk; an object is there whole or
not at all. A small file, `uploaded.json`, comes last and says which upload that was. By it another machine knows
whether it has the bucket's state, and a run finds at its next upload that another machine has gone on with it.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from ensemblenet.errors import BusyError, DataError, FetchError, TrainingError
from ensemblenet.storage.atomic import write_json

if TYPE_CHECKING:
    from ensemblenet.data.remote import RemoteFile

__all__ = ["address", "claim", "discard", "fetch_outlines", "is_address", "pull", "push", "run_folder", "runs_folder"]

Result = TypeVar("Result")

_SCHEMES = ("s3", "s3a", "gs", "gcs", "memory")  # where an object is written whole or not at all

_RECORD = ".bucket.json"  # in a folder that stands for one in a bucket, and never in the bucket
_MARKER = "uploaded.json"
_STAYS = ("writer.lock", "writer.json", "previous.ckpt")  # the last is for files that are damaged on a disk


@dataclass
class _Copy:
    """A folder of this machine that stands for one in a bucket.

    Args:
        folder: on this machine.
        url: of the other.
        upload: the last upload that this folder has; None before there is one.
        files: the files as they were sent or fetched: size, and time of writing in ns; None while they are fetched.
    """

    folder: Path
    url: str
    upload: str | None = None
    files: dict[str, list[int]] | None = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> _Copy | None:
        """The copy that a path lies in, or is; None for what belongs to this machine alone.

        A folder of runs within a run's folder, as a search has it, belongs to that run.
        """
        path = path.absolute()
        for folder in [*reversed(path.parents), path]:
            if (folder / _RECORD).is_file():
                return cls(folder, **json.loads((folder / _RECORD).read_text(encoding="utf-8")))
        return None

    def keep_record(self) -> None:
        write_json(self.folder / _RECORD, {key: value for key, value in asdict(self).items() if key != "folder"})

    def now(self) -> dict[str, list[int]]:
        """The files that belong in the bucket."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if not name.startswith(".") and "/." not in name and path.name not in _STAYS:
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if path.is_file():
                        found[name] = [status.st_size, status.st_mtime_ns]
        return found

    def uploaded(self) -> str | None:
        """The last upload, as the bucket says it."""

        def read(system: Any, path: str) -> str | None:
            with suppress(FileNotFoundError):
                return json.loads(system.cat_file(path))["upload"]
            return None

        return _ask(read, f"{self.url}/{_MARKER}", "read")

    def put(self, name: str) -> None:
        """Upload a file."""
        _ask(lambda system, path: system.put_file(str(self.folder / name), path), f"{self.url}/{name}", "written")

    def mark(self, mode: Literal["create", "overwrite"] = "overwrite") -> bool:
        """Name a new upload; False where there is one and there must be none."""
        upload = uuid.uuid4().hex

        def write(system: Any, path: str) -> bool:
            try:
                system.pipe_file(path, json.dumps({"upload": upload}).encode(), mode=mode)
            except FileExistsError:
                return False
            return True

        if not _ask(write, f"{self.url}/{_MARKER}", "written"):
            return False
        self.upload = upload
        self.keep_record()
        return True

    def remove(self, name: str) -> None:
        """Remove a file from the bucket; it may be gone."""

        def remove(system: Any, path: str) -> None:
            with suppress(FileNotFoundError):
                system.rm_file(path)

        _ask(remove, f"{self.url}/{name}", "written")


def _ask(do: Callable[[Any, str], Result], url: str, done: str) -> Result:
    """What a file system does with a path, with patience; a library that waits draws numbers, and training must not."""
    from ensemblenet.data.remote import patiently, random_numbers_kept, system_of

    with random_numbers_kept():
        return patiently(lambda: do(*system_of(url)), url, done)


# -- places


def is_address(place: object) -> bool:
    """Whether a place is a URL, of whatever kind, and no path.

    Example:
        >>> is_address("s3://bucket/runs"), is_address(Path("runs"))
        (True, False)
    """
    return "://" in str(place)


def run_folder(place: str | Path) -> Path:
    """The folder of this machine that is, or stands for, a run's; what the bucket has newer is fetched.

    Raises:
        TrainingError: a URL at which runs cannot be kept, or are none.
        FetchError: there is no such bucket, no rights, or the server fails.
    """
    if not is_address(place):
        return Path(place)
    folder = runs_folder(place)
    from filelock import FileLock

    from ensemblenet.storage.lock import sole_writer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # the processes of one run come together
        copy = _Copy.of(folder) or _Copy(folder, str(place).rstrip("/"))
        if not _is_current(copy):
            files = _files(copy)
            folder.mkdir(exist_ok=True)
            with suppress(BusyError), sole_writer(folder):  # whoever writes it has the newest
                _fetch(copy, files)
    return folder


def runs_folder(place: str | Path) -> Path:
    """Where on this machine run folders are made, for a folder or for a URL; nothing is fetched.

    Raises:
        TrainingError: a URL at which runs cannot be kept.
        DataError: a URL with a password, a key or a signature.

    Example:
        >>> runs_folder("runs").name, runs_folder("s3://bucket/runs").parts[-3:]
        ('runs', ('s3', 'bucket', 'runs'))
    """
    if not is_address(place):
        return Path(place)
    from ensemblenet.data.remote import cache_folder, checked_place

    parts = urlsplit(str(checked_place(place)))
    path = PurePosixPath(parts.path.strip("/"))
    if parts.scheme not in _SCHEMES or not parts.netloc or ".." in path.parts:
        raise TrainingError(f"Runs are kept in a folder, or at s3://BUCKET/PATH or gs://BUCKET/PATH; got {place}.")
    return cache_folder() / "runs" / parts.scheme / parts.netloc / path


def address(path: Path) -> str:
    """What to call a file or folder: by its URL, where it stands for one in a bucket.

    Example:
        >>> address(Path("runs/mine"))
        'runs/mine'
    """
    copy = _Copy.of(path)
    if copy is None:
        return str(path)
    inner = path.absolute().relative_to(copy.folder).as_posix()
    return copy.url if inner == "." else f"{copy.url}/{inner}"


# -- up


def claim(folder: Path, runs: Path, url: str) -> bool:
    """Begin a run's folder in a bucket, in which one can see early whether one may write there.

    Args:
        folder: of this machine, new and empty.
        runs: where it was made.
        url: what `runs` stands for.

    Returns:
        Whether the bucket had none of that name.

    Raises:
        FetchError: there is no such bucket, no right to write, or the server fails.
    """
    return _Copy(folder, f"{url.rstrip('/')}/{folder.relative_to(runs).as_posix()}").mark("create")


def push(path: Path, always: bool = False) -> None:
    """Upload what has changed in the run's folder that a path lies in; nothing for what is on a disk alone.

    Args:
        path: the folder, or what is in it.
        always: say so to other machines also if nothing has changed: the run goes on here.

    Raises:
        BusyError: another machine has gone on with the run.
        FetchError: the server fails for longer than the deadline.
    """
    copy = _Copy.of(path)
    if copy is None:
        return
    now, known = copy.now(), copy.files or {}
    changed = sorted((name for name in now if now[name] != known.get(name)), key=lambda name: now[name][1])
    gone = known.keys() - now.keys()
    if not (changed or gone or always):
        return
    if copy.uploaded() != copy.upload:
        raise BusyError(
            f"{copy.url} was written by another machine, which has gone on with this run, or was removed. The run ends "
            f"here and uploads nothing more; its state here stays in {copy.folder}."
        )
    try:
        for name in gone:  # results of a run that is made longer
            copy.remove(name)
        for name in changed:
            copy.put(name)
        copy.files = now
        copy.mark()
    except FetchError as error:
        raise FetchError(f"{error} What could not be uploaded stays in {copy.folder}.") from error


def discard(folder: Path) -> None:
    """Remove a run's folder of which nothing is worth keeping, here and in the bucket."""
    copy = _Copy.of(folder)
    if copy is not None and copy.folder == folder.absolute():
        with suppress(DataError):
            for name in [*(copy.files or {}), _MARKER]:
                copy.remove(name)
    shutil.rmtree(folder, ignore_errors=True)


# -- down


def pull(folder: Path) -> None:
    """Fetch what another machine has uploaded since; for the folder's one writer."""
    copy = _Copy.of(folder)
    if copy is not None and copy.folder == folder.absolute() and not _is_current(copy):
        _fetch(copy, _files(copy))


def fetch_outlines(runs: str | Path, name: str, has: str, lacks: str) -> None:
    """Have a folder here, with one file, for each run in a bucket that has that file and lacks another.

    Args:
        runs: a URL; nothing is done for a folder.
        name: begins the names of those that count.
        has: the file's name.
        lacks: the other's.
    """
    if not is_address(runs):
        return
    from ensemblenet.data.remote import find_urls, remote_file

    def found(file: str) -> set[str]:
        try:
            return {url.rpartition("/")[0] for url in find_urls(f"{str(runs).rstrip('/')}/{name}-*/{file}")}
        except FetchError as error:
            if type(error) is FetchError:  # not that there is nothing
                raise
        except DataError:
            pass
        return set()

    for url in found(has) - found(lacks):
        folder = runs_folder(url)
        if not folder.exists():
            folder.mkdir(parents=True)
            _Copy(folder, url, files=None).keep_record()
            remote_file(f"{url}/{has}").copy_to(folder / has)


def _is_current(copy: _Copy) -> bool:
    """Whether the folder has what the bucket has, and perhaps more."""
    has_record = (copy.folder / _RECORD).is_file()
    return has_record and copy.files is not None and copy.uploaded() == copy.upload


def _files(copy: _Copy) -> dict[str, RemoteFile]:
    from ensemblenet.data.remote import find_below

    files = find_below(copy.url)
    if not files:
        raise TrainingError(f"{copy.url} holds nothing: there is no such run.")
    return files


def _fetch(copy: _Copy, files: dict[str, RemoteFile]) -> None:
    """Have the bucket's files in place of what is here; what was never uploaded is kept aside."""
    from ensemblenet.data.remote import in_threads

    upload = copy.uploaded()
    files.pop(_MARKER, None)
    now, known = copy.now(), copy.files
    aside = None
    if known is not None and any(now[name] != known.get(name) for name in now):
        aside = copy.folder.with_name(f"{copy.folder.name}.unsent-{datetime.now():%Y%m%d-%H%M%S}")
        aside.mkdir()
        print(f"{copy.url} is newer than {copy.folder}; what was here and never uploaded is now in {aside}.")
    for path in [path for path in copy.folder.iterdir() if path.name not in (*_STAYS[:2], _RECORD)]:
        if aside is not None:
            path.rename(aside / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    copy.files = None
    copy.keep_record()
    for name in files:
        (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
    in_threads(lambda item: item[1].copy_to(copy.folder / item[0]), list(files.items()), "Fetching the run")
    copy.upload, copy.files = upload, copy.now()
    copy.keep_record()
