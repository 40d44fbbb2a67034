"""What ends a command though the program is right, in one line: files, devices, memory, processes that died."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ensemblenet.errors import LOST_PROCESS, EnsembleNetError, first_line

__all__ = ["INTERRUPTED", "explain", "said_once"]

INTERRUPTED, _TERMINATED, _MENDABLE = 130, 143, 2  # exit codes: as a shell's for the signals, and as argparse's

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "a file of that size may not be written there",
    errno.EACCES: "give a place where you may read and write",
    errno.EPERM: "give a place where you may read and write",
    errno.EROFS: "give a place that can be written",
    errno.ENOTDIR: "a part of that path is a file, not a folder",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "give another name",
}
# Libraries raise these as RuntimeError, and older ones as AssertionError: their words are all that tells them apart.
_WORDS = (
    (
        r"DataLoader worker",
        "A process that loads data died: {} If memory ran out, use fewer num_workers or smaller batches.",
    ),
    (
        r"out of memory|can't allocate memory|not enough memory",
        "Memory ran out: {} Use smaller batches, fewer num_workers or a smaller network.",
    ),
    (
        r"NVIDIA driver|not compiled with \w+ enabled|No CUDA GPUs|invalid device ordinal|no kernel image|"
        r"device type at start of device string|Invalid device string|CUDA driver version|Cannot access accelerator",
        "The device cannot be used: {} Name one that this machine has, such as cpu.",
    ),
    (
        LOST_PROCESS,
        "Another process of the run has ended, or does not answer: {}",
    ),
)


def explain(error: BaseException) -> tuple[int, str | None]:
    """The exit code of a command that an error ended, and what the error says to whoever runs it.

    Returns:
        None as the second, for a bug of the program, which keeps its traceback, and for an exit that was asked for.

    Example:
        >>> explain(PermissionError(errno.EACCES, "Permission denied", "runs"))
        (2, 'runs: Permission denied; give a place where you may read and write.')
        >>> explain(KeyboardInterrupt())
        (130, 'interrupted.')
        >>> explain(KeyError("a bug"))
        (1, None)
    """
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):  # Lightning exits
        return INTERRUPTED, "interrupted."
    if type(error).__name__ == "SIGTERMException":  # Lightning's, between two steps
        return _TERMINATED, "terminated."
    said = _mendable(error)
    return (1, None) if said is None else (_MENDABLE, said)


def _mendable(error: BaseException) -> str | None:
    if isinstance(error, EnsembleNetError):
        return str(error)
    text = str(error).rstrip()
    said = text.splitlines()[-1] if "Original Traceback" in text else first_line(error)  # of a process that loads data
    if isinstance(error, OSError):
        if error.errno is None:
            return said
        advice = _ADVICE.get(error.errno)
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{where}{error.strerror}{f'; {advice}' if advice else ''}."
    if isinstance(error, MemoryError):
        return "Memory ran out. Use smaller batches, fewer num_workers or a smaller network."
    if isinstance(error, RuntimeError | AssertionError):
        for words, line in _WORDS:
            if re.search(words, text):
                return line.format(f"{said.split('. ')[0].rstrip('.')}.")  # what follows are guesses of the library
    return None


@contextmanager
def said_once() -> Iterator[None]:
    """No traceback of the thread that writes TensorBoard's logs, as on a full disk: the next call raises the same."""
    before = threading.excepthook

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        in_tensorboard = type(failed.thread).__module__.startswith("tensorboard.")
        if not (in_tensorboard and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = of_thread
    try:
        yield
    finally:
        threading.excepthook = before
