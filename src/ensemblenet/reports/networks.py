"""One page about trained networks: scores, curves, calibration, how heads differ, and on which examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from ensemblenet.cost import Cost
from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.errors import LoadError
from ensemblenet.evaluation.findings import (
    FEWEST,
    Example,
    Findings,
    early_stopping,
    paired_difference,
    reliability,
)
from ensemblenet.evaluation.scoring import Scores, Seen, Split, in_words, observe
from ensemblenet.inputs import Inputs, call
from ensemblenet.metrics.diversity import same_class
from ensemblenet.metrics.scores import SCORES, TASKS, meanings
from ensemblenet.reports.curves import Curve, read_curves
from ensemblenet.reports.figures import Figure, draw_pairs
from ensemblenet.reports.names import data_name, readable_names
from ensemblenet.reports.network_figures import (
    Design,
    Looks,
    Panel,
    choose_looks,
    draw_classes,
    draw_curves,
    draw_design,
    draw_reliability,
    draw_score_against_macs,
    draw_stopping,
)
from ensemblenet.reports.page import Card, Cards, Section, Table, write_page
from ensemblenet.reports.tables import COST_NOTE, SURE, p_text, scores_columns, short_number
from ensemblenet.reports.thumbnails import glimpse, thumbnail
from ensemblenet.storage.restore import Restored
from ensemblenet.storage.runs import environment

__all__ = ["design_of", "write_report"]

_MOST_CLASSES = 24


def write_report(
    path: Path,
    networks: Sequence[Restored],
    data: Sequence[LightningDataModule],
    split: Split = "test",
    device: str = "auto",
) -> None:
    """Evaluate trained networks and write a page about them.

    Args:
        path: the page's file; its folder is made if need be.
        networks: trained networks of one task and with the same classes.
        data: the examples for each network.
        split: the split to evaluate them on.
        device: to run them on, such as "cuda:1"; "auto" takes a GPU if there is one.

    Raises:
        LoadError: the networks do not belong on one page, or the data does not fit them.
    """
    first, *others = networks
    for other in others:
        if (other.task, other.num_classes(), other.classes) != (first.task, first.num_classes(), first.classes):
            raise LoadError(
                f"{other.folder} does not belong on one page with {first.folder}: its task or its classes are others."
            )
    converted = [isinstance(restored.network, EnsembleNet) for restored in networks]
    looks = choose_looks([restored.name for restored in networks], converted)
    runs = [_examine(*run, split, device) for run in zip(looks, networks, data, strict=True)]
    of = data_name(type(data[0]).__name__, getattr(data[0], "folder", None))
    _write(path, runs, of, partial(in_words, split, data[0]))


# -- what is found out about a network


@dataclass(frozen=True)
class _Run:
    looks: Looks
    restored: Restored
    rows: list[dict[str, Any]]
    findings: Findings
    curves: Mapping[str, Curve]
    classes: list[str]

    @property
    def network(self) -> nn.Module:
        return self.restored.network


def _examine(looks: Looks, restored: Restored, data: LightningDataModule, split: Split, device: str) -> _Run:
    network = restored.network
    combine = network.combine if isinstance(network, EnsembleNet) else "logits"
    scores, findings = Scores(restored), Findings(combine, restored.task)

    def saw(seen: Seen) -> None:
        scores.update(seen.outputs, seen.targets)
        inputs = glimpse(seen.inputs, len(restored.inputs.shape)) if isinstance(seen.inputs, Tensor) else None
        findings.update(inputs, seen.outputs, seen.targets, seen.places)

    observe(restored, data, split, saw, device)
    classes = readable_names(restored.classes or [str(label) for label in range(restored.num_classes())])
    return _Run(looks, restored, scores.rows(), findings, read_curves(restored.folder), classes)


# -- the page


def _write(path: Path, runs: Sequence[_Run], data: str, said: Callable[[str], str]) -> None:
    main = TASKS[runs[0].restored.task].main
    score = SCORES[main]
    lead = Figure(
        "score_against_macs",
        f"{score.heading[0].upper()}{score.heading[1:]} against MACs. Circles: whole networks; line: the first k heads "
        "together; squares: single heads.",
        lambda: draw_score_against_macs([(run.looks, run.rows) for run in runs], main),
    )
    rows = [row for run in runs for row in _table_rows(run)]
    first_design, more_designs = (designs := _designs(runs))[:1], designs[1:]
    sections: dict[str, Section] = {
        "Results": [Table(rows, scores_columns(rows), COST_NOTE)],
        "Training, calibration and classes": [*more_designs, *_curves(runs), _reliability(runs), _classes(runs)],
        "Heads": [*_pairs(runs), _stopping(runs)],
        "Where heads disagree most": _examples(runs),
    }
    write_page(
        path,
        f"{' and '.join(run.looks.name for run in runs)} on {data}: {said('examples')}",
        " ".join([_verdict(runs), *(_cost(run, run.looks.name if len(runs) > 1 else "It") for run in runs)]),
        [lead, *first_design],
        {heading: shown for heading, shown in sections.items() if shown},
        _notes(runs, said),
        environment(),
        figure_files=False,
    )


def _table_rows(run: _Run) -> list[dict[str, Any]]:
    """The whole network under the run's name, and below it its heads."""
    whole, *others = run.rows
    kind = "ours" if isinstance(run.network, EnsembleNet) else "base"
    return [whole | {"method": run.looks.name, "kind": kind}, *others]


def _verdict(runs: Sequence[_Run]) -> str:
    """Which run is best, by how much, and whether that is noise."""
    score, by = (SCORES[name] for name in (TASKS[runs[0].restored.task].main, TASKS[runs[0].restored.task].best))

    def value(run: _Run) -> float:
        return run.rows[0][TASKS[run.restored.task].main]

    best, *others = sorted(runs, key=value, reverse=True)  # a share of what is right
    hits = best.findings.firsts.hits[-1]
    shown = f"{score.text(value(best))} % {score.heading}"
    if not others:
        error = 100 * float(hits.double().std()) / len(hits) ** 0.5
        by_chance = f" (± {error:.2f} by the choice of examples)" if score is by else ""
        return f"{best.looks.name} has {shown}{by_chance}. A page of several runs says which of them is better."
    sentences = [f"{best.looks.name} is best, with {shown}."]
    for other in others:
        text = f"{other.looks.name} has {score.text(value(other))} %"
        if not best.findings.same_examples(other.findings):
            sentences.append(f"{text}, but of other examples: compare them with care.")
            continue
        found = paired_difference(hits, other.findings.firsts.hits[-1])
        how = "" if score is by else f"by {by.heading} "
        side = "behind" if found.mean >= 0 else "ahead"
        noise = "is more than noise" if found.p < SURE else "may be noise"
        points = f"{100 * abs(found.mean):.2f} ± {100 * found.error:.2f} points"
        sentences.append(f"{text}: {how}{points} {side}, which {noise} ({p_text(found.p, 'p ')}).")
    return " ".join(sentences)


def _cost(run: _Run, name: str) -> str:
    """What a run's network costs, and what its heads gain by being several."""
    main = TASKS[run.restored.task].main
    whole, *others = run.rows
    text = f"{name} has {short_number(whole['parameters'])} parameters and {short_number(whole['macs'])} MACs"
    base = getattr(run.network, "base_cost", None)
    if base is not None and base.macs:
        time = f", {whole['time'] / base.time:.2f} of its estimated time" if base.time and whole.get("time") else ""
        text += f" ({whole['macs'] / base.macs:.2f} of its base's{time})"
    heads = [row[main] for row in others if row["method"].startswith("head")]
    if heads:
        text += f"; one of its {len(heads)} heads alone has {SCORES[main].text(sum(heads) / len(heads))} % on average"
    return f"{text}."


def _designs(runs: Sequence[_Run]) -> list[Figure]:
    return [
        Figure(
            f"design_{number}",
            f"{run.looks.name}: what is shared and what is not; parameters and MACs of the trunk and of one head.",
            partial(
                draw_design,
                design_of(run.network, run.restored.inputs, run.restored.num_classes()),
                run.looks.colour,
            ),
        )
        for number, run in enumerate(runs)
        if isinstance(run.network, EnsembleNet)
    ]


def design_of(network: EnsembleNet, inputs: Inputs, num_classes: int) -> Design:
    """What the picture of a model shows.

    Args:
        network: in evaluation mode.
        inputs: what it takes.
        num_classes: C.
    """
    with torch.inference_mode():
        features, *_ = as_tuple(call(network.trunk, inputs.zeros()))
    trunk, head = network.trunk_cost, network.head_cost
    return Design(
        {name: spec.shape for name, spec in zip(inputs.names(network), inputs.tensors, strict=True)},
        tuple(features.shape[1:]),
        (num_classes,),
        network.recipe.split_at if network.recipe else "",
        network.num_heads,
        None if trunk is None or (trunk.parameters, trunk.macs) == (0, 0) else _size(trunk),
        _size(head) if head else "",
        {"logits": "mean of\nlogits", "probabilities": "mean of\nprobabilities"}[network.combine],
    )


def _size(cost: Cost) -> str:
    return f"{short_number(cost.parameters)} params\n{short_number(cost.macs)} MACs"


def _curves(runs: Sequence[_Run]) -> list[Figure]:
    main = TASKS[runs[0].restored.task].main
    panels = [
        Panel("training loss", "train/loss"),
        Panel(f"val {SCORES[main].label}", f"val/{main}", f"val/head_{main}", SCORES[main].shown),
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
    score = TASKS[runs[0].restored.task].of_class
    found = [run.findings.class_scores(len(run.classes)) for run in runs]
    counts = found[0][1]
    fewest = FEWEST if int((counts > 0).sum()) > _MOST_CLASSES else 1
    present = [c for c in range(len(runs[0].classes)) if counts[c] >= fewest]
    ranked = sorted(present, key=lambda c: float(found[-1][0][c]))  # of what is right, so the worst first
    shown: list[int | None] = list(ranked)
    which = f"the {len(ranked)} classes"
    if len(ranked) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        shown = [*ranked[:half], None, *ranked[-half:]]
        which = f"the {half} worst and the {half} best of the {len(ranked):,} classes"
    names = ["" if c is None else runs[0].classes[c] for c in shown]
    scores = [
        (run.looks, [0.0 if c is None else score.shown(float(of_classes[c])) for c in shown])
        for run, (of_classes, _) in zip(runs, found, strict=True)
    ]
    of = f", ranked by {runs[-1].looks.name}" if len(runs) > 1 else ""
    enough = f" that have at least {fewest} examples" if fewest > 1 else ""
    caption = f"{score.heading.capitalize()}: {which}{enough}{of}."
    return Figure("classes", caption, lambda: draw_classes(names, scores, score.label))


def _pairs(runs: Sequence[_Run]) -> list[Figure]:
    return [
        Figure(
            f"agreement_{number}",
            f"{run.looks.name}: how often two heads have the same most likely class.",
            partial(draw_pairs, (100 * same_class(run.findings.heads.classes)).tolist()),
        )
        for number, run in enumerate(runs)
        if len(run.findings.heads.classes) > 1
    ]


def _stopping(runs: Sequence[_Run]) -> Figure:
    score = SCORES[TASKS[runs[0].restored.task].best]
    macs = [{row["num_heads"]: row["macs"] for row in run.rows} for run in runs]
    lines = [
        (run.looks, *early_stopping(run.findings.heads, run.findings.firsts, costs, score.shown))
        for run, costs in zip(runs, macs, strict=True)
    ]
    return Figure(
        "stopping",
        "Heads run one after another until the mean of those that ran is confident enough (line, one point for each "
        "threshold), or until all that ran, at least 2, 3, ... of them, have the same most likely class (triangles, "
        "where there are more than two heads).",
        lambda: draw_stopping(lines, score.label),
    )


def _examples(runs: Sequence[_Run]) -> list[Cards]:
    return [
        Cards(
            f"{run.looks.name}: the examples whose heads are farthest from the ensemble, by mean KL divergence. "
            "Bold: the label; number: the example's place in the split.",
            [_card(run, example) for example in run.findings.examples],
        )
        for run in runs
        if run.findings.examples
    ]


def _card(run: _Run, example: Example) -> Card:
    def text(best: tuple[int, float]) -> str:
        return f"{run.classes[best[0]]}, {100 * best[1]:.0f}\u00a0%"

    preprocessing = run.restored.description.get("preprocessing")
    return Card(
        {} if example.inputs is None else thumbnail(example.inputs, preprocessing, run.looks.colour),
        ", ".join(run.classes[label] for label in example.labels) or "none",
        [
            f"ensemble: {text(example.ensemble)}",
            *(f"head {k}: {text(best)}" for k, best in enumerate(example.heads)),
            f"{example.divergence:.2f} nats, no. {example.place}",
        ],
    )


def _notes(runs: Sequence[_Run], said: Callable[[str], str]) -> list[str]:
    counts = " and ".join(dict.fromkeys(f"{run.findings.count:,}" for run in runs))
    notes = [
        f"All scores are of the {counts} examples of the {said('split')}, in evaluation mode and float32. Shares are "
        f"in percent, NLL is in nats. {meanings(runs[0].rows[0].keys())}",
    ]
    if len(runs) > 1:
        by = SCORES[TASKS[runs[0].restored.task].best].heading
        notes.append(
            f"Differences in {by} are of pairs: both networks on the same example. ± is the standard error, p that of "
            "McNemar's exact test. They say what other examples would change, not what other seeds would: "
            "`ensemblenet compare` trains several."
        )
    return notes
