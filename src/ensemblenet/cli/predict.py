"""The command `predict`: what a trained network says of examples, and how far its heads agree."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ensemblenet.cli.parsers import read
from ensemblenet.data.files import FileReader, InputFiles, file_reader, find_files
from ensemblenet.errors import DataError, LoadError
from ensemblenet.evaluation.predictions import Names, PredictionFile
from ensemblenet.evaluation.scoring import Seen, chosen_data, observe
from ensemblenet.evaluation.submission import write_submission
from ensemblenet.storage.restore import Restored, restore
from ensemblenet.storage.runs import quiet_lightning
from ensemblenet.training.module import seen_outputs

__all__ = ["predict"]

_MOST_LINES = 10


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
    options, changes = read("predict", arguments)
    if options.on_damage:
        warnings.warn("--on-damage is now --on-broken.", DeprecationWarning, stacklevel=2)
        options.on_broken = options.on_damage
    restored = restore(options.model, trust=options.trust)
    if options.data is None:
        _predict_split(restored, options, changes)
    elif changes or options.config or options.class_path:
        raise LoadError("--config and --data.KEY are for the data of a run; they do not go with --data.")
    elif (reader := file_reader(restored.inputs.shape, restored.description)) is not None:
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
    data = chosen_data(restored, options.config, changes, options.class_path)
    name = data.example_name if isinstance(data, Names) else lambda split, place: str(place)
    quiet_lightning()
    with PredictionFile(options.output, restored) as file:

        def saw(seen: Seen) -> None:
            ids = [name(options.split, place) for place in seen.places]
            file.write(ids, seen.outputs, seen.targets if restored.task == "multiclass" else None)

        observe(restored, data, options.split, saw, options.device)
    Console().print(f"{file.count:,} examples: {options.output}", highlight=False, soft_wrap=True)


def _predict_files(restored: Restored, reader: FileReader, options: argparse.Namespace) -> None:
    files = InputFiles(find_files(options.data, reader.suffixes), reader.read)
    batches = files.batches(options.batch_size, options.num_workers)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if options.device == "auto" else options.device)
    network, ndim = restored.network.to(device), len(restored.inputs.shape) + 1
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
