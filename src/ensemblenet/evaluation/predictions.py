"""What a trained network says of examples, and how far its heads agree, as a table in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ensemblenet._moved import renamed
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import DataError, LoadError
from ensemblenet.evaluation.scoring import Split
from ensemblenet.functional import Combine, Task, combine_heads, head_spread
from ensemblenet.metrics.diversity import disagreement
from ensemblenet.storage.atomic import atomic_path
from ensemblenet.storage.cells import as_cell
from ensemblenet.storage.restore import Restored

__all__ = ["Names", "PredictionFile"]


__getattr__ = renamed(__name__, {"predict": "ensemblenet.cli.predict.predict"})


@runtime_checkable
class Names(Protocol):
    """A data module whose examples have names."""

    def example_name(self, split: Split, place: int) -> str:
        """What to call an example, such as its file, after `setup`."""
        ...


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

    In CSV files texts that a spreadsheet would run as formulas have a quote in front.

    Args:
        path: to create; it is there only once it is complete.
        restored: the network, which knows task and classes.

    Raises:
        LoadError: the suffix is of neither format.
        DataError: at the end, if nothing was written.

    Example:
        >>> import tempfile
        >>> from ensemblenet.inputs import Inputs
        >>> inputs = Inputs.of(torch.zeros(1, 4))
        >>> restored = Restored(torch.nn.Linear(4, 2), "multiclass", inputs, {"classes": ["cat", "dog"]}, None, Path())
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
        self._open = ExitStack()
        self._unfinished = self._open.enter_context(atomic_path(self.path))
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._open.callback(self._refuse_empty)
        self._open.__exit__(*error)  # the writer, which may find the disk full as well, before the file gets its name

    def _refuse_empty(self) -> None:
        if self._writer is None:
            raise DataError(f"There is no example to predict; {self.path} was not written.")

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
            self._writer = self._open.enter_context(kind(self._unfinished, table.schema))
        self._writer.write_table(table)
        self.count += len(ids)

    def _table(self, ids: Sequence[str], head_outputs: Tensor, labels: Tensor | None) -> pa.Table:
        probabilities = self._probabilities(combine_heads(head_outputs, self.combine, self.task))
        predicted = probabilities.argmax(1)
        columns = {"id": pa.array([self._text(name) for name in ids], pa.string())}
        if labels is not None:
            columns["label"] = self._names(labels)
        columns |= {
            "predicted": self._names(predicted),
            "probability": _floats(probabilities.amax(1)),
            "spread": _floats(head_spread(head_outputs, self.task)[torch.arange(len(ids)), predicted]),
            "disagreement": _floats(disagreement(head_outputs.argmax(2))),
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
        return pa.array([self._text(self.classes[c]) for c in classes.tolist()], pa.string())

    def _text(self, text: str) -> str:
        text = text.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
        return as_cell(text) if self.path.suffix == ".csv" else text


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.float().contiguous().numpy())
