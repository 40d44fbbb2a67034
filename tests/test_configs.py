"""The configurations that the project ships can be read."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from ensemblenet.training.settings import FitCLI

CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml") if path.parent.name != "compare"
)


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{path.parent.name}-{path.stem}" for path in CONFIGS])
def test_a_shipped_config_makes_module_data_and_trainer(config: Path, tmp_path: Path) -> None:
    model = yaml.safe_load(config.read_text())["model"]
    offline = ["--model.base.init_args.weights", "null"] if "weights" in model["base"]["init_args"] else []
    if str(model["base"]["init_args"].get("name")).startswith("transformers:"):  # the Hub has its configuration
        offline += ["--model.base.init_args.name", "test_resnet"]
    arguments = ["--config", str(config), "--runs", str(tmp_path), "--trainer.accelerator", "cpu", *offline]
    with ExitStack() as held:
        cli = FitCLI(arguments, held)
        assert (cli.model.conversion is None) == (model["conversion"] is None)
        assert cli.folder.parent == tmp_path
        assert (cli.folder / "config.yaml").is_file()


def test_base_and_conversion_share_base_data_and_effort() -> None:
    for dataset in {path.parent for path in CONFIGS if path.stem == "ensemblenet"}:
        base, ours = (yaml.safe_load((dataset / f"{name}.yaml").read_text()) for name in ("base", "ensemblenet"))
        assert base["model"]["base"] == ours["model"]["base"]
        assert base["data"] == ours["data"]
        assert base["trainer"] == ours["trainer"]
