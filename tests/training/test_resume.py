"""What may change in a run that goes on, and what may not; which run of several goes on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemblenet.storage.lock import read_writer, sole_writer
from ensemblenet.storage.runs import unfinished_runs
from ensemblenet.training import resume
from ensemblenet.training.resume import changed_setting, take_unfinished

STORED = """
seed_everything: 3
name: a
runs: here
resume: null
plan: given
ema: null
trainer: {max_epochs: 10, max_steps: -1, devices: 1, precision: null, callbacks: null, accumulate_grad_batches: 1}
model:
  base: {class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 3}}
  conversion: {num_heads: 2, budget: 1.0, seed: null}
  optimization: {optimizer: adamw, lr: 0.01}
  heads: auto
data: {class_path: mine.Data, init_args: {folder: FOLDER, batch_size: 8, num_workers: 2}}
"""


def changed(folder: Path, **settings: Any) -> str | None:
    """What the run's configuration is told by one with other settings, `__` for a dot."""
    stored = STORED.replace("FOLDER", str(folder))
    now = yaml.safe_load(stored)
    for name, value in settings.items():
        *groups, last = name.split("__")
        place = now
        for group in groups:
            place = place[group]
        place[last] = value
    return changed_setting(yaml.safe_load(stored), now)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": "b", "runs": "there", "resume": "auto"},
        {"trainer__max_epochs": 20},
        {"trainer__max_epochs": -1},
        {"trainer__devices": 2, "trainer__precision": "bf16-mixed", "trainer__callbacks": ["mine.Slow"]},
        {"model__heads": "looped", "data__init_args__num_workers": 0},
        {"checkpoint_steps": 5, "log_to": "wandb"},
        {"model__mixing": None},  # a setting that is newer than the run
    ],
    ids=str,
)
def test_what_may_change(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert changed(tmp_path, **settings) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed_everything": 4}, "seed_everything 3, not 4"),
        ({"trainer__max_epochs": 5}, "trainer.max_epochs 10, not 5"),
        ({"trainer__max_steps": 5}, "trainer.max_steps -1, not 5"),
        ({"trainer__accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches 1, not 2"),
        ({"ema": 0.9}, "ema null, not 0.9"),
        ({"model__base__init_args__out_features": 5}, "model.base.init_args.out_features 3, not 5"),
        ({"model__conversion": None}, "model.conversion.num_heads 2, not null"),
        ({"model__optimization__lr": 0.02}, "model.optimization.lr 0.01, not 0.02"),
        ({"model__mixing": {"mixup": 0.2}}, "model.mixing.mixup null, not 0.2"),
        ({"data__class_path": "mine.Other"}, 'data.class_path "mine.Data", not "mine.Other"'),
        ({"data__init_args__batch_size": 16}, "data.init_args.batch_size 8, not 16"),
    ],
    ids=str,
)
def test_what_may_not_change(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    assert changed(tmp_path, **settings) == said


def test_data_may_move_but_not_be_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert changed(tmp_path / "images", data__init_args__folder="images") is None
    assert changed(tmp_path / "gone", data__init_args__folder="images") is None
    other = changed(tmp_path / "images", data__init_args__folder="others")
    assert other == f'data.init_args.folder "{tmp_path / "images"}", not "others"'


def test_data_of_a_run_that_the_user_names_may_lie_elsewhere(tmp_path: Path) -> None:
    stored = {"seed_everything": 1, "data": {"init_args": {"folder": str(tmp_path), "batch_size": 8}}}
    copied = {"seed_everything": 1, "data": {"init_args": {"folder": "/scratch/images", "batch_size": 8}}}
    assert changed_setting(stored, copied) is not None
    assert changed_setting(stored, copied, named=True) is None
    other = {"seed_everything": 1, "data": {"init_args": {"folder": "/scratch/images", "batch_size": 9}}}
    assert changed_setting(stored, other, named=True) == "data.init_args.batch_size 8, not 9"


def test_a_whole_number_is_written_in_one_way() -> None:
    said = changed_setting({"ema": 1}, {"ema": 2.0})
    assert said == changed_setting({"ema": 1.0}, {"ema": 2}) == "ema 1, not 2"
    assert changed_setting({"ema": "1"}, {"ema": 0.5}) == 'ema "1", not 0.5'


def begun(runs: Path, *names: str) -> list[Path]:
    for name in names:
        (runs / name).mkdir()
        (runs / name / "config.yaml").write_text("seed_everything: 3")
    return [runs / name for name in names]


def taken(runs: Path, held: ExitStack, seed: int = 3) -> Path | None:
    def change(folder: Path, stored: Mapping[str, Any]) -> str | None:
        return changed_setting(stored, {"seed_everything": seed})

    return take_unfinished(runs, "a", change, held)


def test_the_newest_run_that_is_free_is_taken_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = begun(tmp_path, "a-20260101-000000", "a-20260102-000000")
    with ExitStack() as held:
        assert taken(tmp_path, held) == new
        assert capsys.readouterr().out == ""
        assert taken(tmp_path, held) == old
        assert capsys.readouterr().out == f"Passed over: {new}, being written by {read_writer(new)}.\n"
        assert taken(tmp_path, held) is None
    assert read_writer(new) is read_writer(old) is None


def test_one_line_says_which_runs_were_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *_, broken, third, second, first = begun(tmp_path, *(f"a-2026010{day}-000000" for day in range(1, 7)))
    broken.joinpath("config.yaml").write_text("{")
    with sole_writer(first), ExitStack() as held:  # a run of other settings is not even locked
        assert taken(tmp_path, held, seed=4) is None
    said = [f"{folder}, made with seed_everything 3, not 4" for folder in (first, second, third)]
    assert capsys.readouterr().out == f"Passed over: {'; '.join(said)}; and 3 more.\n"


@pytest.mark.parametrize("name", ["results.json", "config.yaml"])
def test_a_run_is_looked_at_again_once_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another process may have ended it, or gone on with it otherwise, since it was listed."""
    [folder] = begun(tmp_path, "a-20260101-000000")

    class Late(ExitStack):
        def enter_context(self, cm: Any) -> Any:
            (folder / name).write_text("seed_everything: 4")
            return super().enter_context(cm)

    monkeypatch.setattr(resume, "ExitStack", Late)
    assert unfinished_runs(tmp_path, "a") == [folder]
    with ExitStack() as held:
        assert taken(tmp_path, held) is None
    assert not list(folder.glob("writer.*"))
