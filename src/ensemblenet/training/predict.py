"""The command `predict`: tag videos, and write the predictions as the YouTube-8M challenge wants them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ensemblenet.cli import positive_integer
from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.tfrecord import find_shards, index_shards
from ensemblenet.data.youtube8m import FrameLevel, VideoBatch, VideoLevel, make_level
from ensemblenet.errors import LoadError
from ensemblenet.training.restore import Restored, restore
from ensemblenet.training.run import aside

__all__ = ["predict", "submission_rows"]

HEADER = "VideoId,LabelConfidencePairs"
_READS = ("level", "features", "num_classes", "num_frames", "sample_frames")


def predict(arguments: Sequence[str]) -> Path:
    """Tag the videos of TFRecord files and write a CSV file.

    Args:
        arguments: command-line arguments.

    Returns:
        The file.

    Raises:
        LoadError: there is no model to load.
        DataError: files that are missing, damaged or of another level.
        FileExistsError: the file to write exists.
    """
    options = _parser().parse_args(arguments)
    if options.output.exists():
        raise FileExistsError(f"{options.output} exists; --output needs a new file.")
    restored = restore(options.model)
    network, level = restored.network, _level(restored, options.sample_frames)
    shards = index_shards(find_shards(options.data), options.on_damage)
    loader = RecordLoader(shards, level.decode, Share(options.batch_size, num_workers=1), options.on_damage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = track(loader, "Tagging videos", total=len(loader), transient=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with aside(options.output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(f"{HEADER}\n")
        file.writelines(f"{row}\n" for row in submission_rows(network.to(device), batches, options.top, device))
    skipped = f", {loader.skipped:,} damaged records skipped" if loader.skipped else ""
    Console().print(f"{loader.total:,} videos{skipped}: {options.output}", highlight=False, soft_wrap=True)
    return options.output


def submission_rows(
    network: nn.Module, batches: Iterable[VideoBatch], top: int = 20, device: torch.device | None = None
) -> Iterator[str]:
    """A line for each video: its id, and its best classes with their probabilities, the best first.

    Args:
        network: gives logits (N, C), in evaluation mode.
        batches: of N videos.
        top: how many classes to name.
        device: where the network is.

    Example:
        >>> batch = VideoBatch(["ab12"], torch.tensor([[0.0, 2.0, -1.0]]), torch.zeros(1, 3))
        >>> list(submission_rows(nn.Identity(), [batch], top=2))
        ['ab12,1 0.880797 0 0.5']
    """
    for ids, inputs, _ in batches:
        with torch.inference_mode():
            best = network(inputs.to(device)).float().topk(top, dim=1)
        for video, classes, logits in zip(ids, best.indices.tolist(), best.values.sigmoid().tolist(), strict=True):
            yield f"{video}," + " ".join(f"{label} {p:.6g}" for label, p in zip(classes, logits, strict=True))


def _level(restored: Restored, sample_frames: bool) -> VideoLevel | FrameLevel:
    """What reads the inputs of a network."""
    if restored.config is None:
        return _level_of_shape(restored, sample_frames)
    data = restored.config["data"]
    if not data["class_path"].endswith(".YouTube8M"):
        raise LoadError(f"{restored.folder} was trained on {data['class_path']}, not on YouTube8M.")
    return make_level(**{name: data["init_args"][name] for name in _READS})


def _level_of_shape(restored: Restored, sample_frames: bool) -> VideoLevel | FrameLevel:
    shape = restored.input_shape
    frames = {} if len(shape) == 1 else {"num_frames": shape[0], "sample_frames": sample_frames}
    level = make_level("frame" if frames else "video", num_classes=restored.num_classes(), **frames)
    if level.input_shape != shape:
        raise LoadError(
            f"{restored.folder} takes inputs of shape {shape}, which are not the features of YouTube-8M; give the "
            "folder of its run instead, whose configuration names its features."
        )
    return level


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemblenet predict",
        description="Tag the videos of YouTube-8M files, and write the CSV file of a submission to the challenge. It "
        "needs a trained model and TFRecord files of the level that it was trained on.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder of a run of `fit`, or a saved model")
    parser.add_argument(
        "--data", nargs="+", required=True, help="files, patterns such as 'test*.tfrecord', or folders; remote ones too"
    )
    parser.add_argument("--output", type=Path, required=True, help="the CSV file to create")
    parser.add_argument("--top", type=positive_integer, default=20, help="classes a video (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive_integer, default=256, help="videos at once (default: %(default)s)"
    )
    parser.add_argument(
        "--on-damage", choices=("error", "skip"), default="error", help="for damaged records (default: %(default)s)"
    )
    parser.add_argument(
        "--sample-frames",
        action="store_true",
        help="for a saved model of frames: spread its frames over the whole video; a run's folder knows this itself",
    )
    return parser
