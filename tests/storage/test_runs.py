"""Run folders."""

from __future__ import annotations

from pathlib import Path

from ensemblenet.storage.runs import create_run_folder, unfinished_runs


def test_run_folders_are_always_new(tmp_path: Path) -> None:
    assert len({create_run_folder(tmp_path, "run") for _ in range(4)}) == 4


def test_the_unfinished_run_is_the_newest_of_its_name(tmp_path: Path) -> None:
    for name in ("a-20260101-000000", "a-20260102-000000", "a-20260103-000000", "a-b-20260104-000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "a-20260103-000000" / "results.json").touch()
    (tmp_path / "a-20260105-000000").mkdir()  # not yet begun
    found = unfinished_runs(tmp_path, "a")
    assert [folder.name for folder in found] == ["a-20260102-000000", "a-20260101-000000"]
    assert unfinished_runs(tmp_path, "c") == []


def test_runs_of_one_second_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made = ["a-20260101-000000", *(f"a-20260101-000000-{number}" for number in (2, 9, 10, 11))]
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert [folder.name for folder in unfinished_runs(tmp_path, "a")] == made[::-1]
