"""Where the data has no test split: two halves of the validation data, and the words that say so."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_images import make_folders
from studies import trial

from ensemblenet.cli import main
from ensemblenet.data import ImageData
from ensemblenet.errors import DataError
from ensemblenet.study.halves import halve_validation, halves
from ensemblenet.study.trials import open_data

CLASSES = 3


def spec(folder: Path, **more: Any) -> dict[str, Any]:
    sizes = {"image_size": 16, "batch_size": 6, "num_workers": 0}
    return {"class_path": "ensemblenet.data.ImageData", "init_args": {"folder": str(folder), **sizes, **more}}


def names(data: Any, split: str) -> set[str]:
    examples = data.examples(split)
    return {examples.dataset.images.name(place) for place in examples.indices}


def test_halves_share_nothing_and_have_as_many_of_each_class(tmp_path: Path) -> None:
    data, sizes = open_data(json.dumps(spec(make_folders(tmp_path, val=5))))
    assert sizes == (8, 7)
    assert names(data, "val").isdisjoint(names(data, "test"))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        count = Counter(label for _, batch in loader for label in batch.tolist())
        assert set(count) == set(range(CLASSES))
        assert set(count.values()) <= {2, 3}


def test_the_half_of_an_example_depends_on_its_name_alone() -> None:
    examples = {f"cat/{number}.png": 0 for number in range(20)} | {f"dog/{number}.png": 1 for number in range(20)}
    first = halves(list(examples), list(examples.values()))
    turned = list(reversed(examples))
    second = halves(turned, [examples[name] for name in turned])
    for one, other in zip(first, second, strict=True):
        assert {list(examples)[place] for place in one} == {turned[place] for place in other}
    assert first[0] != list(range(20))  # not in their order


def test_a_test_split_is_left_whole(tmp_path: Path) -> None:
    folder = make_folders(tmp_path)
    (folder / "val").rename(folder / "held")
    make_folders(tmp_path / "more")
    (tmp_path / "more" / "val").rename(folder / "val")
    data, sizes = open_data(json.dumps(spec(folder, test="held")))
    assert sizes is None
    assert sum(len(y) for _, y in data.test_dataloader()) == 15


def test_data_that_cannot_be_parted_is_refused(tmp_path: Path) -> None:
    data = ImageData(make_folders(tmp_path, val=1), image_size=16, batch_size=6, num_workers=0)
    data.setup()
    data.examples("val").images.labels.resize(1, refcheck=False)
    with pytest.raises(DataError, match="give it a test split of its own"):
        halve_validation(data)


def test_trials_of_halves_are_other_trials() -> None:
    assert trial().key != replace(trial(), halved=True).key


def test_the_table_and_the_page_say_what_was_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    config = {
        "base": {"class_path": "ensemblenet.models.CifarResNet", "init_args": {"width": 8, "num_classes": 3}},
        "data": spec(make_folders(tmp_path, train=4)),
        "methods": ["base"],
        "epochs": 1,
        "seeds": 1,
        "tuning": {"trials": 1},
        "runs": str(tmp_path / "runs"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config))
    assert main(["compare", str(tmp_path / "study.yaml"), "--workers", "0"]) == 0
    assert "tested on half of the validation data" in " ".join(capsys.readouterr().out.split())
    [run] = (tmp_path / "runs").iterdir()
    assert json.loads((run / "results.json").read_text())["halves"] == [8, 7]
    page = (run / "index.html").read_text()
    assert "tested on half of the validation data</h1>" in page
    assert "tuned on one half of the validation data (8 examples) and tested on the other (7)" in page
    assert "on test examples that were read once" not in page
