"""How good a trained network is, its heads alone, and its first heads together; and the data that is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn

from ensemblenet._moved import renamed
from ensemblenet.cost import Cost, measure_cost
from ensemblenet.data import load_all
from ensemblenet.ensemble import EnsembleNet, combining_cost
from ensemblenet.errors import LoadError
from ensemblenet.functional import Combine
from ensemblenet.inputs import Inputs, Tree, call, inputs_and_targets, map_tensors, num_examples
from ensemblenet.metrics import HeadMetrics
from ensemblenet.metrics.tagging import TaggingMetrics
from ensemblenet.storage.restore import Describes, Restored, compare_classes, data_module
from ensemblenet.storage.specs import changed_data
from ensemblenet.training.module import seen_outputs

__all__ = [
    "Saw",
    "Scores",
    "Seen",
    "Split",
    "View",
    "chosen_data",
    "in_words",
    "observe",
    "score",
    "views",
]

__getattr__ = renamed(
    __name__,
    {
        "add_data_options": "ensemblenet.cli.options.add_data",
        "short_number": "ensemblenet.reports.tables.short_number",
        "table_columns": "ensemblenet.reports.tables.scores_columns",
        "test": "ensemblenet.cli.test.test",
        "validate": "ensemblenet.cli.validate.validate",
    },
)

Split = Literal["val", "test"]


class Seen(NamedTuple):
    """A batch, and what a network said of it; all on the CPU.

    Attributes:
        places: of the N examples in their split.
        inputs: (N, *), or V views of each, (N, V, *); a tuple or a dictionary of tensors where there are several.
        outputs: the logits of every head, (K, N, C), float32.
        targets: what the loss takes.
    """

    places: list[int]
    inputs: Tree
    outputs: Tensor
    targets: Tensor


Saw = Callable[[Seen], None]

_METRICS = {"multiclass": HeadMetrics, "multilabel": TaggingMetrics}


# -- what is scored


@dataclass(frozen=True)
class View:
    """Some heads of a model, which combine into one prediction.

    Args:
        name: such as "head 2".
        heads: which ones.
        cost: of the trunk and these heads.
    """

    name: str
    heads: tuple[int, ...]
    cost: Cost


def views(network: nn.Module, example: Tree) -> list[View]:
    """The whole network, each of its heads alone, and its first heads together; a plain network is one view.

    Args:
        network: a base or a multi-headed model.
        example: inputs for it.

    Example:
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(3)])
        >>> [(view.name, view.cost.macs) for view in views(model, torch.zeros(1, 8))]
        [('ensemble', 272.0), ('head 0', 176.0), ('head 1', 176.0), ('head 2', 176.0), ('first 2', 224.0)]
    """
    if not isinstance(network, EnsembleNet):
        return [View("base", (0,), measure_cost(network, example))]
    several = tuple(range(network.num_heads))
    chosen = {"ensemble": several}
    if len(several) > 1:
        chosen |= {f"head {k}": (k,) for k in several}
    chosen |= {f"first {k}": several[:k] for k in range(2, len(several))}
    trunk, head = _part_costs(network, example)

    def cost(num_heads: int) -> Cost:
        combining = combining_cost(network.output_shapes, num_heads, network.combine, network.task)
        return trunk + num_heads * head + combining

    return [View(name, heads, cost(len(heads))) for name, heads in chosen.items()]


def _part_costs(network: EnsembleNet, example: Tree) -> tuple[Cost, Cost]:
    if network.trunk_cost is not None and network.head_cost is not None:
        return network.trunk_cost, network.head_cost
    with torch.no_grad():
        features = call(network.trunk, example)
    return measure_cost(network.trunk, example), measure_cost(network.heads[0], features)


class Scores:
    """The metrics of each view of a network, streaming over batches.

    Args:
        restored: the network, and its task.

    Example:
        >>> restored = Restored(nn.Linear(4, 3).eval(), "multiclass", Inputs.of(torch.zeros(1, 4)), {}, None, Path())
        >>> scores = Scores(restored)
        >>> scores.update(torch.tensor([[[5.0, 0.0, 0.0]]]), torch.tensor([0]))
        >>> [row] = scores.rows()
        >>> row["method"], row["accuracy"], row["parameters"]
        ('base', 1.0, 15)
    """

    def __init__(self, restored: Restored) -> None:
        network = restored.network
        combine: Combine = network.combine if isinstance(network, EnsembleNet) else "logits"
        classes, kind = restored.num_classes(), _METRICS[restored.task]
        self.views = views(network, restored.inputs.zeros())
        self.metrics = [kind(classes, len(view.heads), combine=combine) for view in self.views]

    def update(self, head_outputs: Tensor, target: Tensor) -> None:
        """Add a batch: logits (K, N, C), and the targets that the loss takes."""
        for view, metrics in zip(self.views, self.metrics, strict=True):
            metrics.update(head_outputs[list(view.heads)], target)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each view: name, heads, cost, and the scores of its prediction."""
        return [
            {
                "method": view.name,
                "num_heads": len(view.heads),
                **asdict(view.cost),
                **{
                    name: value.item()
                    for name, value in metrics.compute().items()
                    if not name.startswith(("head_", "first_"))  # these have rows of their own
                },
            }
            for view, metrics in zip(self.views, self.metrics, strict=True)
        ]


def score(
    restored: Restored, data: LightningDataModule, split: Split, device: str = "auto", also: Saw | None = None
) -> list[dict[str, Any]]:
    """Score a network, its heads and its first heads on a split of some data.

    Args:
        restored: the network.
        data: its examples.
        split: "val" or "test".
        device: to run it on, such as "cuda:1"; "auto" takes a GPU if there is one.
        also: called for each batch, too.

    Returns:
        A row for each [`View`][ensemblenet.evaluation.scoring.View]: `method`, `num_heads`, `parameters`, `macs`, and
        what [`ensemblenet.metrics.HeadMetrics`][] or [`ensemblenet.metrics.tagging.TaggingMetrics`][] says of its
        prediction.

    Raises:
        LoadError: the data does not fit the network.
    """
    scores = Scores(restored)

    def saw(seen: Seen) -> None:
        scores.update(seen.outputs, seen.targets)
        if also is not None:
            also(seen)

    observe(restored, data, split, saw, device)
    return scores.rows()


def observe(restored: Restored, data: LightningDataModule, split: Split, saw: Saw, device: str = "auto") -> None:
    """Run a network over a split of some data, by Lightning's trainer.

    Args:
        restored: the network.
        data: its examples.
        split: "val" or "test".
        saw: called for each batch.
        device: to run it on, such as "cuda:1"; "auto" takes a GPU if there is one.

    Raises:
        LoadError: the data does not fit the network, or there is no such device.
    """
    kind, _, index = device.partition(":")
    try:
        trainer = _trainer(kind, [int(index)] if index else 1)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise LoadError(f"There is no device {device!r}: {error}") from error
    run = {"val": trainer.validate, "test": trainer.test}[split]
    run(_Observer(restored, saw), data, verbose=False)


def _trainer(accelerator: str, devices: list[int] | int) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar()],
    )


class _Observer(LightningModule):
    """Runs the network over a split and calls a callback with each batch's logits."""

    def __init__(self, restored: Restored, saw: Saw) -> None:
        super().__init__()
        self.network = restored.network
        self.restored = restored
        self.num_classes = restored.num_classes()
        self.saw = saw
        self.next_place = 0

    def setup(self, stage: str) -> None:
        """Compare the classes of data and network."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        compare_classes(self.restored.classes, data)
        names = data.description().get("classes") if isinstance(data, Describes) else None
        if names is not None and len(names) != self.num_classes:
            raise LoadError(f"The data has {len(names)} classes, {self.restored.folder} has {self.num_classes}.")

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Show a batch."""
        self._show(batch, self.trainer.val_dataloaders)

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Show a batch."""
        self._show(batch, self.trainer.test_dataloaders)

    def _show(self, batch: Any, loader: Any) -> None:
        if batch is None:  # all of its examples were skipped
            return
        x, y = inputs_and_targets(batch)
        self._check_target(y)
        try:
            z = seen_outputs(self.network, x, len(self.restored.inputs.tensors[0].shape) + 1, self.restored.task)
        except (RuntimeError, TypeError) as error:
            expected, got = ([spec.shape for spec in inputs.tensors] for inputs in (self.restored.inputs, Inputs.of(x)))
            if len(got) == len(expected) and all(a[-len(b) :] == b for a, b in zip(got, expected, strict=True)):
                raise
            raise LoadError(
                f"The data has inputs of shape {_listed(got)}, {self.restored.folder} was trained on "
                f"{_listed(expected)} and cannot take them: {error}"
            ) from error
        self.saw(Seen(self._places(num_examples(x), loader), map_tensors(Tensor.cpu, x), z.float().cpu(), y.cpu()))

    def _places(self, number: int, loader: Any) -> list[int]:
        """The places of the next examples; those that the loader could not read and skipped are not among them."""
        skipped = getattr(loader, "broken", {})
        places = (place for place in count(self.next_place) if place not in skipped)
        taken = list(islice(places, number))
        self.next_place = taken[-1] + 1
        return taken

    def _check_target(self, y: Tensor) -> None:
        classes = self.num_classes if self.restored.task == "multiclass" else y.shape[-1]
        if self.restored.task == "multiclass" and int(y.max()) >= classes:
            raise LoadError(f"The data has the label {int(y.max())}; {self.restored.folder} has {classes} classes.")
        if classes != self.num_classes:
            raise LoadError(f"The data has {classes} classes, {self.restored.folder} has {self.num_classes}.")


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


# -- what data


def in_words(split: Split, data: LightningDataModule, what: str) -> str:
    """What a split is called where its scores are shown.

    Example:
        >>> in_words("test", LightningDataModule(), "examples")
        'test examples'
    """
    if split == "test" and getattr(data, "tests_on_validation", False):
        return f"val {what}, as there is no test split"
    return f"{split} {what}"


def chosen_data(
    restored: Restored, file: Path | None, changes: Sequence[str], class_path: str | None = None
) -> LightningDataModule:
    """The data that a command line names: a run's own, changed or not, or any other.

    Args:
        restored: a run or a saved directory.
        file: a YAML file with `class_path` and `init_args`, on its own or under `data`, as in `fit`'s files.
        changes: options, see [`changed_data`][ensemblenet.storage.specs.changed_data].
        class_path: the data module, in place of the run's own.

    Raises:
        LoadError: an unknown option, no data, or arguments that the data module does not take.
    """
    spec = _read_spec(file) if file else {}
    class_path = class_path or spec.get("class_path")
    own = (restored.config or {}).get("data", {}) if class_path is None else {}
    class_path = class_path or own.get("class_path")
    if class_path is None:
        raise LoadError(
            f"{restored.folder} does not know its data: give --data.class_path ensemblenet.data.NAME with its "
            "arguments as --data.KEY VALUE, or a YAML file with class_path and init_args as --config FILE."
        )
    init_args = {**(own.get("init_args") or {}), **(spec.get("init_args") or {})}
    load_all()
    data = changed_data({"class_path": class_path, "init_args": init_args}, changes)
    return data_module(replace(restored, config={"data": data}))


def _read_spec(file: Path) -> Mapping[str, Any]:
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoadError(f"{file} is not YAML: {error}") from error
    spec = spec.get("data", spec) if isinstance(spec, Mapping) else spec
    if not isinstance(spec, Mapping) or not spec.keys() & {"class_path", "init_args"}:
        raise LoadError(f"{file} must hold class_path and init_args of a data module.")
    return spec
