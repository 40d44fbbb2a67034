"""The one table of scores: what each is called, how it is shown, and which way is better.

Tables, pages, cards and commands read it, and show those scores that they were given: of classification errors, of
tagging GAP@20, whichever of the two was measured. A score of your own is a row here and a line where it is computed, in
`metrics/heads.py` or `metrics/tagging.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ensemblenet.functional import Task

__all__ = [
    "IN_PERCENT",
    "SCORES",
    "TASKS",
    "Score",
    "TaskScores",
    "Values",
    "current_name",
    "in_row",
    "meanings",
    "row_as_shown",
    "row_score",
]


@dataclass(frozen=True)
class Score:
    """How a score is shown.

    Args:
        heading: in tables.
        meaning: what it is, for captions, after "is".
        scale: shown is the value times this, and the offset.
        digits: behind the point.
        unit: of what is shown.
        lower_is_better: or not; None where neither is better.
        of_several: a single head has none.
        offset: added to what is shown.

    Example:
        >>> SCORES["accuracy"].text(0.98604), SCORES["accuracy"].label
        ('1.40', 'error, %')
    """

    heading: str
    meaning: str
    scale: float = 1.0
    digits: int = 2
    unit: str = ""
    lower_is_better: bool | None = False
    of_several: bool = False
    offset: float = 0.0

    @property
    def label(self) -> str:
        """The heading with the unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading

    def shown(self, value: float) -> float:
        """The number that is shown for a value."""
        return self.offset + self.scale * value

    def text(self, value: float) -> str:
        """A value as it is shown."""
        return f"{self.shown(value):.{self.digits}f}"


def _share(heading: str, meaning: str, of_several: bool = False, lower_is_better: bool | None = False) -> Score:
    return Score(heading, meaning, 100, 2, "%", lower_is_better, of_several)


def _wrong(heading: str, meaning: str) -> Score:
    """A share of right ones, shown as that of wrong ones."""
    return Score(heading, meaning, -100, 2, "%", True, offset=100)


SCORES = {
    # of a metric's values
    "accuracy": _wrong("error", "the share of examples whose most likely class is wrong"),
    "top5": _wrong("top-5 error", "the share of examples whose class is not among the five most likely"),
    "gap": _share("GAP@20", "the average precision of one list with the 20 best predictions of every video"),
    "map": _share("mAP", "the mean over classes of the average precision"),
    "hit1": _share("Hit@1", "the share of videos whose best prediction is right"),
    "perr": _share("PERR", "the precision among as many predictions as a video has labels"),
    "nll": Score("NLL", "the negative log-likelihood, for labels summed over them", 1, 4, "nats", True),
    "ece": Score("ECE", "the expected calibration error in 15 bins", 1, 4, lower_is_better=True),
    "brier": Score("Brier", "the squared error of the probabilities, summed over classes", 1, 4, lower_is_better=True),
    "disagreement": _share("disagree", "the share of pairs of heads whose most likely classes differ", True, None),
    # of a study and of a run's results
    "head_kl": Score("KL", "the mean KL divergence between two heads", 1, 4, "nats", None, of_several=True),
    "error": Score("error", "the share of examples that are wrong", unit="%", lower_is_better=True),
    "head_error": Score("one head", "the error of a single head, mean over heads", unit="%", lower_is_better=True),
    "head_gap": _share("one head", "GAP@20 of a single head, mean over heads"),
}

# What results.json holds in percent, by these names; it holds all else as it was measured.
IN_PERCENT = ("error", "head_error", "gap", "head_gap", "map")


@dataclass(frozen=True)
class TaskScores:
    """Which scores speak for a task.

    Args:
        main: the one that decides, a share.
        title: what a study calls it on its test examples.
        best: says how often the most likely class is right.
        of_class: what a single class is scored by.
    """

    main: str
    title: str
    best: str
    of_class: Score


TASKS: dict[Task, TaskScores] = {
    "multiclass": TaskScores("accuracy", "test error", "accuracy", SCORES["accuracy"]),
    "multilabel": TaskScores("gap", "GAP@20", "hit1", _share("average precision", "that of one class")),
}


def current_name(key: str) -> str:
    """A key of a log or of results, with the name that its score has today; version 0.1 had another one.

    Example:
        >>> current_name("val/agreement"), current_name("agreement_mean"), current_name("disagreement")
        ('val/divergence', 'divergence_mean', 'disagreement')
    """
    return re.sub(r"(?<![a-z])agreement(?![a-z])", "divergence", key)


class Values(dict[str, "Tensor"]):
    """The values of metrics by name, which are found by the names of version 0.1 too, with a warning.

    Example:
        >>> import torch
        >>> values = Values({"val/divergence": torch.tensor(0.5)})
        >>> values["val/divergence"].item(), "val/agreement" in values
        (0.5, False)
    """

    def __missing__(self, name: str) -> Tensor:
        if (current := current_name(name)) not in self:
            raise KeyError(name)
        warnings.warn(f"{name} is now {current}.", DeprecationWarning, stacklevel=2)
        return self[current]


def in_row(name: str, value: float) -> float:
    """A measured score as a row of results.json holds it.

    Example:
        >>> in_row("gap", 0.5), in_row("disagreement", 0.5)
        (50.0, 0.5)
    """
    return SCORES[name].scale * value if name in IN_PERCENT else value


def row_score(name: str) -> Score:
    """How a value in a row of results.json is shown; what is no score, such as seconds, as it is.

    Example:
        >>> [row_score(name).scale for name in ("gap", "disagreement", "cpu_seconds")]
        [1.0, 100, 1.0]
    """
    score = SCORES.get(name) or Score(name, "")
    return replace(score, scale=1.0) if name in IN_PERCENT else score


def row_as_shown(row: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """A row of a study, whose errors of tagging are 100 - GAP@20 in percent, with GAP@20 in their place.

    Example:
        >>> row_as_shown({"method": "base", "error_mean": 35.0, "error_std": 0.1}, "multilabel")
        {'method': 'base', 'error_mean': 65.0, 'error_std': 0.1}
    """
    if SCORES[TASKS[task].main].lower_is_better:
        return dict(row)
    return dict(row) | {name: 100 - row[name] for name in ("error_mean", "head_error_mean") if name in row}


def meanings(names: Collection[str]) -> str:
    """What some scores are and which way is better, in the order of the table.

    Example:
        >>> meanings({"ece"})
        'ECE is the expected calibration error in 15 bins. Lower is better for ECE.'
    """
    chosen = [score for name, score in SCORES.items() if name in names]
    sentences = ["; ".join(f"{score.heading} is {score.meaning}" for score in chosen)]
    for lower, word in ((False, "Higher"), (True, "Lower")):
        if headings := [score.heading for score in chosen if score.lower_is_better is lower]:
            sentences.append(f"{word} is better for {', '.join(headings)}")
    return " ".join(f"{sentence}." for sentence in sentences)
