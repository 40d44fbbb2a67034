"""Training of taggers on made shards: both levels, exact resume within an epoch, predictions, errors in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from shards import AUDIO, CLASSES, RGB, videos, write
from tiny_runs import weights

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.cli.predict import predict
from ensemblenet.cli.test import test as run_test
from ensemblenet.errors import DataError, TrainingError
from ensemblenet.models import MLPTagger
from ensemblenet.training.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread")
BASES = {
    "video": {"class_path": "MLPTagger", "init_args": {"feature_size": RGB + AUDIO, "hidden": [16], "dropout": 0.0}},
    "frame": {
        "class_path": "DeepBagOfFrames",
        "init_args": {"feature_size": RGB + AUDIO, "cluster_size": 16, "hidden_size": 16},
    },
}
FEATURES = {"video": {"mean_rgb": RGB, "mean_audio": AUDIO}, "frame": {"rgb": RGB, "audio": AUDIO}}
FEATURES["segment"], BASES["segment"] = FEATURES["frame"], BASES["frame"]


class KilledError(Exception):
    pass


class Kill(Callback):
    """Ends the process at a step, as far as the run can tell."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def rated(made):
    """The same videos of ten frames, with segments that were rated."""
    made = [type(v)(v.id, v.labels, v.rgb[:1].repeat(10, 0), v.audio[:1].repeat(10, 0)) for v in made]
    return [type(v)(*list(vars(v).values())[:4], [(5, i % CLASSES, 1.0), (0, 3, 0.0)]) for i, v in enumerate(made)]


def make(folder, level="video"):
    """Shards, and a configuration that reads them."""
    for split, seed in (("train", 0), ("validate", 10)):
        for shard in range(2):
            made = videos(22, frames=None if level == "video" else 6, seed=seed + shard)
            write(folder / f"{split}{shard:04}.tfrecord", rated(made) if level == "segment" else made)
    base = json.loads(json.dumps(BASES[level]))
    base["class_path"] = f"ensemblenet.models.{base['class_path']}"
    base["init_args"]["num_classes"] = CLASSES
    data = {"folder": str(folder), "level": level, "features": FEATURES[level], "num_classes": CLASSES}
    data |= {"batch_size": 8, "num_workers": 0} | ({"num_frames": 4} if level == "frame" else {})
    settings = {
        "name": "tiny",
        "model": {
            "task": "multilabel",
            "base": base,
            "conversion": {"num_heads": 2, "budget": 1.0},
            "heads": "looped",  # which way is faster is nothing to rely on, and they round differently
        },
        "data": {"class_path": "ensemblenet.data.YouTube8M", "init_args": data},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return ["--config", str(folder / "config.yaml"), "--runs", str(folder / "runs")]


@pytest.mark.parametrize("level", ["video", "frame", "segment"])
def test_a_run_of_each_level(tmp_path: Path, level: str) -> None:
    folder = fit(make(tmp_path, level))
    [row] = json.loads((folder / "results.json").read_text())["rows"]
    assert row["num_heads"] == 2
    assert 0 < row["gap_mean"] <= 100
    assert row["gap_mean"] == pytest.approx(100 * row["test"]["gap"])
    assert row["head_gaps"] == [pytest.approx(100 * row["test"]["head_gap"])]
    header = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    for column in ("train/loss", "train/divergence", "val/gap", "val/map", "val/hit1", "val/perr", "val/head_gap_1"):
        assert column in header.split(",")
    assert ensemblenet.load(folder / "model").task == "multilabel"


class Shares(MLPTagger):
    """Ends as a classifier does whose classes exclude each other."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs).log_softmax(1)


def test_logarithms_of_shares_are_no_logits_of_tags(tmp_path: Path) -> None:
    base = ["--model.base.class_path", f"{__name__}.Shares", "--model.conversion", "null"]
    with pytest.raises(TrainingError, match="leave the log_softmax out of the base"):
        fit([*make(tmp_path), *base])
    assert not list((tmp_path / "runs").iterdir())


def test_a_base_of_other_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^The base does not take the data's inputs, \(1, 24\): mat1 and mat2"):
        fit([*make(tmp_path), "--model.base.init_args.feature_size", "20"])


def test_two_processes_count_every_video_once_where_their_shares_differ(tmp_path: Path) -> None:
    arguments = make(tmp_path)
    write(tmp_path / "validate0002.tfrecord", videos(5, frames=None, seed=20))  # 49: 24 and 25, 3 and 4 batches of 8
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.enable_progress_bar", "false"]
    command = [sys.executable, "-m", "ensemblenet", "fit", *arguments, *two]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    together = json.loads((run / "results.json").read_text())["rows"][0]["test"]
    alone = run_test([str(run)])[0]
    for name in ("gap", "map", "hit1"):
        assert together[name] == pytest.approx(alone[name], abs=1e-6), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_within_an_epoch_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    arguments = [*make(tmp_path), "--trainer.max_epochs", "2", "--data.init_args.num_workers", str(workers)]
    whole = fit(arguments)
    assert {path.name for path in whole.glob("checkpoints/*")} == {"last.ckpt", "previous.ckpt"}

    monkeypatch.setattr("ensemblenet.training.settings.Progress", lambda speed: Kill(7))  # 5 batches an epoch
    with pytest.raises(KilledError):
        fit([*arguments, "--name", "killed", "--checkpoint_steps", "1"])
    monkeypatch.undo()
    [folder] = tmp_path.glob("runs/killed*")
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 7
    assert state["YouTube8M"]["consumed"] == 2
    fit(["--resume", str(folder)])

    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 10
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (whole, folder)]
    assert rows[0] == rows[1]


def read(path):
    header, *lines = path.read_text().splitlines()
    assert header == "VideoId,LabelConfidencePairs"
    pairs = [line.split(",") for line in lines]
    return {video: [float(number) for number in rest.split()] for video, rest in pairs}


@pytest.mark.parametrize("level", ["video", "frame"])
@pytest.mark.parametrize("conversion", ["null", "{num_heads: 2}"])
def test_predictions_of_a_run_are_those_of_its_network(tmp_path: Path, level: str, conversion: str) -> None:
    folder = fit([*make(tmp_path, level), "--trainer.max_epochs", "1", "--model.conversion", conversion])
    path = predict(
        [str(folder), "--data", str(tmp_path / "validate*"), "--output", str(tmp_path / "out" / "x.csv"), "--top", "5"]
    )
    rows = read(path)
    made = [video for seed in (10, 11) for video in videos(22, frames=None if level == "video" else 6, seed=seed)]
    assert list(rows) == [video.id for video in made]
    for numbers in rows.values():
        classes, confidences = numbers[::2], numbers[1::2]
        assert len(set(classes)) == 5
        assert confidences == sorted(confidences, reverse=True)
        assert all(0 <= p <= 1 for p in confidences)
    if level == "video" and conversion != "null":
        model = ensemblenet.load(folder / "model")
        x = torch.cat([torch.from_numpy(made[3].rgb), torch.from_numpy(made[3].audio)])
        p = model(x[None])[0].sigmoid()
        best = p.argmax().item()
        assert rows[made[3].id][:2] == [best, pytest.approx(p[best].item(), rel=1e-4)]
    with pytest.raises(FileExistsError, match=r"x\.csv exists; --output needs a new file"):
        predict([str(folder), "--data", str(tmp_path), "--output", str(path)])


def test_a_saved_model_reads_the_features_of_its_recipe(tmp_path: Path) -> None:
    model = ensemblenet.convert(ensemblenet.models.MLPTagger(1152, 6, [16]), torch.randn(2, 1152), task="multilabel")
    saved = ensemblenet.save(model, tmp_path / "saved")
    rng = torch.Generator().manual_seed(0)
    made = [
        type(v)(v.id, [], torch.randn(1024, generator=rng).numpy(), torch.randn(128, generator=rng).numpy())
        for v in videos(3)
    ]
    shard = write(tmp_path / "test0000.tfrecord", made)
    rows = read(predict([str(saved), "--data", str(shard), "--output", str(tmp_path / "x.csv"), "--top", "2"]))
    assert list(rows) == [v.id for v in made]


def test_predictions_go_on_past_damaged_records_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit([*make(tmp_path), "--trainer.max_epochs", "1"])
    shard = tmp_path / "validate0000.tfrecord"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    arguments = [str(folder), "--data", str(shard), "--output", str(tmp_path / "x.csv")]
    with pytest.raises(DataError, match=r"validate0000\.tfrecord: the record at byte 0 is damaged"):
        predict(arguments)
    assert not list(tmp_path.glob("*x.csv*"))
    assert len(read(predict([*arguments, "--on-broken", "skip"]))) == 21
    assert "1 damaged records skipped" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_training_goes_on_past_damaged_records_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    arguments = [*make(tmp_path), "--trainer.max_epochs", "2", "--data.init_args.num_workers", workers]
    shard = tmp_path / "train0000.tfrecord"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"train0000\.tfrecord: the record at byte 0 is damaged"):
        fit(arguments)
    fit([*arguments, "--data.init_args.on_broken", "skip"])
    assert "Damaged records skipped in training, counted once an epoch: 2" in capsys.readouterr().out


def other_level(folder):
    write(folder / "train0001.tfrecord", videos(22, frames=3))


def not_tfrecord(folder):
    (folder / "train0001.tfrecord").write_bytes(b"video,label\n" * 9)


def many_classes(folder):
    write(folder / "train0001.tfrecord", videos(22, num_classes=500))


def other_size(folder):
    made = [type(v)(v.id, v.labels, v.rgb[:5], v.audio) for v in videos(22)]
    write(folder / "train0001.tfrecord", made)


def no_shards(folder):
    for path in folder.glob("*.tfrecord"):
        path.rename(folder / f"{path.stem}.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_level, "train0001.tfrecord: the record at byte"),
        (not_tfrecord, "train0001.tfrecord is not a TFRecord file"),
        (many_classes, "num_classes=20 allows 0 to 19"),
        (other_size, "has 5 values of mean_rgb, where 16 were expected"),
        (no_shards, "No files match"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_data_is_one_line_that_names_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[..., Any], message: str, workers: str
) -> None:
    arguments = make(tmp_path)
    spoil(tmp_path)
    assert main(["fit", *arguments, "--data.init_args.num_workers", workers]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ensemblenet fit:")]
    assert len(error) == 1
    assert message in error[0]
    assert str(tmp_path) in error[0]


def test_a_network_of_another_number_of_classes_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *make(tmp_path), "--model.base.init_args.num_classes", "7"]) == 2
    error = capfd.readouterr().err
    assert "The data has 20 classes and the network 7 outputs: give the base num_classes=20, or " in error
    assert "Traceback" not in error


def test_what_predict_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(ensemblenet.LoadError, match="nowhere"):
        predict([str(tmp_path / "nowhere"), "--data", str(tmp_path), "--output", str(tmp_path / "x.csv")])
    folder = fit([*make(tmp_path), "--trainer.max_epochs", "1", "--model.conversion", "null"])
    shutil.rmtree(folder / "model")
    with pytest.raises(
        ensemblenet.LoadError, match=r"no trained model yet; end its run with .ensemblenet fit --resume"
    ):
        predict([str(folder), "--data", str(tmp_path), "--output", str(tmp_path / "x.csv")])


def first_loss(folder):
    lines = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return next(float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column])


def test_segments_cost_what_their_rated_labels_cost(tmp_path: Path) -> None:
    folder = fit([*make(tmp_path, "segment"), "--trainer.max_epochs", "1"])
    rate = 3 / CLASSES  # where the biases begin
    # of each video one segment has a label that is there, and one a label that is not
    assert first_loss(folder) == pytest.approx(-(math.log(rate) + math.log(1 - rate)) / 2, rel=0.5)


def test_the_loss_of_tagging_is_summed_over_classes(tmp_path: Path) -> None:
    first = first_loss(fit([*make(tmp_path), "--trainer.max_epochs", "1"]))
    rate = 3 / CLASSES  # where the biases begin
    assert first == pytest.approx(CLASSES * -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)), rel=0.5)
