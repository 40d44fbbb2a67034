"""The command `predict`: what a trained network says of examples, and how far its heads agree."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ensemblenet.cli.main import positive_integer
from ensemblenet.data.files import FileReader, InputFiles, file_reader, find_files
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import DataError, LoadError
from ensemblenet.evaluation.scoring import Seen, Split, add_data_options, chosen_data, observe
from ensemblenet.evaluation.submission import write_submission
from ensemblenet.functional import Combine, Task, combine_heads
from ensemblenet.storage.restore import MODEL_HELP, Restored, restore
from ensemblenet.storage.runs import aside, quiet_lightning
from ensemblenet.training.module import seen_outputs

__all__ = ["Names", "PredictionFile", "predict"]

_MOST_LINES = 10


@runtime_checkable
class Names(Protocol):
    """A data module whose examples have names."""

    def example_name(self, split: Split, place: int) -> str:
        """What to call an example, such as its file, after `setup`."""
        ...


def predict(arguments: Sequence[str]) -> Path:
    """Predict examples and write a file.

    Args:
        arguments: command-line arguments.

    Returns:
        The file.

    Raises:
        LoadError: there is no model to load, or no data that fits it.
        DataError: files that are missing, damaged or of another kind.
        FileExistsError: the file to write exists.
    """
    options, changes = _parser().parse_known_args(arguments)
    if options.on_damage:
        warnings.warn("--on-damage is now --on-broken.", DeprecationWarning, stacklevel=2)
        options.on_broken = options.on_damage
    if options.output.exists():
        raise FileExistsError(f"{options.output} exists; --output needs a new file.")
    restored = restore(options.model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.data is None:
        _predict_split(restored, options, changes)
    elif changes:
        raise LoadError(f"{changes[0]} is for the data of a run; it does not go with --data.")
    elif (reader := file_reader(restored.input_shape, restored.description)) is not None:
        _predict_files(restored, reader, options)
    else:
        write_submission(
            restored,
            options.data,
            options.output,
            options.top,
            options.batch_size,
            options.on_broken,
            options.sample_frames,
        )
    return options.output


def _predict_split(restored: Restored, options: argparse.Namespace, changes: Sequence[str]) -> None:
    data = chosen_data(restored, options.config, changes)
    name = data.example_name if isinstance(data, Names) else lambda split, place: str(place)
    quiet_lightning()
    with PredictionFile(options.output, restored) as file:

        def saw(seen: Seen) -> None:
            ids = [name(options.split, place) for place in seen.places]
            file.write(ids, seen.outputs, seen.targets if restored.task == "multiclass" else None)

        observe(restored, data, options.split, saw)
    Console().print(f"{file.count:,} examples: {options.output}", highlight=False, soft_wrap=True)


def _predict_files(restored: Restored, reader: FileReader, options: argparse.Namespace) -> None:
    files = InputFiles(find_files(options.data, reader.suffixes), reader.read)
    batches = files.batches(options.batch_size, options.num_workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, ndim = restored.network.to(device), len(restored.input_shape) + 1
    skipped: list[str] = []
    with PredictionFile(options.output, restored) as file:
        for paths, inputs, unreadable in track(batches, "Predicting", transient=True):
            if unreadable and options.on_broken == "error":
                raise DataError(unreadable[0])
            skipped += unreadable
            if paths:
                with torch.inference_mode():
                    outputs = seen_outputs(network, inputs.to(device), ndim, restored.task)
                file.write(paths, outputs.float().cpu())
    console = Console()
    for line in skipped[:_MOST_LINES]:
        console.print(f"Skipped {line}", highlight=False, soft_wrap=True, markup=False)
    more = f", {len(skipped):,} skipped" if skipped else ""
    console.print(f"{file.count:,} files{more}: {options.output}", highlight=False, soft_wrap=True)


class PredictionFile:
    """A table of predictions, written batch by batch, as Parquet or CSV by the file's suffix.

    | column | meaning |
    |---|---|
    | `id` | the example: its file, or its place in the split |
    | `label` | the true class, where it is known |
    | `predicted` | the most likely class |
    | `probability` | its probability |
    | `spread` | standard deviation over heads of that class's probability; 0 for a single head |
    | `disagreement` | share of pairs of heads whose most likely classes differ |
    | `probabilities` | Parquet: of all classes, whose names the schema's metadata hold under `classes`, as JSON |
    | `p_NAME`, ... | CSV: the same, a column for each class |

    Args:
        path: to create; it is there only once it is complete.
        restored: the network, which knows task and classes.

    Raises:
        LoadError: the suffix is of neither format.
        DataError: at the end, if nothing was written.

    Example:
        >>> import tempfile
        >>> restored = Restored(torch.nn.Linear(4, 2), "multiclass", (4,), {"classes": ["cat", "dog"]}, None, Path())
        >>> path = Path(tempfile.mkdtemp(), "predictions.csv")
        >>> with PredictionFile(path, restored) as file:
        ...     file.write(["a.jpg"], torch.tensor([[[0.0, 0.0]], [[0.0, 8.0]]]))
        >>> header, row = path.read_text().replace('"', "").splitlines()
        >>> header
        'id,predicted,probability,spread,disagreement,p_cat,p_dog'
        >>> row[:15]
        'a.jpg,dog,0.982'
    """

    def __init__(self, path: Path, restored: Restored) -> None:
        if path.suffix not in (".csv", ".parquet"):
            raise LoadError(f"The file of predictions must end in .csv or .parquet, got {path}.")
        network = restored.network
        self.path = path
        self.combine: Combine = network.combine if isinstance(network, EnsembleNet) else "logits"
        self.task: Task = restored.task
        self.classes = restored.classes or [str(label) for label in range(restored.num_classes())]
        self.count = 0
        self._writer: Any = None

    def __enter__(self) -> PredictionFile:
        self._aside = aside(self.path)
        self._unfinished = self._aside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()
        elif error[0] is None:
            empty = DataError(f"There is no example to predict; {self.path} was not written.")
            self._aside.__exit__(DataError, empty, None)
            raise empty
        self._aside.__exit__(*error)

    def write(self, ids: Sequence[str], head_outputs: Tensor, labels: Tensor | None = None) -> None:
        """Add N examples.

        Args:
            ids: of the examples.
            head_outputs: logits, (K, N, C).
            labels: the true classes, (N,), in all calls or in none.
        """
        table = self._table(ids, head_outputs, labels)
        if self._writer is None:
            kind = pcsv.CSVWriter if self.path.suffix == ".csv" else pq.ParquetWriter
            self._writer = kind(self._unfinished, table.schema)
        self._writer.write_table(table)
        self.count += len(ids)

    def _table(self, ids: Sequence[str], head_outputs: Tensor, labels: Tensor | None) -> pa.Table:
        probabilities = self._probabilities(combine_heads(head_outputs, self.combine, self.task))
        predicted = probabilities.argmax(1)
        of_heads = self._probabilities(head_outputs)[:, torch.arange(len(ids)), predicted]
        votes = head_outputs.argmax(2)
        pairs = max(1, len(votes) * (len(votes) - 1))
        columns = {"id": pa.array(ids, pa.string())}
        if labels is not None:
            columns["label"] = self._names(labels)
        columns |= {
            "predicted": self._names(predicted),
            "probability": _floats(probabilities.amax(1)),
            "spread": _floats(of_heads.std(0, correction=0)),
            "disagreement": _floats((votes[:, None] != votes).sum((0, 1)) / pairs),
        }
        if self.path.suffix == ".csv":
            names = [*columns, *(f"p_{name}" for name in self.classes)]  # two classes may have one name
            return pa.table([*columns.values(), *map(_floats, probabilities.unbind(1))], names)
        columns["probabilities"] = pa.FixedSizeListArray.from_arrays(
            _floats(probabilities.flatten()), len(self.classes)
        )
        return pa.table(columns, metadata={"classes": json.dumps(self.classes)})

    def _probabilities(self, z: Tensor) -> Tensor:
        return z.softmax(-1) if self.task == "multiclass" else z.sigmoid()

    def _names(self, classes: Tensor) -> pa.Array:
        return pa.array([self.classes[c] for c in classes.tolist()], pa.string())


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.float().contiguous().numpy())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemblenet predict",
        description="Predict examples with a trained network: those of --data, or without it a split of the data that "
        "the network was trained on.",
        epilog="The file has a row for each example: id, label where it is known, predicted class, its probability, "
        "the spread of that probability over heads, the share of pairs of heads that disagree, and the probabilities "
        "of all classes. For files of YouTube-8M it is instead the CSV file of a submission to the challenge.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--output", type=Path, required=True, help="the .csv or .parquet file to create")
    parser.add_argument(
        "--data",
        nargs="+",
        help="images or videos: files or folders. TFRecord files of YouTube-8M: files, folders or patterns such as "
        "'test*.tfrecord', remote ones too",
    )
    parser.add_argument(
        "--batch-size", type=positive_integer, default=64, help="of --data, examples at once (default: %(default)s)"
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=2,
        help="processes that read images or videos; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--on-broken", choices=("error", "skip"), default="error", help="for broken examples (default: %(default)s)"
    )
    parser.add_argument("--on-damage", choices=("error", "skip"), help=argparse.SUPPRESS)  # its name in version 0.1
    split = parser.add_argument_group("without --data")
    split.add_argument("--split", choices=("val", "test"), default="test", help="which one (default: %(default)s)")
    add_data_options(split)
    tags = parser.add_argument_group("for YouTube-8M")
    tags.add_argument("--top", type=positive_integer, default=20, help="classes a video (default: %(default)s)")
    tags.add_argument(
        "--sample-frames",
        action="store_true",
        help="for a saved model of frames: spread its frames over the whole video; a run's folder knows this itself",
    )
    return parser
