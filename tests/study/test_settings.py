"""What a study's settings say: phases, tuning, variants, and what version 0.1 called them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from studies import STUDY

from ensemblenet.cost import Budget
from ensemblenet.errors import TrainingError
from ensemblenet.study.settings import Study, Tuning, Variant, study_of, tuning_points
from ensemblenet.training.optimization import Optimization


def test_trials_may_be_shorter_than_tests() -> None:
    study = replace(STUDY, epochs=9, tuning=Tuning(trials=1, epochs=2))
    settings = {"base": [Optimization()]}
    assert [trial.epochs for trial in study.trials("tune", settings)] == [2]
    assert [trial.epochs for trial in study.trials("test", settings)] == [9, 9, 9]
    with pytest.raises(TrainingError, match=r"tuning\.epochs must be at least 1, got 0"):
        Tuning(epochs=0)


def test_tuning_points_cover_the_ranges_and_more_trials_keep_the_first() -> None:
    tuning = Tuning(16, (1e-3, 1e-1), (0.01, 1.0))
    points = tuning_points(tuning)
    assert tuning_points(replace(tuning, trials=5)) == points[:5]
    for values, (low, high) in zip(zip(*points, strict=True), (tuning.lr, tuning.weight_decay), strict=True):
        assert low <= min(values)
        assert max(values) <= high
        quarters = [int(4 * math.log(value / low) / math.log(high / low)) for value in values]
        assert all(quarters.count(quarter) >= 3 for quarter in range(4))


def test_a_study_and_its_variants_may_limit_activations_and_time() -> None:
    joint = {"method": "joint", "budget": {"activations": 1.5}}
    study = study_of({**yaml_of(STUDY), "methods": ["base", joint], "budget": {"macs": None, "time": 1.2}})
    assert study.budget == Budget(macs=None, time=1.2)
    assert [one.setup.conversion.budget for one in study.candidates().values()][1] == Budget(activations=1.5)
    assert study_of(yaml.safe_load(yaml.safe_dump(yaml_of(study)))) == study


def test_a_variant_with_given_settings_is_not_tuned() -> None:
    study = replace(STUDY, methods=["base", Variant("joint", lr=0.02, weight_decay=0.1, seeds=2)])
    base, joint = study.candidates().values()
    assert (base.fixed, base.seeds) == (None, 3)
    assert (joint.fixed, joint.seeds) == (Optimization(lr=0.02, weight_decay=0.1), 2)
    settings = {name: [Optimization()] for name in study.candidates()}
    assert [(trial.method, trial.seed) for trial in study.trials("test", settings)][-2:] == [("joint", 0), ("joint", 1)]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"lr": 0.1}, "joint needs both lr and weight_decay, or neither to tune them"),
        ({"name": "mine", "weight_decay": 0.1}, "mine needs both lr and weight_decay"),
        ({"seeds": 0}, "seeds of joint must be at least 1, got 0"),
    ],
)
def test_variants_that_say_half(variant: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Variant("joint", **variant)  # pyright: ignore


@pytest.mark.parametrize("study", [STUDY, replace(STUDY, methods=None, tuning=Tuning(lr=(0.1, 0.2), epochs=3))])
def test_a_study_is_read_as_it_was_written(study: Study) -> None:
    assert study_of(yaml.safe_load(yaml.safe_dump(yaml_of(study)))) == study


def yaml_of(study: Study) -> dict[str, object]:
    plain = asdict(study)
    ranges = {name: list(plain["tuning"][name]) for name in ("lr", "weight_decay")}
    return plain | {"tuning": plain["tuning"] | ranges, "name": "of the run", "workers": 2}


def test_a_run_folder_of_version_01_holds_a_study() -> None:
    config = yaml.safe_load((Path(__file__).parent / "stored" / "config.yaml").read_text())
    study = study_of(config)
    assert list(study.candidates()) == ["base", "ours"]
    assert (study.seeds, study.tuning.lr) == (2, (0.01, 0.02))


def test_old_names_of_a_study() -> None:
    with pytest.warns(DeprecationWarning, match=r"Study\.entrants is now Study\.candidates"):
        entrants = STUDY.entrants()
    assert entrants["ONE"] == ("one", STUDY.candidates()["ONE"].setup)
    settings = {"base": [Optimization()]}
    with pytest.warns(DeprecationWarning, match=r"Study\.cells is now Study\.trials"):
        assert STUDY.cells("test", settings) == STUDY.trials("test", settings)
