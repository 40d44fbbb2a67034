"""The command `report`: one page about trained networks."""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ensemblenet.cost import Cost
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import LoadError
from ensemblenet.evaluation.findings import FEWEST, Findings, agreeing, pairs, reliability, stopping
from ensemblenet.evaluation.scoring import (
    Scores,
    Seen,
    Split,
    add_data_options,
    chosen_data,
    observe,
    short_number,
    table_columns,
)
from ensemblenet.inputs import InputSpec
from ensemblenet.reports.figures import (
    Design,
    Line,
    Looks,
    Panel,
    draw_classes,
    draw_curves,
    draw_design,
    draw_reliability,
    draw_score_against_macs,
    draw_stopping,
)
from ensemblenet.reports.tables import Card, Cards, Figure, draw_pairs, write_page
from ensemblenet.reports.thumbnails import glimpse, thumbnail
from ensemblenet.storage.restore import MODEL_HELP, Restored, restore
from ensemblenet.storage.runs import environment, quiet_lightning

__all__ = ["report"]

_ORANGES = ("#f59e0b", "#b45309", "#facc15")  # of bases
_BLUES = ("#3b82f6", "#10b981", "#a855f7", "#ec4899")  # of multi-headed models
_SCORE = {"multiclass": ("accuracy", "top-1"), "multilabel": ("gap", "GAP@20")}
_BEST = {"multiclass": "top-1", "multilabel": "Hit@1"}
_OF_CLASS = {"multiclass": "accuracy", "multilabel": "average precision"}
_MEANINGS = {
    "multiclass": "ECE is the expected calibration error in 15 bins; Brier is the squared error of the probabilities, "
    "summed over classes; disagree is the share of pairs of heads whose most likely classes differ.",
    "multilabel": "GAP@20, mAP, Hit@1 and PERR are the YouTube-8M challenge's; NLL is summed over classes.",
}
_MOST_CLASSES = 24
_THRESHOLDS = 40


def report(arguments: Sequence[str]) -> Path:
    """Evaluate trained networks and write a page about them.

    Args:
        arguments: command-line arguments.

    Returns:
        The page's file.

    Raises:
        LoadError: there is no model, no data, or the networks do not belong on one page.
        FileExistsError: the file to write exists.
    """
    options, changes = _parser().parse_known_args(arguments)
    output: Path = options.output
    if output.exists():
        raise FileExistsError(f"{output} exists; --output needs a new file.")
    quiet_lightning()
    restored = [restore(folder) for folder in options.runs]
    _check_alike(restored)
    runs = []
    for looks, one in zip(_looks(restored), restored, strict=True):
        data = chosen_data(one, options.config, changes)
        runs.append(_examine(looks, one, data, options.split))
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, runs, options.split)
    Console().print(f"Report: {output}", highlight=False, soft_wrap=True)
    return output


def _check_alike(restored: Sequence[Restored]) -> None:
    first, *others = restored
    for other in others:
        if (other.task, other.num_classes(), other.classes) != (first.task, first.num_classes(), first.classes):
            raise LoadError(
                f"{other.folder} does not belong on one page with {first.folder}: its task or its classes are others."
            )


def _looks(restored: Sequence[Restored]) -> list[Looks]:
    """A name and a colour for each: without the time where that is clear, orange for bases."""
    short = [re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", one.name) for one in restored]
    names = [name if short.count(name) == 1 else one.name for name, one in zip(short, restored, strict=True)]
    counts = {_ORANGES: 0, _BLUES: 0}
    looks = []
    for name, one in zip(names, restored, strict=True):
        colours = _BLUES if isinstance(one.network, EnsembleNet) else _ORANGES
        looks.append(Looks(name, colours[counts[colours] % len(colours)]))
        counts[colours] += 1
    return looks


# -- what is found out about a run


@dataclass(frozen=True)
class _Run:
    looks: Looks
    restored: Restored
    rows: list[dict[str, Any]]
    findings: Findings
    curves: Mapping[str, Line]

    @property
    def network(self) -> nn.Module:
        return self.restored.network

    @cached_property
    def classes(self) -> list[str]:
        return _readable(self.restored.classes) or [str(label) for label in range(self.restored.num_classes())]


def _readable(classes: Sequence[str] | None) -> list[str]:
    """ImageNet's class folders by their first English word, such as tench for n01440764; other names as they are."""
    names = list(classes or [])
    if not names or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from timm.data.imagenet_info import ImageNetInfo  # slow to import

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name).partition(",")[0] if name in known else name for name in names]
    return [word if words.count(word) == 1 else f"{word}, {name}" for word, name in zip(words, names, strict=True)]


def _examine(looks: Looks, restored: Restored, data: Any, split: Split) -> _Run:
    network = restored.network
    combine = network.combine if isinstance(network, EnsembleNet) else "logits"
    scores, findings = Scores(restored), Findings(combine, restored.task)

    def saw(seen: Seen) -> None:
        scores.update(seen.outputs, seen.targets)
        inputs = glimpse(seen.inputs, len(restored.input_shape))
        findings.update(inputs, seen.outputs, seen.targets, seen.places)

    observe(restored, data, split, saw)
    return _Run(looks, restored, scores.rows(), findings, _read_curves(restored.folder))


def _read_curves(folder: Path) -> dict[str, Line]:
    """What the run logged, by name: points (step, value). A resumed run replaces what it repeats."""
    curves: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def _stopping_lines(run: _Run) -> tuple[Line, Line, tuple[float, float]]:
    """Points (mean MACs, share of right examples in percent) of stopping early, by confidence and by agreement."""
    heads, firsts = run.findings.heads, run.findings.firsts
    macs = {row["num_heads"]: row["macs"] for row in run.rows}
    several = len(heads.classes)
    head = (macs[several] - macs[1]) / (several - 1) if several > 1 else 0.0

    def point(stops: Tensor) -> tuple[float, float]:
        used, right = stopping(stops, firsts.hits)
        return macs[1] + (used - 1) * head, 100 * right

    whole = point(torch.zeros_like(firsts.hits))
    if several == 1:
        return [], [], whole
    levels = firsts.confidence[:-1].flatten().quantile(torch.linspace(0, 1, _THRESHOLDS)).tolist()
    by_confidence = [*(point(firsts.confidence >= level) for level in levels), whole]
    by_agreement = [point(agreeing(heads.classes, number)) for number in range(2, several)]
    return by_confidence, by_agreement, whole


def _design(network: EnsembleNet, restored: Restored) -> Design:
    with torch.inference_mode():
        features = network.trunk(InputSpec(restored.input_shape).zeros())
    trunk, head = network.trunk_cost, network.head_cost
    return Design(
        restored.input_shape,
        tuple(features.shape[1:]),
        (restored.num_classes(),),
        network.recipe.split_at if network.recipe else "",
        network.num_heads,
        None if trunk is None or (trunk.parameters, trunk.macs) == (0, 0) else _size(trunk),
        _size(head) if head else "",
        {"logits": "mean of\nlogits", "probabilities": "mean of\nprobabilities"}[network.combine],
    )


def _size(cost: Cost) -> str:
    return f"{short_number(cost.parameters)} params\n{short_number(cost.macs)} MACs"


# -- the page


def _write(path: Path, runs: Sequence[_Run], split: Split) -> None:
    task = runs[0].restored.task
    names = " and ".join(run.looks.name for run in runs)
    score, label = _SCORE[task]
    lead = Figure(
        "score_against_macs",
        f"{label[0].upper()}{label[1:]} against MACs. Circles: whole networks; line: the first k heads together; "
        "squares: single heads.",
        lambda: draw_score_against_macs([(run.looks, run.rows) for run in runs], score, label),
    )
    sections = {
        "Network and training": [*_designs(runs), *_curves(runs)],
        "Calibration and classes": [_reliability(runs), _classes(runs)],
        "Heads": [*_agreement(runs), _stopping(runs)],
        "Where heads disagree most": _examples(runs),
    }
    write_page(
        path,
        f"{names}: {split} examples",
        " ".join(_summary(run, runs) for run in runs),
        [row for run in runs for row in _table_rows(run)],
        {heading: shown for heading, shown in sections.items() if shown},
        _notes(runs, split),
        environment(),
        table_columns(runs[-1].rows),
        lead,
        figure_files=False,
    )


def _table_rows(run: _Run) -> list[dict[str, Any]]:
    """The whole network under the run's name, and below it its heads."""
    whole, *others = run.rows
    kind = "ours" if isinstance(run.network, EnsembleNet) else "base"
    return [whole | {"method": run.looks.name, "kind": kind}, *others]


def _summary(run: _Run, runs: Sequence[_Run]) -> str:
    score, label = _SCORE[run.restored.task]
    whole, *others = run.rows
    text = f"{run.looks.name}: {100 * whole[score]:.2f} % {label}, {short_number(whole['macs'])} MACs"
    base = getattr(run.network, "base_cost", None)
    if base is not None and base.macs:
        text += f" ({whole['macs'] / base.macs:.2f} of its base's)"
    heads = [100 * row[score] for row in others if row["method"].startswith("head")]
    if heads:
        text += f"; {len(heads)} heads, one alone {sum(heads) / len(heads):.2f} % on average"
    return f"{text}."


def _designs(runs: Sequence[_Run]) -> list[Figure | Cards]:
    return [
        Figure(
            f"design_{number}",
            f"{run.looks.name}: what is shared and what is not; parameters and MACs of the trunk and of one head.",
            partial(draw_design, _design(run.network, run.restored), run.looks.colour),
        )
        for number, run in enumerate(runs)
        if isinstance(run.network, EnsembleNet)
    ]


def _curves(runs: Sequence[_Run]) -> list[Figure | Cards]:
    score, label = _SCORE[runs[0].restored.task]
    panels = [
        Panel("training loss", "train/loss"),
        Panel(f"val {label}, %", f"val/{score}", f"val/head_{score}", 100),
        Panel("val NLL", "val/nll"),
    ]
    panels = [panel for panel in panels if any(panel.curve in run.curves for run in runs)]
    if not panels:
        return []
    caption = "Training curves. Dashed: single heads, mean over heads. Losses of different weights do not compare."
    return [Figure("curves", caption, lambda: draw_curves([(run.looks, run.curves) for run in runs], panels))]


def _reliability(runs: Sequence[_Run]) -> Figure:
    together = [run.findings.firsts for run in runs]
    bins = [
        (run.looks, reliability(best.confidence[-1], best.hits[-1])) for run, best in zip(runs, together, strict=True)
    ]
    return Figure(
        "reliability",
        "Reliability: how often the most likely class is right, by its probability, in 15 bins; below, the share of "
        f"examples in each bin. Bins of fewer than {FEWEST} examples are left out. On the dotted line it is right as "
        "often as it says.",
        lambda: draw_reliability(bins),
    )


def _classes(runs: Sequence[_Run]) -> Figure:
    label = _OF_CLASS[runs[0].restored.task]
    found = [run.findings.class_scores(len(run.classes)) for run in runs]
    counts = found[0][1]
    fewest = FEWEST if int((counts > 0).sum()) > _MOST_CLASSES else 1
    present = [c for c in range(len(runs[0].classes)) if counts[c] >= fewest]
    ranked = sorted(present, key=lambda c: float(found[-1][0][c]))
    shown: list[int | None] = list(ranked)
    which = f"the {len(ranked)} classes"
    if len(ranked) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        shown = [*ranked[:half], None, *ranked[-half:]]
        which = f"the {half} worst and the {half} best of the {len(ranked):,} classes"
    names = ["" if c is None else runs[0].classes[c] for c in shown]
    scores = [
        (run.looks, [0.0 if c is None else float(of_classes[c]) for c in shown])
        for run, (of_classes, _) in zip(runs, found, strict=True)
    ]
    of = f", ranked by {runs[-1].looks.name}" if len(runs) > 1 else ""
    enough = f" that have at least {fewest} examples" if fewest > 1 else ""
    caption = f"{label.capitalize()}: {which}{enough}{of}."
    return Figure("classes", caption, lambda: draw_classes(names, scores, label))


def _agreement(runs: Sequence[_Run]) -> list[Figure | Cards]:
    return [
        Figure(
            f"agreement_{number}",
            f"{run.looks.name}: how often two heads have the same most likely class.",
            partial(draw_pairs, {"pairs": (100 * pairs(run.findings.heads.classes)).tolist()}),
        )
        for number, run in enumerate(runs)
        if len(run.findings.heads.classes) > 1
    ]


def _stopping(runs: Sequence[_Run]) -> Figure:
    label = _BEST[runs[0].restored.task]
    lines = [(run.looks, *_stopping_lines(run)) for run in runs]
    return Figure(
        "stopping",
        "Heads run one after another until the mean of those that ran is confident enough (line, one point for each "
        "threshold), or until all that ran, at least 2, 3, ... of them, have the same most likely class (triangles, "
        "where there are more than two heads).",
        lambda: draw_stopping(lines, label),
    )


def _examples(runs: Sequence[_Run]) -> list[Figure | Cards]:
    return [
        Cards(
            f"{run.looks.name}: the examples whose heads are farthest from the ensemble, by mean KL divergence. "
            "Bold: the label; number: the example's place in the split.",
            [_card(run, example) for example in run.findings.examples],
        )
        for run in runs
        if run.findings.examples
    ]


def _card(run: _Run, example: Any) -> Card:
    def said(best: tuple[int, float]) -> str:
        return f"{run.classes[best[0]]}, {100 * best[1]:.0f}\u00a0%"

    labels = ", ".join(run.classes[label] for label in example.labels) or "none"
    return Card(
        thumbnail(example.inputs, run.restored.description.get("preprocessing"), run.looks.colour),
        labels,
        [
            f"ensemble: {said(example.ensemble)}",
            *(f"head {k}: {said(best)}" for k, best in enumerate(example.heads)),
            f"{example.divergence:.2f} nats, no. {example.place}",
        ],
    )


def _notes(runs: Sequence[_Run], split: Split) -> list[str]:
    counts = " and ".join(dict.fromkeys(f"{run.findings.count:,}" for run in runs))
    notes = [
        f"All scores are of the {counts} examples of the {split} split, in evaluation mode and float32. Shares are in "
        f"percent, NLL is in nats. {_MEANINGS[runs[0].restored.task]}",
    ]
    if len({run.findings.count for run in runs}) > 1:
        notes.append("The runs were scored on different numbers of examples: compare them with care.")
    return notes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemblenet report",
        description="Evaluate trained networks and write one self-contained HTML page: scores of the whole, of single "
        "heads and of the first heads; training curves, calibration, classes, how heads differ, and on what.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{MODEL_HELP}; several are shown together")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which data (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="a new file (default: %(default)s)")
    add_data_options(parser)
    return parser
