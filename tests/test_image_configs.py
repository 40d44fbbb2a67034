"""Each shipped configuration for images trains for a few steps, on a small network and made images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from made_images import CLASSES, make_folders

from ensemblenet.training.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = [
    path
    for name in ("imagenet", "imagenette")
    for path in sorted(Path(__file__).parents[1].glob(f"configs/{name}/*.yaml"))
]


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{path.parent.name}-{path.stem}" for path in CONFIGS])
def test_a_config_trains(config: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    make_folders(tmp_path / "images", train=4, val=2)
    settings = yaml.safe_load(config.read_text())
    base = settings["model"]["base"]["init_args"]
    smaller = {
        "model.base.init_args.name": "test_resnet",
        "model.base.init_args.num_classes": len(CLASSES),
        "model.heads": "looped",
        "data.init_args.image_size": 32,
        "data.init_args.batch_size": 4,
        "data.init_args.num_workers": 0,
        "trainer.max_epochs": 1,
        "trainer.devices": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "checkpoint_steps": 2,
    }
    if "weights" in base:  # as if they had been downloaded: of another number of classes
        save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "weights.safetensors")
        smaller["model.base.init_args.weights"] = tmp_path / "weights.safetensors"
    options = [part for name, value in smaller.items() for part in (f"--{name}", str(value))]
    folder = fit(["--config", str(config), "--data", str(tmp_path / "images"), "--runs", str(tmp_path), *options])

    [row] = json.loads((folder / "results.json").read_text())["rows"]
    conversion = settings["model"]["conversion"]
    assert row["num_heads"] == (1 if conversion is None else conversion["num_heads"])
    assert json.loads((folder / "model" / "data.json").read_text())["classes"] == list(CLASSES)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert ("averaging_state" in state) == ("ema" in settings)
