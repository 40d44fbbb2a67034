"""Give a trained model to others: on the Hugging Face Hub, with a card that says how good it is and what it costs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml
from torch import nn

from ensemblenet.cost import Cost
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import LoadError
from ensemblenet.metrics.scores import IN_PERCENT, SCORES
from ensemblenet.storage.checkpoint import save
from ensemblenet.storage.hub import PREFIX, upload

__all__ = ["model_card", "push_to_hub"]

_RESULTS = "results.json"
_MACS_NOTE = "MACs are multiply-adds for one example: half of what `torch.utils.flop_counter` counts."
_PIPELINES = {3: "image-classification", 4: "video-classification"}  # by the dimensions of an example
_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")

_CARD = Template("""---
$header---

# $name

A shared trunk with $heads heads, whose $combine are averaged into one prediction. `ensemblenet` converted it from
$base and trains such models in one stage by co-distillation, after the idea of *EnsembleNet*
([arXiv 1905.09979](https://arxiv.org/abs/1905.09979)).

```python
import ensemblenet

model = ensemblenet.load("$address"$base_argument)  # from inputs ($shape) to logits (N, C)
```

`model.head(k)` is one head as a network of its own, `model.first(k)` the model of the first k heads.

## Figures

$figures

$note

## Data

$data

## Training

$training
""")


def push_to_hub(
    model: EnsembleNet | str | os.PathLike[str],
    repo_id: str,
    *,
    description: Mapping[str, Any] | None = None,
    base: nn.Module | None = None,
    base_run: str | os.PathLike[str] | None = None,
    private: bool = False,
    trust: bool = False,
) -> str:
    """Put a converted model on the Hugging Face Hub: safetensors, its recipe, plain JSON, and a model card.

    The card is made from the run's figures and settings. Names of files and folders are left out of it. A token comes
    from the environment or from `hf auth login`, as the library huggingface_hub documents.

    Args:
        model: a converted model, the folder of a run of `fit`, or a saved directory.
        repo_id: `owner/name`; the repository is made if it does not exist.
        description: what is known of the data, as for [`ensemblenet.save`][]; a folder knows its own.
        base: a fresh instance of the base, for a saved directory whose base no known factory makes.
        base_run: the folder of a run of the base, whose figures the card sets beside the model's.
        private: who may see a new repository.
        trust: run what the folder names of its author's own code.

    Returns:
        The address that [`ensemblenet.load`][] takes, `hf://owner/name`.

    Raises:
        LoadError: no converted model, a name that is none, or the hub refuses.
    """
    config, results = None, {}
    if isinstance(model, (str, os.PathLike)):
        from ensemblenet.storage.restore import restore  # loads Lightning

        folder = Path(model)
        restored = restore(folder, base, trust=trust)
        network, config = restored.network, restored.config
        description = {**restored.description, **(description or {})}
        results = _read_row(folder / _RESULTS)
    else:
        network = model
    if not isinstance(network, EnsembleNet):
        raise LoadError("Only a converted model can be loaded from the hub again, got a single network.")
    base_results = _read_row(Path(base_run, _RESULTS)) if base_run is not None else {}
    with tempfile.TemporaryDirectory() as aside:
        saved = save(network, Path(aside, "model"), description)
        card = model_card(network, repo_id, description or {}, results, base_results, config)
        (saved / "README.md").write_text(card, encoding="utf-8")
        if results:
            (saved / _RESULTS).write_text(json.dumps({"rows": [results]}, indent=2) + "\n")
        return upload(saved, repo_id, private, f"A model of {network.num_heads} heads by ensemblenet")


def model_card(
    model: EnsembleNet,
    repo_id: str,
    description: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    base_results: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """The text of a model card, `README.md`.

    Args:
        model: a converted model.
        repo_id: `owner/name`.
        description: of its data: `classes` and `preprocessing`.
        results: a row of its run's `results.json`.
        base_results: the same of the base.
        config: its run's configuration.

    Example:
        >>> import ensemblenet, torch
        >>> from ensemblenet.models import MNIST1DNet
        >>> model = ensemblenet.convert(MNIST1DNet(), torch.randn(2, 40), num_heads=3)
        >>> card = model_card(model, "someone/digits", results={"error_mean": 1.5, "head_error_mean": 2.0})
        >>> print(next(line for line in card.splitlines() if line.startswith("| all")))
        | all 3 heads | 20,198 | 220,000 | 1.50 |
    """
    recipe = model.recipe
    if recipe is None:
        raise LoadError("The model was built by hand and cannot be loaded from the hub; make it with convert.")
    source = recipe.base if recipe.base and recipe.base.factory != "module" else None
    header: dict[str, Any] = {"library_name": "ensemblenet", "tags": ["ensemblenet", "pytorch", model.task]}
    if pipeline := _PIPELINES.get(len(recipe.inputs.shape)):
        header["pipeline_tag"] = pipeline
    return _CARD.substitute(
        header=yaml.safe_dump(header, sort_keys=False),
        name=repo_id.partition("/")[2],
        heads=model.num_heads,
        combine=model.combine,
        base=f"`{source.name}` of {source.factory}" if source else "a network of its author's own",
        base_argument="" if source else ", base=a_fresh_base",
        address=PREFIX + repo_id,
        shape=", ".join(("N", *map(str, recipe.inputs.shape))),
        figures=_figures(model, results or {}, base_results or {}),
        note=_MACS_NOTE,
        data=_data(description or {}),
        training=_training(config),
    )


def _figures(model: EnsembleNet, results: Mapping[str, Any], base_results: Mapping[str, Any]) -> str:
    """The table of costs and scores, and what else was measured."""
    score = next((name for name in IN_PERCENT if f"{name}_mean" in results), None)
    title = {None: None, "error": f"test {SCORES['error'].label}"}.get(score, score and SCORES[score].label)
    first = {k: results["test"][f"first_accuracy_{k}"] for k in _first_measured(model, results)}
    rows: list[tuple[str, Cost | None, Any]] = [
        ("base", model.base_cost, base_results.get(f"{score}_mean")),
        (f"all {model.num_heads} heads", model.cost, results.get(f"{score}_mean")),
        *((f"first {k} heads", model.first(k).cost, 100 * (1 - accuracy)) for k, accuracy in first.items()),
        ("one head, mean", model.first(1).cost, results.get(f"head_{score}_mean")),
    ]
    lines = [["", "parameters", "MACs", *([title] if title else [])], ["---", *["---:"] * (3 if title else 2)]]
    for name, cost, value in rows:
        cells = [f"{cost.parameters:,}", f"{cost.macs:,.0f}"] if cost else ["", ""]
        lines.append([name, *cells, *(["" if value is None else f"{value:.2f}"] if title else [])])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    test = results.get("test", {})
    more = ", ".join(
        f"{score.heading} {f'in {score.unit} ' * bool(score.unit)}{score.scale * test[name]:.4g}"
        for name, score in SCORES.items()
        if name in test and name not in IN_PERCENT
    )
    seeds = results.get("seeds")
    notes = [f"All heads, test data: {more}." if more else "", f"Seeds: {seeds}." if seeds else ""]
    return "\n\n".join(filter(None, [table, " ".join(filter(None, notes))]))


def _first_measured(model: EnsembleNet, results: Mapping[str, Any]) -> list[int]:
    test = results.get("test", {})
    return [k for k in range(model.num_heads - 1, 1, -1) if f"first_accuracy_{k}" in test]


def _data(description: Mapping[str, Any]) -> str:
    classes, preprocessing = description.get("classes"), description.get("preprocessing")
    known = [
        f"{len(classes):,} classes, named in `data.json` in the order of the outputs." if classes else "",
        f"Preprocessing:\n\n{_yaml_block(preprocessing)}" if preprocessing else "",
    ]
    return "\n\n".join(filter(None, known)) or "Not described."


def _training(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return "Not described; `recipe.json` says how the model was made from its base."
    trainer = {name: config["trainer"].get(name) for name in _TRAINER}
    settings = {"seed": config.get("seed_everything"), **{name: config[name] for name in ("model", "data")}}
    settings["trainer"] = {name: value for name, value in trainer.items() if value is not None}
    return _yaml_block(_without_paths(settings))


def _without_paths(value: Any) -> Any:
    """Settings without what only its author's machine knows."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if not _is_path(item)}
    if isinstance(value, list):
        return [_without_paths(item) for item in value if not _is_path(item)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _yaml_block(data: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(data, sort_keys=False)}```"


def _read_row(path: Path) -> dict[str, Any]:
    """The first row of a run's results; empty where there are none."""
    return json.loads(path.read_text())["rows"][0] if path.is_file() else {}
