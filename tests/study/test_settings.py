"""What a study's settings say: phases, tuning, variants, and what version 0.1 called them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from studies import STUDY

from ensemblenet.errors import TrainingError
from ensemblenet.study.settings import Tuning, tuning_points
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
