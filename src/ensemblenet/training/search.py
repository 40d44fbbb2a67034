"""`fit --plan search`: the base, the rule's plans and one reshaped network, all trained in full; the best is kept."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ensemblenet.conversion.convert import convert_alone, convert_as
from ensemblenet.cost import Shares, count_parameters
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ConversionError, LoadError, TrainingError
from ensemblenet.inputs import inputs_and_targets, num_examples
from ensemblenet.metrics.scores import SCORES
from ensemblenet.recipe import Conversion
from ensemblenet.storage.atomic import atomic_path
from ensemblenet.storage.lock import LOCK, NOTE
from ensemblenet.storage.restore import compare_classes, restore
from ensemblenet.storage.runs import CONFIG, RESULTS, keep_config
from ensemblenet.storage.trust import read_config
from ensemblenet.training.module import Classifier
from ensemblenet.training.resume import changed_setting

__all__ = [
    "PLAN",
    "SEARCH",
    "Candidate",
    "candidates",
    "chance",
    "check_base_run",
    "choose",
    "show",
    "take_over",
    "validate",
]

PLAN = "plan.json"
SEARCH = "search"  # the folder of the candidates' runs, within the run's own
# What a run of the base must have in common with the search; its seed and optimizer may be others.
_DECISIVE = (
    *("model.base", "model.conversion", "model.task", "data"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches", "trainer.overfit_batches"),
)
_ERRORS = 2.0  # standard errors within which a difference may be chance


@dataclass(frozen=True)
class Candidate:
    """What one training of a search depends on beside the search's own settings, as plain data.

    Args:
        name: of the candidate.
        conversion: as a dictionary; None for the base itself.
        base: the folder of the finished run of the base: what a conversion is decided by, and the base's own outcome.
    """

    name: str
    conversion: dict[str, Any] | None = None
    base: str | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name


def candidates(base: nn.Module, example_inputs: Tensor, settings: Conversion) -> dict[str, Conversion | None]:
    """What is trained, by name: the base, the automatic plans for 2 and for "auto" heads, and one reshaped network.

    The last is the control of all heads: the same budget spent on one network, with as few blocks as can be and as wide
    as fits; where the base has no blocks to drop, narrower, unless that is the base itself.

    Args:
        base: a fresh base; None stands for it.
        example_inputs: a batch for it, (N, *).
        settings: of which budget, shape, seed and the rest hold, and number of heads, split, width and depth are found.

    Raises:
        ConversionError: the base cannot be converted, or not within the budget.

    Example:
        >>> import torch
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> list(candidates(base, torch.randn(4, 8), Conversion(budget=1.0)))
        ['base', '2-heads']
        >>> list(candidates(base, torch.randn(4, 8), Conversion(budget=0.9)))
        ['base', '2-heads', 'reshaped']
    """

    found: dict[str, Conversion | None] = {"base": None}
    rule = replace(settings, num_heads=2, split_at="auto", width=None, depth=None)
    with warnings.catch_warnings():  # the candidates' trainings will give them
        warnings.simplefilter("ignore")
        for wanted in (rule, replace(rule, num_heads="auto")):
            num_heads = convert_as(wanted, base, example_inputs).num_heads
            found[f"{num_heads}-heads"] = replace(rule, num_heads=num_heads)
        with suppress(ConversionError):  # too little budget
            alone, model = convert_alone(rule, base, example_inputs)
            if count_parameters(model) != count_parameters(base):
                found["reshaped"] = alone
    return found


def check_base_run(run: Path, config: Mapping[str, Any]) -> str | None:
    """Refuse a run that is no finished one of the base, on the same data and as long as all others will be.

    Args:
        run: its folder.
        config: of the search, as plain data.

    Returns:
        A line that names the first other setting that decides its result and differs, such as the learning rate; None
        if none does.

    Raises:
        TrainingError: it is another run; in which setting.
        LoadError: it is no run's folder.
    """
    if not (run / CONFIG).is_file():
        raise LoadError(f"--base_run {run} has no {CONFIG}: give the folder of a finished run of the base.")
    untaught = {} if config["model"]["teacher"] else {"teacher_weight": None, "teacher_temperature": 1.0}
    base = {**config, "plan": "given", "model": {**config["model"], "conversion": None, **untaught}}
    stored = read_config(run / CONFIG, trust=True)  # it is compared alone: what the two have in common was typed
    if change := changed_setting(stored, base, _DECISIVE, grows=False):
        raise TrainingError(f"--base_run {run} was made with {change}: give a run of the same base, data and length.")
    if not (run / RESULTS).exists():
        raise TrainingError(f"--base_run {run} is not finished: end it with `ensemblenet fit --resume {run}`.")
    weight = base["model"]["codistillation_weight"]  # which decides nothing where there is one network
    change = changed_setting({**stored, "model": {**stored["model"], "codistillation_weight": weight}}, base)
    return None if change is None else f"The base is {run}, which was made with {change}."


class _Counting(Classifier):
    examples = 0

    def validation_step(self, batch: Any, batch_index: int) -> None:
        super().validation_step(batch, batch_index)
        self.examples += num_examples(inputs_and_targets(batch)[0])


def validate(run: Path, trainer: Trainer, data: LightningDataModule) -> dict[str, Any]:
    """What a finished run trained, what that costs as shares of the base, and its scores, as plain data.

    Args:
        run: its folder.
        trainer: to validate with; it logs nothing from then on.
        data: set up for training.

    Raises:
        LoadError: the run has no trained model.
        ClassesError: its classes are not those of the data.
    """
    restored = restore(run, trust=True)  # its base is one that was typed
    compare_classes(restored.classes, data)
    network, module = restored.network, _Counting(restored.network, task=restored.task)
    trainer.loggers = []
    [metrics] = trainer.validate(module, data, verbose=False)
    plan, shares = {"num_heads": 1, "split_at": None, "width": 1.0, "depth": 1.0}, Shares(1.0, 1.0, 1.0, 1.0)
    if isinstance(network, EnsembleNet) and network.recipe and network.cost and network.base_cost:
        recipe, shares = network.recipe, network.cost.shares_of(network.base_cost)
        head = {"width": recipe.head.width, "depth": recipe.head.depth}
        plan = {"num_heads": recipe.num_heads, "split_at": recipe.split_at, **head}
    scores = {name.removeprefix("val/"): value for name, value in metrics.items()}
    return {**plan, "shares": shares._asdict(), "scores": scores, "examples": module.examples}


def chance(first: float, second: float, examples: int) -> float:
    """How far two scores of equally good networks may lie apart by the choice of validation examples alone.

    Twice the standard error of the difference of two shares, as if each were of examples of its own. It knows nothing
    of other seeds; for scores that are no mean over examples, such as GAP, it is a rough idea.

    Example:
        >>> round(chance(0.9, 0.9, examples=5000), 3)
        0.012
    """
    return _ERRORS * math.sqrt((first * (1 - first) + second * (1 - second)) / examples)


def choose(outcomes: Mapping[str, Mapping[str, Any]], main: str) -> tuple[str, list[str]]:
    """The name of the best, of equals the first; and of those that chance may have put behind it.

    Args:
        outcomes: what [`validate`][ensemblenet.training.search.validate] gives, by name, the base first.
        main: the score that decides; higher is better.
    """
    scores = {name: outcome["scores"][main] for name, outcome in outcomes.items()}
    best = max(scores, key=scores.__getitem__)
    top, examples = scores[best], outcomes[best]["examples"]
    ties = [name for name, value in scores.items() if name != best and top - value <= chance(top, value, examples)]
    return best, ties


def show(outcomes: Mapping[str, Mapping[str, Any]], main: str, best: str, ties: Sequence[str]) -> None:
    """Print all outcomes, and how far to trust them.

    Args:
        outcomes: as for `choose`.
        main: as for `choose`.
        best: what `choose` gives.
        ties: what `choose` gives.
    """
    examples = f"{outcomes[best]['examples']:,} validation examples"
    table = Table(
        title=f"Plan: {best}",
        caption=f"Scores of {examples}, one seed, in %. cost: parameters/MACs/time against the base's, time as "
        "estimated for an accelerator.",
        box=box.SIMPLE_HEAD,
    )
    shown = {main: SCORES[main].heading, f"head_{main}": "one head", "nll": "NLL"}
    table.add_column("candidate")
    table.add_column("split", overflow="fold")
    for column in (*shown.values(), "width/depth", "cost, %"):
        table.add_column(column, justify="right", overflow="fold")
    for name, outcome in outcomes.items():
        scores = [(SCORES[key.removeprefix("head_")], outcome["scores"][key]) for key in shown]
        table.add_row(
            name,
            outcome["split_at"],
            *(score.text(value) for score, value in scores),
            f"{outcome['width']:.2f}/{outcome['depth']:.2f}",
            "/".join(f"{100 * outcome['shares'][part]:.0f}" for part in ("parameters", "macs", "time")),
            style="bold" if name == best else None,
        )
    console = Console()
    console.print(table)
    if ties:
        said = f"{' and '.join(ties)} may be as good as {best}: the choice of {examples} alone explains the difference"
        advice = "Take the cheapest, or train them with other seeds (--seed_everything)."
    else:
        said, advice = f"{best} is ahead by more than the choice of {examples} explains", ""
    seeds = "what other seeds would do, one run does not say."
    console.print(f"{said}; {seeds} {advice}".rstrip(), highlight=False, soft_wrap=True)


def take_over(run: Path, folder: Path) -> None:
    """Make a finished run's copy of a run whose plan was searched: model, checkpoints, logs, settings and results.

    The results come last, so that a killed copy is made again; what was asked stays as `config-1.yaml`.

    Args:
        run: the best candidate's folder; it stays as it is.
        folder: of the run.
    """
    for source in run.iterdir():
        target = folder / source.name
        if source.is_dir() and source.name != SEARCH:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        elif source.is_file() and source.name not in (PLAN, LOCK, NOTE, CONFIG, RESULTS):
            shutil.copyfile(source, target)
    keep_config(folder, (run / CONFIG).read_text(encoding="utf-8"))
    with atomic_path(folder / RESULTS) as unfinished:
        shutil.copyfile(run / RESULTS, unfinished)
