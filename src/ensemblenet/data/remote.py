"""Files on web servers and in object stores: each is fetched whole, once, into a folder of this machine.

The readers of local files then read them there. So order, place in an epoch, shares of processes and counts of broken
records are those of a disk, to the bit. A server either gives a whole file, or the run ends with one line.

The folder is `ENSEMBLENET_CACHE`, or `ensemblenet` in the user's cache. It holds `ENSEMBLENET_CACHE_GB` gigabytes, or
what its disk has room for; files that were not read for longest make room for others. Both are settings of a machine,
not of a run, so they stand in the environment.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock
from rich.progress import track

from ensemblenet.errors import DataError, FetchError, first_line, without_secrets

__all__ = [
    "MissingError",
    "RemoteFile",
    "checked_place",
    "expanded",
    "find_below",
    "find_remote",
    "find_urls",
    "find_whole",
    "folder_of",
    "in_threads",
    "is_url",
    "joined",
    "patiently",
    "random_numbers_kept",
    "remote_file",
    "system_of",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries of a server that fails: each wait is twice the last
DEADLINE = 300.0  # seconds after its first failure that a server has to recover
SILENCE = 60.0  # seconds without a byte after which a connection counts as failed
_THREADS = 16  # files that are fetched at once
_MOST_FILES = 1_000_000  # that braces may stand for

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub", "http": "train", "https": "train"}
_RIGHTS = {
    "s3": "rights come from `aws configure`, AWS_PROFILE or AWS_ACCESS_KEY_ID; public buckets need FSSPEC_S3_ANON=true",
    "gs": "rights come from `gcloud auth application-default login`; public buckets need FSSPEC_GS_TOKEN=anon",
    "hf": "rights come from `hf auth login` or HF_TOKEN",
    "https": "rights come from ~/.netrc",
}
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_SECRET = re.compile(r"[?&;][^=&\s]*(?:sig|token|key|credential|secret|password|auth)[^=&\s]*=", re.IGNORECASE)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PASSING = (408, 425, 429)  # among the HTTP codes from 400 to 499, of which the others are final


# -- addresses


def is_url(place: object) -> bool:
    """Whether a place is not on a disk of this machine.

    Example:
        >>> is_url("s3://bucket/train-*.tar"), is_url(Path("data/train")), is_url("file:///data")
        (True, False, False)
    """
    return "://" in str(place) and not str(place).startswith("file://")


def checked_place(place: str | Path) -> Path | str:
    """Where data lies: a folder of this machine as a path, else the URL as it is.

    Raises:
        DataError: the URL holds a password, a key or a signature; it would stand in every folder of a run.

    Example:
        >>> checked_place("data/images"), checked_place("s3://bucket/images")  # doctest: +ELLIPSIS
        (...Path('data/images'), 's3://bucket/images')
    """
    if not is_url(place):
        return Path(str(place).removeprefix("file://"))
    url = str(place)
    if "@" in urlsplit(url).netloc or _SECRET.search(url):
        scheme = urlsplit(url).scheme
        raise DataError(
            f"{url} was given with a password, key or signature, which the run's folder would keep: "
            f"leave that out; {_RIGHTS.get(scheme, _RIGHTS['https'])}."
        )
    return url


def joined(folder: Path | str, name: str) -> Path | str:
    """A place in a folder; a name that is a URL or begins with a slash stands for itself.

    Example:
        >>> joined("s3://bucket/images/", "train-*.tar"), joined("s3://bucket", "https://host/a.tar")
        ('s3://bucket/images/train-*.tar', 'https://host/a.tar')
    """
    if is_url(name) or not is_url(folder) or name.startswith("/"):
        return checked_place(name) if is_url(name) else Path(folder, name)
    return f"{str(folder).rstrip('/')}/{name}"


def expanded(pattern: str) -> list[str]:
    """The patterns that braces stand for, as shells write them.

    Raises:
        DataError: they stand for more than a million.

    Example:
        >>> expanded("train-{08..10}.tar"), expanded("{a,b}/*.tar")
        (['train-08.tar', 'train-09.tar', 'train-10.tar'], ['a/*.tar', 'b/*.tar'])
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    if words is None and int(last) - int(first) >= _MOST_FILES:
        raise DataError(f"{pattern} stands for over {_MOST_FILES:,} files.")
    middle = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    rest = expanded(pattern[found.end() :])
    if len(middle) * len(rest) > _MOST_FILES:
        raise DataError(f"{pattern} stands for over {_MOST_FILES:,} files.")
    return [pattern[: found.start()] + part + end for part in middle for end in rest]


# -- listing


def find_urls(pattern: str, endings: Sequence[str] = ()) -> list[str]:
    """The files that a URL names, sorted.

    Args:
        pattern: a URL with `*`, `[]` and braces such as `{0000..1023}`, and except in HTTP `?`. HTTP servers must list
            their folders for all but braces.
        endings: if any, a URL that has none of them may be a folder, which stands for the files in it that have one.

    Raises:
        DataError: there are none, or the URL has no known scheme; a name without wildcards that is not there.
        FetchError: the server fails, or gives no rights.

    Example:
        >>> import fsspec
        >>> fsspec.filesystem("memory").pipe("/bucket/a1.tar", b"")
        >>> find_urls("memory://bucket/a*.tar")
        ['memory:///bucket/a1.tar']
    """
    checked_place(pattern)
    found = sorted(
        {url for part in expanded(pattern) for url in patiently(lambda url=part: _listed(url, endings), part)}
    )
    if not found:
        raise DataError(f"No files match {pattern}: the folder or bucket is empty, or has others.")
    return found


def _listed(url: str, endings: Sequence[str]) -> list[str]:
    system, path = system_of(url)
    wild = "*[" if url.startswith("http") else "*?["
    folder = endings and not path.endswith(tuple(endings)) and not any(sign in path for sign in wild)
    if folder and (url.startswith("http") or system.isdir(path)):
        path = f"{path.rstrip('/')}/*"
    elif not any(sign in path for sign in wild):
        return [url]
    system.invalidate_cache()
    names = [info["name"] for info in _matching(system, path, wild) if info["type"] != "directory"]
    return [system.unstrip_protocol(name) for name in names if not folder or name.endswith(tuple(endings))]


def _matching(system: Any, path: str, wild: str) -> list[dict[str, Any]]:
    """What matches, a folder at a time: fsspec's own `glob` takes a folder that cannot be read for an empty one."""
    folder, _, pattern = path.rpartition("/")
    folders = [folder]
    if any(sign in folder for sign in wild):
        folders = [info["name"].rstrip("/") for info in _matching(system, folder, wild) if info["type"] == "directory"]
    infos = [info for folder in folders for info in system.ls(folder, detail=True)]
    return [info for info in infos if fnmatchcase(PurePosixPath(info["name"]).name, pattern)]


def system_of(url: str) -> tuple[Any, str]:
    """The file system of fsspec that a URL names, and the path in it."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    for library in ("gcsfs", "huggingface_hub.file_download"):  # they print what they raise, or try again, as well
        logging.getLogger(library).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {}
    if url.startswith("http"):  # as it is, not compressed on the way; and no limit to the time that a large file takes
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options = {
            "headers": {"Accept-Encoding": "identity"},
            "client_kwargs": {"timeout": timeout, "trust_env": True},
            **conf.get("http", {}),
        }
    return url_to_fs(url, **options)


# -- files


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, which is read like one on a disk.

    Args:
        url: its address.
        size: in bytes, where the server says it.
        version: what the server says that changes with the content, or "".
    """

    url: str
    size: int | None
    version: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its address."""
        return PurePosixPath(self.url).name

    def open(self, mode: Literal["rb"] = "rb", buffering: int = -1) -> BinaryIO:
        """Open it for reading, as `Path.open` does; it is fetched first, if it is not here (any more).

        Raises:
            FetchError: the server does not give it.
        """
        while True:
            place = self.fetch()
            with suppress(FileNotFoundError):  # another process made room
                file = place.open(mode, buffering)
                os.utime(place)  # read just now
                return file

    def fetch(self) -> Path:
        """The file's copy on this machine, made if it is not there.

        Raises:
            FetchError: the server does not give it, or there is no room.
        """
        place = self._place("file")
        if not place.exists():
            with FileLock(f"{place}.lock", thread_local=False), random_numbers_kept():
                if not place.exists():
                    _make_room(self.size or 0)
                    part = place.with_suffix(".part")
                    self.copy_to(part)
                    part.replace(place)
        return place

    def kept(self, what: str, find: Callable[[], Result]) -> Result:
        """What is found in the file, as plain data: found once, and kept when its copy has made room for others.

        Raises:
            DataError: what `find` raises.
        """
        place = self._place(f"{hashlib.sha256(what.encode()).hexdigest()[:8]}.json")
        with FileLock(f"{place}.lock", thread_local=False):  # so processes of a machine need not all fetch it
            if not place.exists():
                part = place.with_suffix(".part")
                part.write_text(json.dumps(find()), encoding="utf-8")
                part.replace(place)
        return json.loads(place.read_text(encoding="utf-8"))

    def _place(self, suffix: str) -> Path:
        key = hashlib.sha256(f"{self.url} {self.size} {self.version}".encode()).hexdigest()[:32]
        return cache_folder() / f"{key}.{suffix}"

    def copy_to(self, place: Path) -> None:
        """Write it to a place of this machine, where a failure may leave a part of it.

        Raises:
            FetchError: the server does not give it, or there is no room.
        """

        def copy() -> None:
            system, path = system_of(self.url)
            system.get_file(path, str(place))
            got = place.stat().st_size
            if self.size is not None and got != self.size:
                raise EOFError(f"it ended after {got:,} of {self.size:,} bytes")

        patiently(copy, self.url)


def remote_file(url: str) -> RemoteFile:
    """A file as its server describes it.

    Raises:
        DataError: there is none.
        FetchError: the server fails.
    """

    def describe() -> RemoteFile:
        system, path = system_of(url)
        info = system.info(path)
        if info["type"] == "directory":
            raise FileNotFoundError("it is a folder")
        return _described(url, info)

    return patiently(describe, url)


def find_below(url: str) -> dict[str, RemoteFile]:
    """All files in a folder and its folders, by their names in it; none where a bucket has no such folder.

    Raises:
        FetchError: there is no such bucket, or the server fails.

    Example:
        >>> import fsspec
        >>> fsspec.filesystem("memory").pipe("/bucket/run/model/recipe.json", b"{}")
        >>> list(find_below("memory://bucket/run"))
        ['model/recipe.json']
    """

    def find() -> dict[str, RemoteFile]:
        system, path = system_of(url)
        system.invalidate_cache()
        found = system.find(path, detail=True)
        if not found:
            system.ls(path.partition("/")[0])  # of a bucket that is not there `find` says nothing
        return {
            name.removeprefix(path).strip("/"): _described(system.unstrip_protocol(name), info)
            for name, info in sorted(found.items())
        }

    return patiently(find, url)


def _described(url: str, info: Mapping[str, Any]) -> RemoteFile:
    marks = ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified", "LastModified", "created")
    return RemoteFile(url, info.get("size"), next((str(info[mark]) for mark in marks if info.get(mark)), ""))


def find_remote(pattern: str) -> list[RemoteFile]:
    """The files that a URL names, as their servers describe them.

    Raises:
        DataError: there are none.
        FetchError: the server fails.
    """
    return in_threads(remote_file, find_urls(pattern), "Looking for files")


def find_whole(pattern: str) -> list[RemoteFile]:
    """The files that a URL names, which may all be kept here at once, as reading at random wants it.

    Raises:
        DataError: there are none, or too little room for them.
        FetchError: the server fails.
    """
    files = find_remote(pattern)
    _kept.setdefault(cache_folder(), set()).update(files)
    needed, limit = sum(file.size or 0 for file in _kept[cache_folder()]), cache_limit()
    if needed > limit:
        raise DataError(
            f"The files of {pattern}, and those of other splits, take {needed / 1e9:,.3g} GB; {cache_folder()} may "
            f"hold {limit / 1e9:,.3g} GB: set ENSEMBLENET_CACHE_GB, or name a folder with room in ENSEMBLENET_CACHE. "
            "Shards of images and tars of videos can also be read one after another: --data.shuffle_buffer NUMBER."
        )
    return files


def folder_of(files: Mapping[str, RemoteFile]) -> Path:
    """A folder of this machine where files have names, for libraries that ask for one.

    Args:
        files: by their names, in which a slash stands for a folder.

    Raises:
        FetchError: the server does not give a file.
    """
    copies = dict(zip(files, in_threads(RemoteFile.fetch, list(files.values()), "Fetching"), strict=True))
    key = " ".join(f"{name} {copy.stem}" for name, copy in copies.items())
    folder = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    for name, copy in copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (folder / name).symlink_to(copy)
    return folder


_kept: dict[Path, set[RemoteFile]] = {}  # by the folder of copies


def in_threads(do: Callable[[Item], Result], items: Sequence[Item], what: str = "Reading") -> list[Result]:
    """What a function makes of each item, several at once, as for files that a network brings.

    Args:
        do: the function.
        items: what it is called with.
        what: names the progress bar; "" shows none.
    """
    with ThreadPoolExecutor(_THREADS) as pool, random_numbers_kept():
        try:
            return list(
                track(pool.map(do, items), what, total=len(items), transient=True, disable=not what or len(items) < 2)
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _stop.set()  # those that wait for their server
            pool.shutdown(wait=True)
            raise
        finally:
            _stop.clear()


# -- a server that fails


class MissingError(FetchError):
    """A file that its server says is not there."""


_stop = threading.Event()


def patiently(do: Callable[[], Result], url: str, done: str = "read") -> Result:
    """What a request gives; one that fails is repeated after growing waits, up to the deadline.

    Args:
        do: asks the server.
        url: what for.
        done: with it, as a message says it: "read" or "written".

    Raises:
        DataError: the server cannot, or did not within the deadline; in one line.
    """
    wait, first = FIRST_WAIT, None
    while True:
        try:
            return do()
        except Exception as failure:  # of libraries and networks, which raise nearly any
            error = failure
            if isinstance(failure, FileNotFoundError) and url.startswith("http"):  # so fsspec calls all that fails
                error = failure.__cause__ if isinstance(failure.__cause__, Exception) else failure
            final = _final(error, url, done)
            if final is not None:
                raise final from error
            said = first_line(error)
            if first is None:
                from lightning.pytorch.utilities import rank_zero_warn  # slow to import

                first = time.monotonic()
                rank_zero_warn(f"{url} fails ({without_secrets(said)}); it is tried again for up to {DEADLINE:.0f} s.")
            if time.monotonic() + wait > first + DEADLINE or _stop.wait(wait):
                raise FetchError(
                    f"{url} cannot be {done}: {said} (tried again for {time.monotonic() - first:.0f} s): see whether "
                    "the server and the network work, then start again; fit goes on with --resume."
                ) from error
            wait = min(2 * wait, LONGEST_WAIT)


def _final(error: Exception, url: str, done: str) -> DataError | None:
    """What to say of an error that no second try mends; None for all others."""
    scheme, said = urlsplit(url).scheme, first_line(error)
    sources = (error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")
    status = next((value for source, name in sources if isinstance(value := getattr(source, name, None), int)), 0)
    if isinstance(error, DataError):
        return error
    if isinstance(error, ImportError):
        install = f"pip install 'ensemblenet[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else said
        return FetchError(f"{url} needs a library: {install}.")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        rights = _RIGHTS.get({"gcs": "gs", "s3a": "s3"}.get(scheme, scheme), _RIGHTS["https"])
        return FetchError(f"{url} may not be {done} ({said}): {rights}.")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingError(f"{url} is not there ({said}): look for a slip in its name.")
    if isinstance(error, ValueError) and "rotocol not known" in said:
        return DataError(
            f"{url} cannot be opened: {scheme}:// is not known; give https://, s3://, gs://, hf:// or a path."
        )
    if getattr(error, "errno", None) in _NO_ROOM:
        return FetchError(
            f"{url} does not fit in {cache_folder()}: make room, or name another folder in ENSEMBLENET_CACHE."
        )
    if isinstance(error, ValueError | TypeError) or getattr(error, "errno", None) == errno.EINVAL:
        return FetchError(f"{url} cannot be {done}: {said}.")
    if 400 <= status < 500 and status not in _PASSING:
        return FetchError(f"{url} cannot be {done}: {said}.")
    return None


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restore Python's global generator: libraries draw their waits from it, and augmentation draws from it too."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


# -- the folder of copies


def cache_folder() -> Path:
    """The folder of fetched files, made if it does not exist.

    Raises:
        DataError: it cannot be made.
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ensemblenet")
    folder = Path(os.environ.get("ENSEMBLENET_CACHE") or usual)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error.strerror}): name another folder in ENSEMBLENET_CACHE."
        ) from error
    return folder


def cache_limit() -> float:
    """How many bytes the folder of fetched files may hold.

    Raises:
        DataError: `ENSEMBLENET_CACHE_GB` is not a positive number.
    """
    given = os.environ.get("ENSEMBLENET_CACHE_GB")
    if not given:
        return _used() + 0.9 * shutil.disk_usage(cache_folder()).free
    with suppress(ValueError):
        if (limit := 1e9 * float(given)) > 0:
            return limit
    raise DataError(f"ENSEMBLENET_CACHE_GB must be a positive number of gigabytes, got {given!r}.")


def _copies() -> list[tuple[float, int, Path]]:
    """Time of the last reading, size and place of each copy, in this order."""
    found = []
    for place in cache_folder().glob("*.file"):
        with suppress(FileNotFoundError):
            status = place.stat()
            found.append((status.st_mtime, status.st_size, place))
    return sorted(found)


def _used() -> int:
    return sum(size for _, size, _ in _copies())


def _make_room(needed: int) -> None:
    copies, limit = _copies(), cache_limit()
    used = sum(size for _, size, _ in copies)
    for _, size, place in copies:
        if used + needed <= limit:
            break
        place.unlink(missing_ok=True)
        used -= size
