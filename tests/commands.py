"""Commands, scripts and functions that tests run in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

# Its children are forked from a process that has imported what takes seconds, and has done nothing with it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ensemblenet.training.fit", "ensemblenet.study.compare"])


@dataclass(frozen=True)
class Ended:
    """What came of a process."""

    code: int | None
    stdout: str
    stderr: str


def start_apart(printed: Path, run: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a function in a process of one thread; what it prints goes to the files `printed.out` and `printed.err`."""
    process = FORKS.Process(target=_apart, args=(dict(os.environ), Path.cwd(), printed, run, *arguments))
    process.start()
    return process


def run_apart(printed: Path, run: Callable[..., Any], *arguments: Any) -> Ended:
    """The same, until it ends."""
    process = start_apart(printed, run, *arguments)
    process.join()
    return Ended(process.exitcode, *(printed.with_suffix(kind).read_text() for kind in (".out", ".err")))


def script(path: Path, *arguments: str) -> None:
    """Run a file as Python does; for `run_apart`."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _apart(environment: dict[str, str], folder: Path, printed: Path, run: Callable[..., Any], *arguments: Any) -> None:
    os.environ.clear()  # that of the process which forks is as old as itself
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # what loads data inherits open files then
    out, err = (printed.with_suffix(kind).open("w") for kind in (".out", ".err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        try:
            code = run(*arguments)
        except Exception:
            traceback.print_exc()
            code = 1
    sys.exit(code)


def own_environment(folder: Path) -> dict[str, str]:
    """Of a process of one thread that finds the user's module in a folder, and the package where tests find it."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def killed_trial() -> dict[str, str]:
    """A trial in two processes, one of which is killed."""
    if os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"status": "failed", "reason": "RuntimeError: Connection reset by peer"}  # what the other one sees of it
