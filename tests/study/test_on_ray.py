"""Trials on a Ray cluster of two nodes: the figures of local processes, nodes and drivers that die, mistakes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from on_nodes import add_node
from ray.cluster_utils import Cluster as TwoNodes
from studies import STUDY, lines, trial

from ensemblenet import extras
from ensemblenet.cli import main
from ensemblenet.errors import MissingExtraError, TrainingError
from ensemblenet.study import compare as module
from ensemblenet.study.compare import run_study
from ensemblenet.study.on_ray import RayWorkers
from ensemblenet.study.settings import Tuning, Variant
from ensemblenet.study.trials import Outcome, Trial, run_trial
from ensemblenet.training import executor
from ensemblenet.training.executor import Cluster

SMALL = replace(
    STUDY,
    methods=["base", "codistillation", Variant("teacher", name="taught")],
    tuning=Tuning(trials=1, lr=(0.01, 0.02)),
    seeds=2,
)


@pytest.fixture
def unconnected(nodes: TwoNodes) -> TwoNodes:
    """As tests that use a connection may have come before."""
    ray.shutdown()
    return nodes


@pytest.fixture
def connected(nodes: TwoNodes) -> Cluster:
    """One connection for several tests, whose workers have imported PyTorch."""
    if not ray.is_initialized():
        ray.init(nodes.address, log_to_driver=False)
    return Cluster(nodes.address)


def figures(outcome: Outcome) -> Outcome:
    return {name: value for name, value in outcome.items() if not name.endswith("seconds")}


def waiting(folder: Path, seed: int = 0) -> Trial:
    base = {"class_path": "on_nodes.Waiting", "init_args": {"folder": str(folder)}}
    return trial("test", name="waiting", method="base", base=base, seed=seed)


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- mistakes


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(plain(asdict(SMALL)) | {"name": "small"}))
    return file


def plain(value: Any) -> Any:
    """Settings without what is not given, and lists for tuples."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if one is not None}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ray", "--address", "127.0.0.1:1"], "Nothing answers at --address 127.0.0.1:1: Connection ref"),
        (["--engine", "ray", "--address", "nowhere.invalid:6379"], "Nothing answers at --address nowhere.invalid:6379"),
        (["--engine", "ray", "--address", "head"], "--address must be auto, HOST:PORT or ray://HOST:PORT, got 'head'"),
        (["--engine", "ray", "--cpus_per_trial", "0"], "--cpus_per_trial must be at least 1, got 0"),
        (
            ["--engine", "ray", "--gpus_per_trial", "1.5", "--device", "cuda"],
            "must be a fraction, or a whole number of at",
        ),
        (["--engine", "ray", "--gpus_per_trial", "2", "--device", "cuda"], "--devices 1 needs --gpus_per_trial 1; got"),
        (["--engine", "ray", "--devices", "2"], "--devices 2 needs --cpus_per_trial 2; got 1."),
        (["--engine", "ray", "--device", "cuda"], "got --device cuda and --gpus_per_trial 0."),
        (["--engine", "ray", "--device", "cuda", "--gpus_per_trial", "0.5"], "No node of the cluster has 1 CPUs and 0"),
        (["--engine", "ray", "--cpus_per_trial", "9"], "there are nodes of 1 CPUs and 0 GPUs. Lower --cpus_per_trial"),
        (["--address", "auto"], "--address needs --engine ray."),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(
    unconnected: TwoNodes, config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if "--address" not in options:
        options = [*options, "--address", unconnected.address]
    runs = config.parent / "runs"
    assert main(["compare", str(config), "--runs", str(runs), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(runs.glob("*"))
    assert not ray.is_initialized()


def test_another_ray_and_none_at_all_are_one_line(unconnected: TwoNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.0.0")
        with pytest.raises(TrainingError, match=r"No Ray cluster can be used at .* mismatch.* Ray: 2\.0\.0"):
            RayWorkers(Cluster(unconnected.address)).__enter__()

    def no_version(name: str) -> str:
        raise extras.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "version", no_version)
    with pytest.raises(MissingExtraError, match=r"ray is not installed: pip install 'ensemblenet\[ray\]'"):
        RayWorkers(Cluster(unconnected.address)).__enter__()


# -- what is promised


def test_a_study_has_the_figures_of_local_processes_and_goes_on_after_its_driver_was_killed(
    connected: Cluster, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(module, "write_comparison", lambda *_: None)  # takes seconds
    local = tmp_path / "local"
    local.mkdir()
    rows = run_study(local, SMALL, workers=0)

    options = ["--engine", "ray", "--address", connected.address]
    command = [sys.executable, "-m", "ensemblenet", "compare", str(config), "--runs", str(tmp_path / "runs"), *options]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until(lambda: driver.poll() is not None or list(tmp_path.glob("runs/*/cells.jsonl")))
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    [folder] = tmp_path.glob("runs/*")
    before = (folder / "cells.jsonl").read_text()
    assert not (folder / "results.json").exists()

    assert main(["compare", "--resume", str(folder), *options]) == 0
    assert (folder / "cells.jsonl").read_text().startswith(before[: before.rfind("\n") + 1])

    def outcomes(run: Path) -> dict[str, Outcome]:
        cells = [(line["cell"], line["outcome"]) for line in lines(run)]
        return {f"{cell['name']}, {cell['phase']}, {cell['seed']}": figures(outcome) for cell, outcome in cells}

    assert len(rows) == 3
    assert len(lines(folder)) == 3 * (1 + 2)  # nothing twice
    assert outcomes(folder) == outcomes(local)
    assert len(list((folder / "teachers").iterdir())) == 1 + 2  # nodes that see the folder keep them
    assert "engine" not in (folder / "config.yaml").read_text()


def test_a_trial_that_fails_by_itself_is_an_outcome_and_not_repeated(
    connected: Cluster, tmp_path: Path, one_thread: None
) -> None:
    missing = str(tmp_path / "not-on-this-node")
    data = {"class_path": "ensemblenet.data.ImageData", "init_args": {"folder": missing, "image_size": 8}}
    taught = trial("test", method="teacher", teacher=trial("test", name="base", method="base"))
    with RayWorkers(connected, tmp_path / "no" / "such" / "folder") as workers:  # as where nodes share no disk
        found = list(workers.run([trial(data=data), taught]))
    ended = {one.key: outcome for one, outcome in found if outcome["status"] != "running"}
    failed = ended[trial(data=data).key]
    assert failed["status"] == "failed"
    assert missing in failed["reason"]
    assert figures(ended[taught.key]) == figures(run_trial(taught))
    assert [outcome["status"] for _, outcome in found].count("again") == 0


def test_nodes_with_other_versions_are_refused(connected: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "versions", lambda: {"ensemblenet": "9.9", "torch": "9.9"})
    message = r"A node of the cluster cannot run trials: it has ensemblenet \S+ and torch \S+, the driver \S+ 9"
    with pytest.raises(TrainingError, match=message), RayWorkers(connected) as workers:
        list(workers.run([trial()]))


def test_an_interrupt_ends_the_trials_of_the_study_and_nothing_else(connected: Cluster, tmp_path: Path) -> None:
    other = executor.board()

    def interrupted(workers: RayWorkers) -> None:
        for _ in workers.run([waiting(tmp_path)]):
            until(lambda: list(tmp_path.iterdir()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RayWorkers(connected) as workers:
        interrupted(workers)
    [file] = tmp_path.iterdir()
    until(lambda: not Path(f"/proc/{file.suffix[1:]}").exists())
    assert ray.get(other.read.remote()) == []
    assert ray.is_initialized()


def test_a_trial_whose_node_or_process_dies_is_run_again_and_says_so(
    nodes: TwoNodes, connected: Cluster, tmp_path: Path
) -> None:
    trials = [waiting(tmp_path, seed) for seed in (0, 1)]
    head = nodes.head_node.node_id
    found: list[tuple[int, Outcome]] = []
    with RayWorkers(connected) as workers:
        for one, outcome in workers.run(trials):
            found.append((one.seed, outcome))
            if len(found) == 2:
                until(lambda: len(list(tmp_path.iterdir())) == 2)
                on = {file.stem: int(file.suffix[1:]) for file in tmp_path.iterdir()}
                assert len(on) == 2  # one on each node
                os.kill(on[head], signal.SIGKILL)
                nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            if {seed for seed, outcome in found if outcome["status"] == "again"} == {0, 1}:
                (tmp_path / "go").touch()  # not before: a process outlives its node for a moment
    again = [(seed, outcome["reason"]) for seed, outcome in found if outcome["status"] == "again"]
    # which of the two Ray sees first of a dead node is chance
    assert all(re.fullmatch(r"its (node|process) died; repeat \d of at most 3", reason) for _, reason in again)
    done = {seed: figures(outcome) for seed, outcome in found if outcome["status"] == "done"}
    assert done == {one.seed: figures(run_trial(one)) for one in trials}
    add_node(nodes)  # for other tests


def test_repeats_are_counted_and_the_other_trials_are_finished(
    connected: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "REPEATS", 0)
    found = []

    def watched(workers: RayWorkers) -> None:
        for one, outcome in workers.run([waiting(tmp_path), trial()]):
            found.append((one.name, outcome["status"]))
            if found[-1] == ("waiting", "running"):
                until(lambda: list(tmp_path.iterdir()))
                [file] = tmp_path.iterdir()
                os.kill(int(file.suffix[1:]), signal.SIGKILL)

    with RayWorkers(connected) as workers, pytest.raises(TrainingError, match=r"waiting, seed 0 \(its process died\)"):
        watched(workers)
    assert [event for event in found if event[1] != "running"] == [("ours", "done")]
