"""Run folders in a bucket: killed on one machine and gone on with on another, and what a server does not give."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import s3fs
import torch
import yaml
from commands import own_environment
from studies import BASE, DATA
from tiny_runs import TINY, weights

from ensemblenet.cli.main import main
from ensemblenet.data.remote import RemoteFile
from ensemblenet.errors import BusyError, FetchError
from ensemblenet.reports.curves import read_curves
from ensemblenet.storage import bucket
from ensemblenet.storage.hub import local_folder
from ensemblenet.storage.runs import create_run_folder, unfinished_runs
from ensemblenet.study.journal import Journal

KILLED = """
import os
import signal
from lightning.pytorch import Callback

class Killed(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 8:  # in the second epoch of 5 batches
            os.kill(os.getpid(), signal.SIGKILL)
"""
SETTINGS = TINY | {
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
}
BUCKETS = (f"runs-{number}" for number in itertools.count())


@pytest.fixture
def runs(s3: dict[str, str]) -> Iterator[str]:
    """The URL of run folders in a new bucket."""
    name = next(BUCKETS)
    boto3.client("s3").create_bucket(Bucket=name)
    s3fs.S3FileSystem.clear_instance_cache()  # what a test changes of the class, and its rights
    yield f"s3://{name}/runs"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


def names(url: str) -> list[str]:
    """The files at a URL."""
    bucket_name, _, path = url.removeprefix("s3://").partition("/")
    found = boto3.client("s3").list_objects_v2(Bucket=bucket_name, Prefix=f"{path}/").get("Contents", [])
    return sorted(item["Key"].removeprefix(f"{path}/") for item in found)


def content(url: str) -> bytes:
    bucket_name, _, path = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket_name, Key=path)["Body"].read()


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("ENSEMBLENET_CACHE", str(tmp_path / name))


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_elsewhere_to_the_same_weights(
    runs: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", config, "--runs", str(tmp_path / "whole")]) == 0
    [whole] = (tmp_path / "whole").iterdir()

    (tmp_path / "mine.py").write_text(KILLED)
    command = [sys.executable, "-m", "ensemblenet", "fit", config, "--runs", runs]
    killed = subprocess.run(
        [*command, "--trainer.callbacks", "mine.Killed"],
        env=own_environment(tmp_path),
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [run] = {name.partition("/")[0] for name in names(runs)}
    url = f"{runs}/{run}"
    assert {"config.yaml", "checkpoints/last.ckpt", "uploaded.json"} <= set(names(url))
    assert not {"writer.lock", "writer.json", ".bucket.json"} & {name.rpartition("/")[2] for name in names(url)}

    another_machine(monkeypatch, tmp_path, "second")
    capsys.readouterr()
    assert main(["fit", config, "--runs", runs, "--resume", "auto"]) == 0
    said = capsys.readouterr()
    assert f"Run folder: {url}" in said.out
    assert "goes on in epoch 2, after 5 steps" in said.out
    assert str(tmp_path / "second") not in said.out + said.err

    (tmp_path / "last.ckpt").write_bytes(content(f"{url}/checkpoints/last.ckpt"))
    resumed = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, resumed[name]), name
    rows = [json.loads(text)["rows"] for text in (content(f"{url}/results.json"), (whole / "results.json").read_text())]
    assert rows[0] == rows[1]
    assert "runs: s3://" in content(f"{url}/config.yaml").decode()

    another_machine(monkeypatch, tmp_path, "third")  # what others read of it
    capsys.readouterr()
    assert main(["predict", url, "--output", str(tmp_path / "predictions.csv")]) == 0
    saved = ["--format", "safetensors", "--output", str(tmp_path / "exported")]
    assert main(["export", f"{url}/model", *saved]) == 0
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 50
    assert main(["info", url]) == 2
    assert f"{url} trained a conversion" in capsys.readouterr().err
    assert "train/loss" in read_curves(local_folder(url))  # which a report shows
    assert not list((tmp_path / "third").rglob("last.ckpt"))
    capsys.readouterr()
    assert main(["fit", "--resume", url]) == 2
    assert f"{url} is finished: it has results.json" in capsys.readouterr().err


def test_a_study_goes_on_elsewhere_with_what_it_finished(
    runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"base": BASE, "data": DATA, "methods": ["base"], "epochs": 1, "seeds": 2, "tuning": {"trials": 1}}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"name": "tiny", **settings}))
    add, kept = Journal.add, []

    def interrupted(journal: Journal, *of_trial: Any) -> None:
        add(journal, *of_trial)
        kept.append(of_trial)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    assert main(["compare", str(config), "--runs", runs, "--workers", "0"]) == 130
    [run] = {name.partition("/")[0] for name in names(runs)}
    assert f"Go on with `ensemblenet compare --resume {runs}/{run}`" in capsys.readouterr().err

    another_machine(monkeypatch, tmp_path, "second")
    assert main(["compare", "--resume", f"{runs}/{run}", "--workers", "0"]) == 0
    assert len(kept) == 3  # none was run twice
    assert len(content(f"{runs}/{run}/cells.jsonl").splitlines()) == 3
    assert {"results.json", "results.csv", "index.html"} <= set(names(f"{runs}/{run}"))
    assert f"{runs}/{run}/index.html" in capsys.readouterr().out


@pytest.mark.usefixtures("s3")
def test_a_run_at_google_is_made_longer_elsewhere(
    google: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = f"gs://{google}/runs"
    assert main(["fit", config, "--runs", runs, "--trainer.max_epochs", "1"]) == 0
    system = fsspec.filesystem("gs")
    [url] = [f"gs://{name}" for name in system.ls(f"{google}/runs", detail=False)]
    assert f"Run folder: {url}" in capsys.readouterr().out
    before = json.loads(system.cat_file(f"{url}/results.json"))["rows"]

    another_machine(monkeypatch, tmp_path, "second")
    assert main(["fit", "--resume", url, "--trainer.max_epochs", "2"]) == 0
    assert json.loads(system.cat_file(f"{url}/results.json"))["rows"] != before
    assert {"config.yaml", "checkpoints/last.ckpt", "uploaded.json"} <= {
        name.removeprefix(f"{google}/runs/").partition("/")[2] for name in system.find(url)
    }
    assert main(["predict", url, "--output", str(tmp_path / "predictions.csv")]) == 0
    assert main(["fit", config, "--runs", "gs://no-such-bucket/runs"]) == 2
    assert "gs://no-such-bucket/runs/tiny-" in capsys.readouterr().err


def test_what_changed_goes_up_in_the_order_of_writing_and_what_is_gone_goes(
    runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    put_file = s3fs.S3FileSystem.put_file

    def seen(system: Any, lpath: str, rpath: str) -> None:
        sent.append(rpath.partition("/tiny-")[2].partition("/")[2])
        put_file(system, lpath, rpath)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", seen)
    folder = create_run_folder(runs, "group/tiny")
    url = bucket.address(folder)
    assert url.startswith(f"{runs}/group/tiny-")
    for second, name in enumerate(("results.json", "checkpoints/last.ckpt", "config.yaml")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
        os.utime(folder / name, (second, second))
    (folder / "checkpoints" / "previous.ckpt").touch()
    bucket.push(folder / "checkpoints")
    assert sent == ["results.json", "checkpoints/last.ckpt", "config.yaml"]
    assert names(url) == sorted([*sent, "uploaded.json"])

    sent.clear()
    bucket.push(folder)
    assert sent == []
    (folder / "results.json").unlink()
    (folder / "config.yaml").write_text("longer")
    bucket.push(folder)
    assert sent == ["config.yaml"]
    assert names(url) == ["checkpoints/last.ckpt", "config.yaml", "uploaded.json"]
    assert content(f"{url}/config.yaml") == b"longer"


def test_a_run_that_another_machine_took_ends_and_what_it_has_is_kept(
    runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create_run_folder(runs, "tiny")
    url = bucket.address(first)
    (first / "config.yaml").write_text("a: 1")
    bucket.push(first)

    another_machine(monkeypatch, tmp_path, "second")
    [second] = unfinished_runs(runs, "tiny")
    bucket.pull(second)
    bucket.push(second, always=True)
    (second / "results.json").write_text("{}")
    bucket.push(second)

    (first / "config.yaml").write_text("a: 2, never sent")
    with pytest.raises(BusyError, match=f"^{url} was written by another machine"):
        bucket.push(first)
    assert content(f"{url}/config.yaml") == b"a: 1"
    another_machine(monkeypatch, tmp_path, "cache")
    assert bucket.run_folder(url) == first
    assert sorted(path.name for path in first.iterdir() if path.is_file() and path.name[0] != ".") == [
        "config.yaml",
        "results.json",
    ]
    [aside] = first.parent.glob("*.unsent-*")
    assert (aside / "config.yaml").read_text() == "a: 2, never sent"
    assert (first / "config.yaml").read_text() == "a: 1"
    assert unfinished_runs(runs, "other") == []


def test_a_fetch_that_was_cut_off_begins_again_and_the_same_upload_is_not_fetched_twice(
    runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = create_run_folder(runs, "tiny")
    url = bucket.address(first)
    (first / "config.yaml").write_text("a: 1")
    (first / "data.json").write_text("{}")
    bucket.push(first)
    another_machine(monkeypatch, tmp_path, "second")
    copy_to = RemoteFile.copy_to

    def cut(file: RemoteFile, place: Path) -> None:
        copy_to(file, place)
        if place.name == "data.json":
            raise FetchError("the connection is lost")

    monkeypatch.setattr(RemoteFile, "copy_to", cut)
    with pytest.raises(FetchError):
        bucket.run_folder(url)
    monkeypatch.setattr(RemoteFile, "copy_to", copy_to)
    second = bucket.run_folder(url)
    assert (second / "config.yaml").read_text() == "a: 1"
    assert not list(second.parent.glob("*.unsent-*"))

    monkeypatch.setattr(RemoteFile, "copy_to", cut)
    (second / "data.json").write_text("newer, and not sent yet")
    assert bucket.run_folder(url) == second
    assert (second / "data.json").read_text() == "newer, and not sent yet"


def test_runs_of_one_name_and_second_do_not_meet(runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SameSecond(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 1)

    monkeypatch.setattr("ensemblenet.storage.runs.datetime", SameSecond)
    create_run_folder(runs, "tiny")
    another_machine(monkeypatch, tmp_path, "second")
    assert create_run_folder(runs, "tiny").name == "tiny-20260101-000000-2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "s3://no-such-bucket/runs"], "s3://no-such-bucket/runs/tiny-.* is not there .*bucket"),
        (["--runs", "hf://owner/name"], r"Runs are kept in a folder, or at s3://BUCKET/PATH .*; got hf://owner/name"),
        (["--runs", "https://me:word@host/x"], "password, key or signature"),
        (["--resume", "{runs}/nothing-there"], r"\{runs\}/nothing-there holds nothing: there is no such run"),
        (["--resume", "s3://no-such-bucket/x"], "s3://no-such-bucket/x is not there .*bucket"),
        (["--runs", "{runs}", "--trainer.num_nodes", "2"], "runs in a bucket are for one machine"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_work(
    arguments: list[str],
    message: str,
    runs: str,
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", config, *(argument.format(runs=runs) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message.replace(r"\{runs\}", runs), said), said
    assert names(runs) == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_missing_rights_are_said_before_the_work(
    runs: str, config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert main(["fit", config, "--runs", runs]) == 2
    said = capsys.readouterr().err
    assert "may not be written" in said
    assert "`aws configure`" in said


@pytest.mark.filterwarnings("ignore:.*tried again")
def test_an_upload_that_fails_for_long_ends_the_run_in_one_line_and_it_goes_on_here(
    runs: str, config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_file = s3fs.S3FileSystem.put_file
    tries: list[str] = []

    def fails(system: Any, lpath: str, rpath: str, **more: Any) -> None:
        if rpath.endswith("last.ckpt"):
            tries.append(rpath)
            raise ConnectionError("the network is down")
        put_file(system, lpath, rpath, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", fails)
    assert main(["fit", config, "--runs", runs, "--trainer.max_epochs", "1"]) == 2
    said = capsys.readouterr().err
    [run] = {name.partition("/")[0] for name in names(runs)}
    assert f"{runs}/{run}/checkpoints/last.ckpt cannot be written: the network is down" in said
    assert f"Go on with `ensemblenet fit --resume {runs}/{run}`" in said
    assert len(tries) > 2
    assert "checkpoints/last.ckpt" not in names(f"{runs}/{run}")

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", put_file)
    assert main(["fit", "--resume", f"{runs}/{run}"]) == 0
    assert {"checkpoints/last.ckpt", "results.json", "model/model.safetensors"} <= set(names(f"{runs}/{run}"))


def test_a_run_that_never_began_leaves_nothing_in_the_bucket(
    runs: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", config, "--runs", runs, "--trainer.max_time", "00:00:00:00"]) == 2
    assert "ended before its first step" in capsys.readouterr().err
    assert names(runs) == []
