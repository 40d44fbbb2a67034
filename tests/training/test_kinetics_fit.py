"""`fit` on videos: a small conversion is trained, tested over views, and restored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_videos import make_video

from ensemblenet.errors import TrainingError
from ensemblenet.metrics import HeadMetrics
from ensemblenet.storage.restore import data_module, restore
from ensemblenet.training.fit import fit
from ensemblenet.training.module import head_outputs

CONFIG = Path(__file__).parents[2] / "configs" / "kinetics" / "ensemblenet.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 21 actions, which is as many as the configuration has."""
    folder = tmp_path_factory.mktemp("videos")
    for split in ("train", "val"):
        rows = [f"action {number},{split}{number},0,1,{split}\n" for number in range(21)]
        (folder / f"{split}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(rows))
        for number in range(21):
            make_video(folder / f"action_{number}" / f"{split}{number}.mp4", frames=12 + number % 3)
    return folder


def arguments(folder, runs, **options):
    small = {
        "--data": folder,
        "--runs": runs,
        "--model.base.init_args.width": 0.1,
        "--data.init_args.num_frames": 4,
        "--data.init_args.image_size": 16,
        "--data.init_args.batch_size": 8,
        "--data.init_args.num_clips": 2,
        "--trainer.max_epochs": 1,
        "--trainer.check_val_every_n_epoch": 1,
        "--trainer.enable_progress_bar": False,
        "--trainer.accelerator": "cpu",
    }
    return ["--config", str(CONFIG), *(str(word) for pair in (small | options).items() for word in pair)]


def test_a_run_scores_videos_by_the_average_of_their_views(folder: Path, tmp_path: Path) -> None:
    run = fit(arguments(folder, tmp_path))
    [row] = json.loads((run / "results.json").read_text())["rows"]
    restored = restore(run)
    assert restored.inputs.shape == (3, 4, 16, 16)
    assert restored.classes == sorted(f"action {number}" for number in range(21))
    assert restored.description["preprocessing"]["num_frames"] == 4

    data = data_module(restored)
    data.setup("test")
    metrics = HeadMetrics(num_classes=21, num_heads=2)
    with torch.inference_mode():
        for views, labels in data.test_dataloader():
            for video, label in zip(views, labels, strict=True):
                assert video.shape == (6, 3, 4, 16, 16)
                shares = torch.stack([head_outputs(restored.network, view[None]).softmax(-1) for view in video])
                metrics.update(shares.mean(0).log(), label[None])
    expected = metrics.compute()
    assert {"top5", "head_accuracy_0", "head_accuracy_1", "first_accuracy_1", "first_top5_2"} <= row["test"].keys()
    for name, value in row["test"].items():
        assert value == pytest.approx(expected[name].item(), abs=1e-5), name


def test_a_network_of_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="The data has 21 classes and the network 5 outputs"):
        fit(arguments(folder, tmp_path, **{"--model.base.init_args.num_classes": 5}))
