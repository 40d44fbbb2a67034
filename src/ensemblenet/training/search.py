"""`fit --plan search`: which plan suits the user's own data, or whether the base does, by short runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.conversion.convert import plans
from ensemblenet.conversion.planning import STEM, is_eligible, preferred
from ensemblenet.cost import Budget
from ensemblenet.errors import TrainingError
from ensemblenet.recipe import Conversion
from ensemblenet.storage.atomic import write_json

__all__ = ["Candidate", "before_search", "candidates", "rungs", "search"]

_PLAN = "plan.json"
_HEADS = (2, 4)
_TRUNK_SHARES = (STEM, 0.5)
_RUNGS = (1 / 8, 1 / 4, 1 / 2)

Score = Callable[["Candidate", int], float]


@dataclass
class Candidate:
    """What could be trained: the base, or a conversion of it.

    Args:
        name: for people, and for its runs' folders.
        conversion: None for the base itself.
        scores: on validation data, higher is better, of each length in epochs that has run.
    """

    name: str
    conversion: Conversion | None = None
    scores: dict[int, float] = field(default_factory=dict)


def candidates(base: nn.Module, example_inputs: Tensor, settings: Conversion) -> list[Candidate]:
    """The base, and its conversions to 2 and 4 heads that share about a twentieth, as "auto" does, or half of its MACs.

    Args:
        base: a fresh base.
        example_inputs: a batch for it, (N, *).
        settings: budget, seed and the rest of all conversions.

    Raises:
        ConversionError: the base cannot be converted.
        TrainingError: no conversion fits the budget.

    Example:
        >>> import torch
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> [candidate.name for candidate in candidates(base, torch.randn(4, 8), Conversion(budget=1.0))]
        ['base', '2-heads-input', '2-heads-1', '4-heads-input', '4-heads-1']
    """
    found = {"base": Candidate("base")}
    for heads in _HEADS:
        found_plans = plans(base, example_inputs, heads, settings.budget)
        points = [plan.split for plan in found_plans if is_eligible(plan, settings)]
        for share in _TRUNK_SHARES if points else ():
            name = preferred(points, share)[0].name
            plan = replace(settings, num_heads=heads, split_at=name)
            found.setdefault(f"{heads}-heads-{name}", Candidate(f"{heads}-heads-{name}", plan))
    if len(found) == 1:
        raise TrainingError(f"No conversion of the base fits a budget of {Budget.of(settings.budget)}; allow more.")
    return list(found.values())


def rungs(epochs: int) -> list[int]:
    """The lengths of the short runs: an eighth, a quarter and half of the run itself.

    Example:
        >>> rungs(40), rungs(3)
        ([5, 10, 20], [1, 2])
    """
    return sorted({max(1, round(share * epochs)) for share in _RUNGS if share * epochs < epochs})


def search(folder: Path, among: Sequence[Candidate], epochs: int, score: Score) -> Candidate:
    """Successive halving (Jamieson and Talwalkar 2016): all conversions for a short time, the better half for longer.

    The base runs along on every rung and is chosen if no conversion beats it on the last one. Every run starts anew
    and ends with its own learning-rate schedule. Short runs favour the base and wide heads, so the search errs towards
    keeping the base: a conversion that wins only at full length is missed.

    Args:
        folder: of the run; `plan.json` there keeps what is finished, and a search that was killed goes on after it.
        among: what [`candidates`][] gives, the base first.
        epochs: of the run itself.
        score: trains a candidate for so many epochs and gives its score on validation data.

    Returns:
        The candidate to train in full.

    Raises:
        TrainingError: the folder has a search with other settings.
    """
    _recall(folder / _PLAN, among)
    base, conversions = among[0], list(among[1:])
    length = 0
    for length in rungs(epochs):
        for candidate in (base, *conversions):
            if length not in candidate.scores:
                candidate.scores[length] = score(candidate, length)
                write_json(folder / _PLAN, {"epochs": epochs, "candidates": [asdict(candidate) for candidate in among]})
        conversions.sort(key=lambda candidate: candidate.scores[length], reverse=True)
        if length != rungs(epochs)[-1]:
            conversions = conversions[: max(1, len(conversions) // 2)]
    best = conversions[0]
    chosen = best if best.scores[length] > base.scores[length] else base
    described = [asdict(candidate) for candidate in among]
    write_json(folder / _PLAN, {"epochs": epochs, "candidates": described, "chosen": chosen.name})
    _show(among, chosen, rungs(epochs))
    return chosen


def before_search(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """A configuration with what a search keeps of it: the rest of model.conversion is what the search finds.

    Args:
        config: of a run that searches its plan, as plain data.
        folder: the run's, if it has one: its `plan.json` knows what was asked, where config has what was found.
    """
    model = config.get("model") or {}
    conversion = model.get("conversion") or asdict(Conversion())
    if folder is not None and (folder / _PLAN).exists():
        found = json.loads((folder / _PLAN).read_text())["candidates"]
        conversion = next(entry["conversion"] for entry in found if entry["conversion"])
        config = {**config, "plan": "search"}
    kept = {key: value for key, value in conversion.items() if key not in ("num_heads", "split_at")}
    return {**config, "model": {**model, "conversion": kept}}


def _recall(path: Path, among: Sequence[Candidate]) -> None:
    if not path.exists():
        return
    known: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in json.loads(path.read_text())["candidates"]}
    for candidate in among:
        if candidate.name in known:
            settings = asdict(candidate)["conversion"] or {}
            stored = known[candidate.name]["conversion"] or {}
            if any(settings[key] != value for key, value in stored.items()):
                raise TrainingError(f"{path} is of a search with other settings of {candidate.name}; start a new run.")
            scores = known[candidate.name]["scores"]
            candidate.scores = {int(length): value for length, value in scores.items()}


def _show(among: Sequence[Candidate], chosen: Candidate, lengths: Sequence[int]) -> None:
    table = Table(title=f"Plan: {chosen.name}", caption="Scores on validation data; higher is better.")
    table.add_column("candidate")
    for length in lengths:
        table.add_column(f"{length} epochs", justify="right")
    for candidate in among:
        table.add_row(
            candidate.name,
            *(f"{100 * candidate.scores[length]:.2f}" if length in candidate.scores else "" for length in lengths),
            style="bold" if candidate is chosen else None,
        )
    Console().print(table)
