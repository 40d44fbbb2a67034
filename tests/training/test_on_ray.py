"""One run in processes of a Ray cluster: the figures of processes of one machine, deaths, and mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train.torch
import torch
from commands import own_environment
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError
from tiny_runs import weights

from ensemblenet.cli import main
from ensemblenet.cli.failures import explain
from ensemblenet.cli.fit import written_out
from ensemblenet.errors import TrainingError
from ensemblenet.training import executor, on_ray
from ensemblenet.training.cluster import REPEATS, versions
from ensemblenet.training.fit import opened
from ensemblenet.training.search import Candidate

FIT = [
    *("mnist1d/ensemblenet", "--model.heads", "looped", "--model.base.init_args.width", "16"),
    *("--data.init_args.num_train", "120", "--data.init_args.num_val", "20", "--data.init_args.num_test", "41"),
    *("--data.init_args.batch_size", "20", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
    *("--model.conversion.num_heads", "2", "--trainer.enable_progress_bar", "false"),
]
RAY = ["--engine", "ray", "--address"]


def test_a_run_that_lost_a_process_has_the_figures_of_two_undisturbed_ones(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = [sys.executable, "-m", "ensemblenet", "fit", *FIT, "--trainer.devices", "2", "--runs", tmp_path / "local"]
    undisturbed = subprocess.Popen(local, env=own_environment(tmp_path), stdout=subprocess.DEVNULL)
    monkeypatch.chdir(tmp_path)
    dies = json.dumps([{"class_path": "on_nodes.Dies", "init_args": {"died": "died"}}])
    cluster = ["--engine", "ray", "--address", nodes.address, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    assert main(["fit", *FIT, *cluster, "--runs", "runs", "--trainer.callbacks", dies]) == 0
    assert undisturbed.wait() == 0
    said = capsys.readouterr().out
    assert "The run goes on from its last checkpoint; repeat 1 of at most 3." in said  # who died Ray may see too late
    assert "It goes on in epoch 2, after 3 steps." in said

    [one], [other] = (tmp_path / "local").iterdir(), (tmp_path / "runs").iterdir()
    assert "ensemblenet" in said.splitlines()[-1]
    assert said.endswith(f"Results and logs: {other.relative_to(tmp_path)}\n")
    states = [weights(run) for run in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    rows = [json.loads((run / "results.json").read_text())["rows"][0]["test"] for run in (one, other)]
    assert rows[0] == rows[1]
    files = [{path.name for path in run.iterdir()} for run in (one, other)]
    assert files[0] == files[1]
    assert "engine" not in (other / "config.yaml").read_text()


def test_a_search_that_lost_a_process_has_the_figures_of_a_local_one(
    nodes: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    search = ["fit", *FIT, "--plan", "search", "--budget", "0.9"]
    assert main([*search, "--runs", "local"]) == 0
    dies = json.dumps([{"class_path": "on_nodes.Dies", "init_args": {"died": "died"}}])
    capsys.readouterr()
    assert main([*search, *RAY, nodes.address, "--runs", "runs", "--trainer.callbacks", dies]) == 0
    said = capsys.readouterr().out
    assert re.search(r"2-heads: again: its \w+ died; repeat 1 of at most 3 \(\d running, \d waiting, 0 failed\)", said)

    [one], [other] = (tmp_path / "local").iterdir(), (tmp_path / "runs").iterdir()
    plans = [json.loads((run / "plan.json").read_text()) for run in (one, other)]
    for outcome in (*plans[0]["candidates"].values(), *plans[1]["candidates"].values()):
        outcome["run"] = outcome["run"].rpartition("-2")[0]  # the time behind it
    assert plans[0] == plans[1]
    assert len(list((other / "search").iterdir())) == len(plans[0]["candidates"])  # the one that died went on
    states = [weights(run) for run in (one, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_candidate_that_cannot_be_trained_ends_the_search_behind_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {
        "a": {"status": "failed", "reason": "the loss is not finite"},
        "b": {"status": "again", "reason": "its node died"},
    }

    class Workers:
        def __enter__(self) -> Workers:
            return self

        def __exit__(self, *_: object) -> None: ...

        def run(self, tasks: list[Candidate]) -> Iterator[tuple[Candidate, dict[str, Any]]]:
            yield tasks[1], {"status": "running"}
            yield from ((one, outcomes[one.name]) for one in tasks)
            yield tasks[1], {"status": "running"}
            yield tasks[1], {"status": "done", "run": "b"}

    done = []

    def searched(run: Any, on_nodes: Callable[..., Any]) -> Path:
        done.extend(one.name for one, _ in on_nodes([Candidate("a"), Candidate("b")]))
        return tmp_path

    monkeypatch.setattr(on_ray, "searched", searched)
    monkeypatch.setattr(on_ray, "_settings", lambda run: {})
    monkeypatch.setattr(on_ray, "RayTasks", {Candidate: lambda *_: Workers()})
    run: Any = SimpleNamespace(config={"trainer": {"accelerator": "auto"}}, given={})
    with pytest.raises(TrainingError, match=r"^a: failed: the loss is not finite$"):
        on_ray._searched(run, executor.Cluster())
    assert done == ["b"]
    assert capsys.readouterr().out.splitlines() == [
        "b: running (1 running, 1 waiting, 0 failed)",
        "a: failed: the loss is not finite (1 running, 0 waiting, 1 failed)",
        "b: again: its node died (0 running, 1 waiting, 1 failed)",
        "b: running (1 running, 0 waiting, 1 failed)",
        "b: done (0 running, 0 waiting, 1 failed)",
    ]


def test_no_room_is_one_line_and_leaves_nothing(
    nodes: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    options = ["--engine", "ray", "--address", nodes.address, "--trainer.num_nodes", "3", "--runs", str(runs)]
    assert main(["fit", *FIT, *options]) == 2
    said = capsys.readouterr().err
    assert "no room for 3 processes with a CPU each; there are nodes of 1 CPUs and 0 GPUs. Give less as" in said
    assert said.count("\n") == 1
    assert not list(runs.glob("*"))
    assert main(["fit", *FIT, *options, "--trainer.accelerator", "gpu"]) == 2
    assert "no room for 3 processes with a CPU and a GPU each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--engine", "ray", "--address", "127.0.0.1:1"],
            "Nothing answers at --address 127.0.0.1:1: Connection refused",
        ),
        (["--engine", "ray", "--address", "head"], "--address must be auto, HOST:PORT or ray://HOST:PORT, got 'head'"),
        (["--engine", "slurm"], "argument --engine: invalid choice: 'slurm'"),
        (["--address", "auto"], "--address needs --engine ray."),
    ],
)
def test_a_wrong_engine_is_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    ray.shutdown()  # a process that other tests connected stays so
    assert main(["fit", *FIT, *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.devices", "auto"], "a number as --trainer.devices: that of processes on a node; got auto."),
        (
            ["--trainer.strategy", "fsdp"],
            "--trainer.strategy ddp or fsdp2, or DDPStrategy with its arguments; got fsdp.",
        ),
        (["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"], "got lightning.pytorch.strat"),
        (["--runs", "s3://bucket/runs"], "in a folder that all nodes see, not in a bucket; got s3://bucket/runs."),
        (["--plan", "search", "--trainer.accelerator", "gpu"], "with cpu and none; got gpu and 0."),
    ],
)
def test_what_ray_train_cannot_do_is_refused_before_a_folder_is_made(
    tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = ["--config", FIT[0], *FIT[1:], "--runs", str(tmp_path / "runs"), *options]
    with ExitStack() as held, pytest.raises(TrainingError) as raised:
        opened(written_out(arguments), held, partial(on_ray._OnDriver, given={}))
    assert message in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_a_node_that_does_not_see_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"versions": versions(), "here": str(tmp_path), "folder": str(tmp_path / "elsewhere")}
    with pytest.raises(TrainingError, match=r"The node \S+ does not see \S+elsewhere, the run's folder: --runs must"):
        on_ray._train_on_node(settings)
    with pytest.raises(TrainingError, match=r"it has ensemblenet \S+ and torch \S+, the driver torch 9\.9\. Install"):
        on_ray._train_on_node(settings | {"versions": {"torch": "9.9"}})


GLOO = RuntimeError("[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:2261: Connection reset by peer.")


@pytest.mark.parametrize(
    ("failures", "expected", "attempts"),
    [
        ({0: GLOO, 1: ActorDiedError()}, r"number 1 died\. That happened 4 times\.", 1 + REPEATS),
        ({0: GLOO}, r"A process of the run does not answer: .* by peer.* That happened 4 times\.", 1 + REPEATS),
        ({0: TrainingError("the loss is not finite"), 1: GLOO}, "the loss is not finite", 1),
        ({0: GLOO, 1: RuntimeError("a bug")}, "a bug", 1),
    ],
)
def test_deaths_are_repeated_and_faults_are_not(
    monkeypatch: pytest.MonkeyPatch, failures: dict[int, Exception], expected: str, attempts: int
) -> None:
    made = []

    class Fails:
        def __init__(self, *_: Any, **options: Any) -> None:
            made.append(options["torch_config"].timeout_s)

        def fit(self) -> None:
            raise ray.train.WorkerGroupError("", failures)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Fails)
    with pytest.raises((TrainingError, RuntimeError), match=expected):
        on_ray._train({}, 2, False, None)
    assert made == [1800] * attempts


def test_signals_end_the_run_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def aborted() -> None:  # as Ray does it, after Ctrl-C
        raise SystemExit(0)

    def code(what: Callable[[], Any]) -> int:
        made = SimpleNamespace(fit=what)
        monkeypatch.setattr(ray.train.torch, "TorchTrainer", lambda *_, **__: made)
        with pytest.raises(BaseException) as raised:  # noqa: PT011
            on_ray._train({}, 2, False, None)
        return explain(raised.value)[0]

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert code(aborted) == 130
    assert code(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
