"""Give a trained model to others: on the Hugging Face Hub, with a card that says how good it is and what it costs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ensemblenet.cost import Cost
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import LoadError
from ensemblenet.extras import require
from ensemblenet.metrics.scores import IN_PERCENT, SCORES, current_name
from ensemblenet.storage.atomic import read_json
from ensemblenet.storage.checkpoint import write_model
from ensemblenet.storage.hub import PREFIX, upload

__all__ = ["model_card", "push_to_hub"]

_RESULTS = "results.json"
_LABELS = {"accuracy": "accuracy, %", "top5": "top-5 accuracy, %"}  # the hub sorts by these, where tables show errors
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_PIPELINES = {3: "image-classification", 4: "video-classification"}  # by the dimensions of an example
_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val")


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

    Example:
        >>> import torch, ensemblenet
        >>> from unittest.mock import patch
        >>> model = ensemblenet.convert(ensemblenet.models.MNIST1DNet(16), torch.randn(4, 40))
        >>> with patch("huggingface_hub.create_repo"), patch("huggingface_hub.upload_folder"):  # there is no network
        ...     push_to_hub(model, "someone/digits")
        'hf://someone/digits'
    """
    require("hub")
    config, results = None, {}
    if isinstance(model, (str, os.PathLike)):
        require("train")
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
        saved = Path(aside, "model")
        write_model(network, saved, description)
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
        | all 3 heads | 20,198 | 220,000 | 10,570 | 2.69 | 1.50 |
    """
    require("hub")
    import yaml
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    recipe = model.recipe
    if recipe is None:
        raise LoadError("The model was built by hand and cannot be loaded from the hub; make it with convert.")
    description, results = description or {}, results or {}
    name = repo_id.partition("/")[2]
    is_one = recipe.inputs.tree == 0
    pipeline = _PIPELINES.get(len(recipe.inputs.shape)) if is_one else None
    data_class = ((config or {}).get("data") or {}).get("class_path") or "unknown"
    measured = _measured(results)
    evaluations = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type="unknown",  # the hub takes another word for the name of one of its data sets
            dataset_name=data_class.rpartition(".")[2],
            dataset_split="test",
            metric_type=score,
            metric_name=_LABELS.get(score) or SCORES[score].label,
            metric_value=value,
        )
        for score, value in measured.items()
    ]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="ensemblenet",
            tags=["ensemblenet", "pytorch", model.task],
            pipeline_tag=pipeline,
            model_name=name if evaluations else None,
            eval_results=evaluations or None,
        ),
        template_path=str(_TEMPLATE),
        name=name,
        model=model,
        source=recipe.base if recipe.base and recipe.base.factory != "module" else None,
        address=PREFIX + repo_id,
        inputs=recipe.inputs.only if is_one else recipe.inputs.describe(model),
        table=_table(model, results, base_results or {}),
        others=[
            f"{SCORES[score].heading} {f'in {SCORES[score].unit} ' * bool(SCORES[score].unit)}{value:.4g}"
            for score, value in measured.items()
            if score not in IN_PERCENT and score not in _LABELS
        ],
        seeds=results.get("seeds"),
        tested_on=results.get("tested_on"),
        classes=description.get("classes"),
        preprocessing=description.get("preprocessing"),
        training=_settings(config),
        as_yaml=partial(yaml.safe_dump, sort_keys=False),
    )
    return str(card)


def _measured(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores on test data of a row of results, in the units that are shown."""
    test = results.get("test") or {}
    measured = {name: abs(score.scale) * test[name] for name, score in SCORES.items() if name in test}
    return measured | {name: results[f"{name}_mean"] for name in IN_PERCENT if f"{name}_mean" in results}


def _table(model: EnsembleNet, results: Mapping[str, Any], base_results: Mapping[str, Any]) -> list[list[str]]:
    """What the base, the model, its first heads and one head cost, and how they score where that was measured."""
    score = next((name for name in IN_PERCENT if f"{name}_mean" in results), None)
    test = results.get("test") or {}
    first = {k: test.get(f"first_accuracy_{k}") for k in range(model.num_heads - 1, 1, -1)}
    rows = [
        ("base", model.base_cost, base_results.get(f"{score}_mean")),
        (f"all {model.num_heads} heads", model.cost, results.get(f"{score}_mean")),
        *(
            (f"first {k} heads", model.first(k).cost, 100 * (1 - share))
            for k, share in first.items()
            if share is not None
        ),
        ("one head, mean", model.first(1).cost, results.get(f"head_{score}_mean")),
    ]
    table = [["", "parameters", "MACs", "activations", "time"], ["---", *["---:"] * 4]]
    table += [[name, *_sizes(cost, model.base_cost)] for name, cost, _ in rows]
    if score is None:
        return table
    title = f"test {SCORES[score].label}" if score == "error" else SCORES[score].label
    scores = [title, "---:", *("" if value is None else f"{value:.2f}" for _, _, value in rows)]
    return [[*row, last] for row, last in zip(table, scores, strict=True)]


def _sizes(cost: Cost | None, base: Cost | None) -> list[str]:
    """A cost as a table has it: the estimated time as a share of the base's."""
    if cost is None:
        return [""] * 4
    time = f"{cost.shares_of(base).time:.2f}" if base and base.time else ""
    return [f"{cost.parameters:,}", f"{cost.macs:,.0f}", f"{cost.activations:,.0f}", time]


def _settings(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings of a run that say how it was trained."""
    if config is None:
        return None
    trainer = config.get("trainer") or {}
    settings = {"seed": config.get("seed_everything"), "model": config.get("model"), "data": config.get("data")}
    settings["trainer"] = {name: trainer[name] for name in _TRAINER if trainer.get(name) is not None}
    return {name: value for name, value in _without_paths(settings).items() if value not in (None, {})}


def _without_paths(value: Any) -> Any:
    """Settings without what only its author's machine knows."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if not _is_path(item)}
    if isinstance(value, list):
        return [_without_paths(item) for item in value if not _is_path(item)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def _read_row(path: Path) -> dict[str, Any]:
    """The first row of a run's results; empty where there are none."""
    if not path.is_file():
        return {}
    try:
        return _with_current_names(read_json(path)["rows"][0])
    except (LookupError, TypeError, RecursionError) as error:
        raise LoadError(f"{path} holds no rows of results.") from error


def _with_current_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {current_name(key): _with_current_names(item) for key, item in value.items()}
