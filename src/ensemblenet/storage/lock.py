"""One writer a run folder: a lock that the operating system holds, and a note that says who holds it.

The lock ends with its process, however that ends. Some network file systems hide it from other hosts, or have none: for
them the writer touches its note every few seconds, and a folder is taken over only when that has stopped.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer

from ensemblenet.errors import BusyError, TrainingError
from ensemblenet.storage.atomic import remove_unfinished, write_json

__all__ = ["LOCK", "NOTE", "KeepFolder", "Writer", "read_writer", "sole_writer"]

LOCK = "writer.lock"
NOTE = "writer.json"
HEARTBEAT = 5.0  # seconds between two touches of the note
SILENCE = 60.0  # seconds without one after which a writer that no lock shows counts as dead
_LOOK = 1.0
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without locks answer
_KERNEL = Path("/proc/sys/kernel/random/boot_id")  # hosts may share a name


@dataclass(frozen=True)
class Writer:
    """A process that writes a run folder.

    Args:
        host: its name.
        process: its number there.
        since: when it began, in ISO 8601.
        kernel: tells hosts of one name apart, where the system can.
    """

    host: str
    process: int
    since: str
    kernel: str = ""

    @classmethod
    def here(cls) -> Writer:
        """This process, now."""
        kernel = _KERNEL.read_text().strip() if _KERNEL.exists() else ""
        return cls(socket.gethostname(), os.getpid(), f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}", kernel)

    @property
    def host_key(self) -> tuple[str, str]:
        """What processes share that the lock of this host tells of one another."""
        return self.host, self.kernel

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} since {self.since}"


def read_writer(folder: Path) -> Writer | None:
    """Who writes the folder, or wrote it when it was killed; None where nobody says so."""
    try:
        return Writer(**json.loads((folder / NOTE).read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return None


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Within it this process is the only one that writes the folder; what killed ones left unfinished there is removed.

    Args:
        folder: an existing folder. The lock and the note in it are removed at the end.

    Raises:
        BusyError: another process writes it; where only a heartbeat can tell, that takes up to a minute.
        TrainingError: it cannot be locked, as where one may not write.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with sole_writer(folder):
        ...     read_writer(folder).process == os.getpid()
        True
        >>> list(folder.iterdir())
        []
    """
    folder = folder.absolute()
    lock = _locked(folder)
    with lock or nullcontext():
        writer, before = Writer.here(), read_writer(folder)
        if before is not None and not (lock and before.host_key == writer.host_key) and _beats(folder):
            raise _busy(folder)
        remove_unfinished(folder)
        write_json(folder / NOTE, asdict(writer))
        ended = Event()
        heartbeat = Thread(target=_beat, args=(folder, writer, ended), daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            ended.set()
            heartbeat.join()
            if read_writer(folder) == writer:
                for name in (NOTE, LOCK):
                    (folder / name).unlink(missing_ok=True)


class KeepFolder(Callback):
    """Ends a run whose folder was taken over from another host, which saw no heartbeat while this one stood still.

    Args:
        folder: the run's, which this process writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.writer = read_writer(folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before a checkpoint is written."""
        self._look(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before results are written."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and (now := read_writer(self.folder)) != self.writer:
            raise BusyError(
                f"{self.folder} belongs to {now or 'nobody'} now, not to this run, which stood still for over "
                f"{SILENCE:g} s or lost its {NOTE}. It ends here and writes nothing more."
            )


def _locked(folder: Path) -> AbstractContextManager[Any] | None:
    """The system's lock, which a forked child does not keep; None on a file system that has none."""
    try:
        return FileLock(folder / LOCK, fallback_to_soft=False).acquire(blocking=False)
    except Timeout as error:
        raise _busy(folder) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise TrainingError(f"{folder} cannot be locked for writing: {error}.") from error


def _busy(folder: Path) -> BusyError:
    return BusyError(
        f"{folder} is being written by {read_writer(folder) or 'another process'}; wait until that ends, or leave "
        "--resume out for a new folder."
    )


def _beat(folder: Path, writer: Writer, ended: Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):  # a file system may fail for a moment
            if read_writer(folder) != writer:
                return
            os.utime(folder / NOTE)


def _beats(folder: Path) -> bool:
    """Whether the writer lives: its note is watched until it changes, or has not for long enough."""
    last = _touched(folder / NOTE)
    (folder / LOCK).touch()  # clocks of two hosts may differ: this one is the file system's
    left = min(SILENCE, SILENCE - (_touched(folder / LOCK) - last))
    if left > 0:
        print(f"{folder}: waiting up to {left:.0f} s to see whether {read_writer(folder)} is alive.", flush=True)
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(_LOOK)
        if _touched(folder / NOTE) != last:
            return True
    return False


def _touched(path: Path) -> float:
    """When a file was touched; 0 where there is none."""
    try:
        with path.open() as file:  # opening it asks a network file system anew
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0
