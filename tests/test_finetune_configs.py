"""Each configuration for fine-tuning runs against a small network that its library saved on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_images import CLASSES, make_folders
from safetensors.torch import save_file
from torch import nn

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.inputs import inputs_and_targets
from ensemblenet.models import create
from ensemblenet.training.fit import fit

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).parents[1] / "configs" / "finetune"
SMALLER: dict[str, Any] = {
    "model.heads": "looped",
    "data.init_args.image_size": 32,
    "data.init_args.batch_size": 4,
    "data.init_args.num_workers": 0,
    "trainer.max_epochs": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
}


def _saved(name: str, folder: Path) -> dict[str, Any]:
    """A small network on disk, and the settings that name it."""
    torch.manual_seed(0)
    base = "model.base.init_args."
    if name == "transformers":
        transformers = pytest.importorskip("transformers")
        sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = transformers.ViTConfig(image_size=32, patch_size=8, intermediate_size=64, num_labels=5, **sizes)
        transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
        return {f"{base}name": f"transformers:{folder / 'vit'}", "model.conversion.num_classes": len(CLASSES)}
    classes = len(CLASSES) if name == "own" else 1000
    state = create("test_resnet", classes).state_dict()
    if name == "timm":
        save_file(state, folder / "weights.safetensors")
        wanted = {"model.conversion.num_classes": len(CLASSES), f"{base}weights": folder / "weights.safetensors"}
        return {f"{base}name": "test_resnet", **wanted}
    torch.save({"model": {f"module.{key}": own for key, own in state.items()}, "epoch": 3}, folder / "weights.pth")
    return {f"{base}name": "test_resnet", f"{base}num_classes": classes, f"{base}weights": folder / "weights.pth"}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_config_tunes_a_saved_network(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folders(tmp_path / "images", train=4, val=2)
    settings = SMALLER | _saved(name, tmp_path) | {"model.conversion.budget": 1.2}
    options = [f"--{key}={value}" for key, value in settings.items()]
    folder = fit(
        [
            "--config",
            str(CONFIGS / f"{name}.yaml"),
            "--data",
            str(tmp_path / "images"),
            "--runs",
            str(tmp_path),
            *options,
        ]
    )
    [row] = json.loads((folder / "results.json").read_text())["rows"]
    assert row["num_heads"] == 2
    said = capsys.readouterr().out
    assert ("Before training, accuracy in % on" in said) == (name == "own")
    model = ensemblenet.load(folder / "model")
    assert model.recipe is not None
    assert model.recipe.num_classes == (None if name == "own" else len(CLASSES))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, len(CLASSES))
    assert main(["test", str(folder), "--data", str(tmp_path / "images")]) == 0


def _own_run(tmp_path: Path, **settings: Any) -> tuple[Path, nn.Module]:
    make_folders(tmp_path / "images", train=4, val=2)
    own = _saved("own", tmp_path)
    options = {"model.conversion.budget": 4.0, "model.conversion.split_at": "layer2", "model.conversion.width": 0.5}
    written = [f"--{key}={value}" for key, value in (SMALLER | own | options | settings).items()]
    folder = fit(
        ["--config", str(CONFIGS / "own.yaml"), "--data", str(tmp_path / "images"), "--runs", str(tmp_path), *written]
    )
    return folder, create("test_resnet", len(CLASSES), str(tmp_path / "weights.pth"))


def test_a_frozen_trunk_keeps_the_weights_and_statistics_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = _own_run(tmp_path, **{"model.conversion.freeze": "trunk", "ema": 0.5})
    model = ensemblenet.load(folder / "model")
    state = base.state_dict()
    trunk = model.trunk.state_dict()
    assert trunk
    assert all(torch.equal(own, state[name]) for name, own in trunk.items())
    assert model.trunk_is_frozen
    said = " ".join(capsys.readouterr().out.split())
    trained = sum(own.numel() for own in model.heads.parameters())
    assert f"The trunk is frozen: {trained:,} of" in said
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    held = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    assert held == len(list(model.heads.parameters()))


def test_scores_before_training_are_those_of_an_own_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = _own_run(tmp_path, **{"trainer.max_epochs": 1, "model.optimization.lr": 1e-30})
    said = " ".join(capsys.readouterr().out.split()).partition("Before training, ")[2].partition(".00.")[0]
    from ensemblenet.storage.restore import data_module, restore

    data: Any = data_module(restore(folder))
    data.prepare_data()
    data.setup("fit")
    batches = [inputs_and_targets(batch) for batch in data.val_dataloader()]
    model = ensemblenet.load(folder / "model")  # at that rate only statistics have moved, in the heads' favour or not
    with torch.no_grad():
        x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        hits = (base.eval()(x).argmax(1) == y).float().mean()
    assert f"accuracy in % on {len(y):,} validation examples: base {100 * hits:.2f}, head 0 " in said
    assert "mean of the heads" in said
    assert model.num_heads == 2


def test_what_a_run_calibrates_is_what_convert_does(tmp_path: Path) -> None:
    folder, base = _own_run(tmp_path, **{"trainer.max_epochs": 0})
    model = ensemblenet.load(folder / "model")
    assert model.recipe is not None
    from ensemblenet.storage.restore import data_module, restore

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["conversion"]["init"] == "inherit"
    data: Any = data_module(restore(folder))
    data.prepare_data()
    data.setup("fit")
    batches = [inputs_and_targets(batch) for batch in data.train_dataloader()]
    plain = ensemblenet.convert(
        base, batches[0][0], 2, 4.0, "layer2", init="inherit", width=0.5, importance="magnitude", seed=model.recipe.seed
    )
    renewed = [
        (own, other)
        for (name, own), other in zip(model.heads.named_buffers(), plain.heads.buffers(), strict=True)
        if "mean" in name
    ]
    assert renewed
    assert not any(torch.equal(own, other) for own, other in renewed)
    assert all(
        torch.equal(own, other)
        for own, other in zip(model.trunk.state_dict().values(), plain.trunk.state_dict().values(), strict=True)
    )
