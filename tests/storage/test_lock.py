"""One writer a run folder: real processes on one folder, one of them killed; locks of other hosts; forked children."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
import yaml
from commands import FORKS, start_apart
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only
from made_images import make_folders
from tiny_runs import TINY, weights

from ensemblenet.cli import compare as study
from ensemblenet.cli.main import main
from ensemblenet.errors import BusyError, TrainingError
from ensemblenet.storage import lock
from ensemblenet.storage.lock import LOCK, NOTE, Writer, read_writer, sole_writer
from ensemblenet.training import resume
from ensemblenet.training.fit import fit
from ensemblenet.training.processes import agreed_folder

pytestmark = pytest.mark.usefixtures("one_thread")
OWN_CODE = """
import multiprocessing
import os
import time
from pathlib import Path

from lightning.pytorch import Callback


class Hold(Callback):
    def __init__(self, step: int, folder: Path):
        self.step, self.folder = step, folder

    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step == self.step and not (self.folder / "reached").exists():
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            (self.folder / "workers").write_text(" ".join(workers))
            (self.folder / "reached").touch()
            parent = os.getppid()
            while os.getppid() == parent:  # else the tests were killed
                time.sleep(0.1)
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BaseProcess]]:
    """Starts a function in a process of its own; what it prints goes to files in the test's folder."""
    (tmp_path / "holding.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    processes: list[BaseProcess] = []

    def start(run: Callable[..., Any], *arguments: Any) -> BaseProcess:
        processes.append(start_apart(tmp_path / f"printed{len(processes)}", run, *arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def wait_for(path: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.is_alive(), "it ended"
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def make(folder: Path, hold: int | None = None, **more: Any) -> list[str]:
    """The arguments of a run of 2 epochs of 5 steps, which stands still after a step if asked."""
    trainer = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    settings = TINY | {"trainer": trainer} | more
    if hold is not None:
        callback = {"class_path": "holding.Hold", "init_args": {"step": hold, "folder": str(folder)}}
        settings["trainer"] = {**settings["trainer"], "callbacks": [callback]}
    path = folder / ("holding.yaml" if hold is not None else "config.yaml")
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path), "--runs", str(folder / "runs")]


def make_images(folder: Path, hold: int | None = None) -> list[str]:
    """The same on 30 images, which two worker processes read for the run that stands still."""
    if not (folder / "images").exists():
        make_folders(folder / "images", train=10, val=2)
    options = {"folder": str(folder / "images"), "image_size": 16, "batch_size": 6}
    options["num_workers"] = 0 if hold is None else 2
    data = {"class_path": "ensemblenet.data.ImageData", "init_args": options}
    base = {"class_path": "ensemblenet.models.CifarResNet", "init_args": {"depth": 8, "width": 4, "num_classes": 3}}
    return make(folder, hold, data=data, model={"base": base, "conversion": None})


def unfinished(folder: Path) -> Path:
    """A run that was killed after its last checkpoint."""
    run = fit(make(folder, trainer={"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False})[1:])
    (run / "results.json").unlink()
    return run


# -- two processes


def test_a_run_that_lives_is_left_alone_and_one_that_was_killed_goes_on(
    tmp_path: Path, started: Callable[..., BaseProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(main, make_images(tmp_path, hold=7))
    wait_for(tmp_path / "reached", process)
    [folder] = (tmp_path / "runs").iterdir()
    writer = f"being written by process {process.pid} on host {socket.gethostname()} since 2"

    assert main(["fit", "--resume", str(folder), "--trust"]) == 2  # its callback is of this file
    [line] = capsys.readouterr().err.splitlines()
    assert f"{folder} is {writer}" in line
    assert "wait until that ends" in line

    assert main([*make_images(tmp_path), "--resume", "auto"]) == 0
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("Passed over")]
    assert f"Passed over: {folder}, {writer}" in line
    [whole] = set((tmp_path / "runs").iterdir()) - {folder}

    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(workers) >= 2
    kill(process)
    assert (folder / NOTE).exists()
    assert not (folder / "results.json").exists()
    assert all(is_alive(pid) for pid in workers)  # forked while the lock was held; they notice after seconds
    with sole_writer(folder):
        assert all(is_alive(pid) for pid in workers)

    assert fit([*make_images(tmp_path)[1:], "--resume", "auto"]) == folder
    assert "Passed over" not in capsys.readouterr().out
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    for run in (whole, folder):
        assert not {LOCK, NOTE} & {path.name for path in run.iterdir()}


def together(barrier: Any, arguments: list[str]) -> int:
    """`fit` that looks for runs at the same moment as others do."""
    listed = resume.unfinished_runs

    def listed_by_all(*given: Any) -> list[Path]:
        runs = listed(*given)
        barrier.wait()
        return runs

    resume.unfinished_runs = listed_by_all
    return main(arguments)


def test_of_two_that_start_together_one_goes_on_and_the_other_begins(
    tmp_path: Path, started: Callable[..., BaseProcess]
) -> None:
    old = unfinished(tmp_path)
    barrier = FORKS.Barrier(2)
    processes = [started(together, barrier, [*make(tmp_path), "--resume", "auto"]) for _ in range(2)]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    [new] = set((tmp_path / "runs").iterdir()) - {old}
    printed = [(tmp_path / f"printed{number}.out").read_text() for number in range(2)]
    for folder in (old, new):
        assert sum(f"Results and logs: {folder}\n" in text for text in printed) == 1
        assert (folder / "results.json").exists()
    assert sum(f"Passed over: {old}, being written by " in text for text in printed) == 1


def test_a_search_that_lives_is_left_alone_and_a_killed_one_goes_on(
    tmp_path: Path, started: Callable[..., BaseProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(main, [*make(tmp_path, hold=3), "--plan", "search"])  # in the base's run
    wait_for(tmp_path / "reached", process)
    [folder] = (tmp_path / "runs").iterdir()
    assert main(["fit", "--resume", str(folder), "--trust"]) == 2  # its callback is of this file
    [line] = capsys.readouterr().err.splitlines()
    assert f"{folder} is being written by process {process.pid}" in line
    kill(process)

    arguments = [*make(tmp_path), "--plan", "search", "--resume", "auto"]
    assert main([*arguments, "--model.conversion.budget", "0.9", "--trainer.fast_dev_run", "1"]) == 2
    assert f"Passed over: {folder}, made with model.conversion.budget 1, not 0.9." in capsys.readouterr().out
    assert fit(arguments[1:]) == folder
    assert len(list((folder / "search").glob("base-*"))) == 1  # the run that was killed went on
    assert not [path for name in (LOCK, NOTE) for path in folder.rglob(name)]
    assert f"Passed over: {folder}" not in capsys.readouterr().out


def held_study(folder: Path, arguments: list[str]) -> int:
    """`compare` that stands still before its first training."""

    def hold(*given: Any, **named: Any) -> Any:
        (folder / "reached").touch()
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.1)

    study.run_study = hold
    return main(arguments)


def test_a_study_that_lives_is_left_alone_and_a_killed_one_goes_on(
    tmp_path: Path, started: Callable[..., BaseProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"batch_size": 20, "num_train": 60, "num_val": 40, "num_test": 50},
        },
        "methods": ["base"],
        "epochs": 1,
        "seeds": 1,
        "tuning": {"trials": 1},
        "workers": 0,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    process = started(
        held_study, tmp_path, ["compare", "--config", str(tmp_path / "study.yaml"), "--runs", str(tmp_path / "runs")]
    )
    wait_for(tmp_path / "reached", process)
    [folder] = (tmp_path / "runs").iterdir()
    before = (folder / "config.yaml").read_text()
    again = ["compare", "--resume", str(folder), "--seeds", "2", "--workers", "0"]
    assert main(again) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{folder} is being written by process {process.pid}" in line
    assert (folder / "config.yaml").read_text() == before

    kill(process)
    for change in (["--base.init_args.width", "16"], ["--data.init_args.num_train", "80"], ["--task", "multilabel"]):
        assert main([*again, *change]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{folder} is a study with {change[0].removeprefix('--')} " in line
    assert (folder / "config.yaml").read_text() == before
    assert main(again) == 0
    assert json.loads((folder / "results.json").read_text())["rows"][0]["seeds"] == 2
    assert not {LOCK, NOTE} & {path.name for path in folder.iterdir()}


def rank(number: int, port: int) -> int:
    """One of two processes that torchrun started; the first one finds its folder taken."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    rank_zero_only.rank = number  # pyright: ignore

    def choose() -> Path:
        assert number == 0
        raise BusyError("somebody has it")

    try:
        agreed_folder(choose)
    except TrainingError as error:
        print(error)
        return 2
    return 0


def test_all_processes_of_a_run_end_if_the_first_one_finds_its_folder_taken(
    tmp_path: Path, started: Callable[..., BaseProcess]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(rank, number, port) for number in (0, 1)]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [2, 2]
    for number in (0, 1):
        assert (tmp_path / f"printed{number}.out").read_text() == "somebody has it\n"


# -- another configuration


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed_everything", "9"], "seed_everything 3, not 9"),
        (["--model.conversion", "null"], "model.conversion.num_heads 2, not null"),
        (["--data.init_args.batch_size", "10"], "data.init_args.batch_size 20, not 10"),
        (["--plan", "search"], 'plan "given", not "search"'),
    ],
)
def test_a_run_of_other_settings_is_refused_and_passed_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("ensemblenet.training.fit.finished", lambda cli: cli.folder)  # which folder is all we ask
    monkeypatch.setattr("ensemblenet.training.fit.searched", lambda cli, run: pytest.fail("it began"))
    run = fit(make(tmp_path)[1:])
    before = (run / "config.yaml").read_text()
    assert main(["fit", "--resume", str(run), *change]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"ensemblenet fit: {run} was made with {said}. Leave that out, or --resume for a new run."
    assert (run / "config.yaml").read_text() == before
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "environment.json"]
    if change[0] != "--plan":
        assert fit([*make(tmp_path)[1:], *change, "--resume", "auto"]) != run
        assert f"Passed over: {run}, made with {said}.\n" in capsys.readouterr().out
        assert fit([*make(tmp_path)[1:], "--resume", "auto", "--trainer.max_epochs", "3"]) == run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.optimization.lr", "0.5"], "model.optimization.lr 0.01, not 0.5"),
        (["--trainer.gradient_clip_val", "0.5"], "trainer.gradient_clip_val null, not 0.5"),
    ],
)
def test_a_run_whose_course_changes_goes_on_where_it_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("ensemblenet.training.fit.finished", lambda cli: cli.folder)
    run = fit(make(tmp_path)[1:])
    assert fit([*make(tmp_path)[1:], *change, "--resume", "auto"]) != run
    assert f"Passed over: {run}, made with {said}.\n" in capsys.readouterr().out
    assert fit(["--resume", str(run), *change]) == run


# -- the lock itself


def forge(folder: Path, writer: Writer, age: float) -> Path:
    """A note that a writer left so many seconds ago."""
    (folder / NOTE).write_text(json.dumps(asdict(writer)))
    (folder / LOCK).touch()
    os.utime(folder / NOTE, (time.time() - age,) * 2)
    return folder / NOTE


ELSEWHERE = Writer("elsewhere", 1, "2026-01-01T00:00:00+0000", "another kernel")


def test_a_lock_that_a_dead_process_of_this_host_left_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    forge(tmp_path, replace(Writer.here(), process=1), age=0)  # a number that another process has by now
    with sole_writer(tmp_path):
        assert read_writer(tmp_path) == replace(Writer.here(), since=read_writer(tmp_path).since)  # pyright: ignore
    assert list(tmp_path.iterdir()) == []


def test_another_host_is_dead_if_it_has_been_silent_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    forge(tmp_path, ELSEWHERE, age=61)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clocks of two hosts may differ
    with sole_writer(tmp_path):
        assert read_writer(tmp_path) != ELSEWHERE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("age", [0.0, -3600.0], ids=["same clock", "clock an hour ahead"])
@pytest.mark.parametrize("kernel", ["another kernel", ""])
def test_another_host_that_was_heard_just_now_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], age: float, kernel: str
) -> None:
    monkeypatch.setattr(lock, "_LOOK", 0.02)
    writer = replace(ELSEWHERE, kernel=kernel, host="elsewhere" if kernel == "" else socket.gethostname())
    note = forge(tmp_path, writer, age)
    ended = Event()
    heartbeat = Thread(target=lambda: [os.utime(note) for _ in iter(lambda: ended.wait(0.05), True)])
    heartbeat.start()
    with pytest.raises(BusyError, match=r"is being written by process 1 on host .* since 2026"), sole_writer(tmp_path):
        pass
    ended.set()
    heartbeat.join()
    assert read_writer(tmp_path) == writer  # its lock and note stay as they are
    assert (tmp_path / LOCK).exists()

    monkeypatch.setattr(lock, "SILENCE", 0.3)
    os.utime(note, (time.time() - age,) * 2)
    begun = time.monotonic()
    with sole_writer(tmp_path):
        assert time.monotonic() - begun > 0.25
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path}: waiting up to 0 s to see whether process 1 on host" in capsys.readouterr().out


def test_a_writer_is_heard_and_excludes_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with sole_writer(tmp_path):
        os.utime(tmp_path / NOTE, (0, 0))
        deadline = time.monotonic() + 600
        while (tmp_path / NOTE).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(BusyError, match=f"by process {os.getpid()} on"), sole_writer(tmp_path):
            pass
        assert read_writer(tmp_path) is not None
    with pytest.raises(KeyboardInterrupt), sole_writer(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_without_locks_the_heartbeat_decides_on_this_host_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*given: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    monkeypatch.setattr(lock, "_LOOK", 0.02)
    with sole_writer(tmp_path), pytest.raises(BusyError, match="is being written by"), sole_writer(tmp_path):
        pass
    monkeypatch.setattr(lock, "SILENCE", 0.1)
    forge(tmp_path, Writer.here(), age=0)
    with sole_writer(tmp_path):
        assert read_writer(tmp_path) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(TrainingError, match=r"cannot be locked for writing: .*Is a directory"), sole_writer(tmp_path):
        pass


class TakenOver(Callback):
    """Another host takes the folder over while this process stands still."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            [folder] = Path(trainer.loggers[0].save_dir).parent.iterdir()
            (folder / NOTE).write_text(json.dumps(asdict(ELSEWHERE)))


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblenet.training.settings.LearningRateMonitor", lambda _: TakenOver())
    with pytest.raises(TrainingError, match=r"belongs to process 1 on host elsewhere since .* now, not to this run"):
        fit(make(tmp_path)[1:])
    [folder] = (tmp_path / "runs").iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not (folder / "results.json").exists()
    assert read_writer(folder) == ELSEWHERE
