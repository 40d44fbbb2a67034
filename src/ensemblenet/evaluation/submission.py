"""Predictions for YouTube-8M, as the challenge wants them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ensemblenet.data.loading import OnBroken
from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.tfrecord import find_shards, index_shards
from ensemblenet.data.youtube8m_levels import FrameLevel, VideoBatch, VideoLevel, make_level
from ensemblenet.errors import LoadError
from ensemblenet.storage.atomic import atomic_path
from ensemblenet.storage.cells import as_cell
from ensemblenet.storage.restore import Restored

__all__ = ["submission_rows", "write_submission"]

HEADER = "VideoId,LabelConfidencePairs"
_READS = ("level", "features", "num_classes", "num_frames", "sample_frames")


def write_submission(
    restored: Restored,
    paths: Sequence[str],
    output: Path,
    top: int = 20,
    batch_size: int = 256,
    on_broken: OnBroken = "error",
    sample_frames: bool = False,
) -> None:
    """Tag the videos of TFRecord files and write a CSV file.

    Args:
        restored: the network.
        paths: files, patterns or folders.
        output: the file to create.
        top: classes to name for a video.
        batch_size: videos at once.
        on_broken: "error" or "skip", for a damaged record.
        sample_frames: for a saved model of frames: spread its frames over the whole video; a run knows this itself.

    Raises:
        LoadError: a network that does not take the features of YouTube-8M, or an output of another format.
        DataError: files that are missing, damaged or of another level.
    """
    level = _level(restored, sample_frames)
    if output.suffix != ".csv":
        raise LoadError(f"A submission to the challenge is a .csv file, got {output}.")
    shards = index_shards(find_shards(list(paths)), on_broken)
    loader = RecordLoader(shards, level.decode, Share(batch_size, num_workers=1), on_broken)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = track(loader, "Tagging videos", total=len(loader), transient=True)
    with atomic_path(output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(f"{HEADER}\n")
        file.writelines(f"{row}\n" for row in submission_rows(restored.network.to(device), batches, top, device))
    skipped = f", {loader.skipped:,} damaged records skipped" if loader.skipped else ""
    Console().print(f"{loader.total:,} videos{skipped}: {output}", highlight=False, soft_wrap=True)


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
            yield f"{_cell(video)}," + " ".join(f"{label} {p:.6g}" for label, p in zip(classes, logits, strict=True))


def _cell(video: str) -> str:
    """An id as a cell of CSV: quoted if it holds what ends a cell or a line."""
    video = as_cell(video)
    return '"{}"'.format(video.replace('"', '""')) if re.search(r'[,"\r\n]', video) else video


def _level(restored: Restored, sample_frames: bool) -> VideoLevel | FrameLevel:
    """What reads the inputs of a network."""
    if restored.config is None:
        return _level_of_shape(restored, sample_frames)
    data = restored.config["data"]
    if not data["class_path"].endswith(".YouTube8M"):
        raise LoadError(f"{restored.folder} was trained on {data['class_path']}, not on YouTube8M.")
    return make_level(**{name: data["init_args"][name] for name in _READS})


def _level_of_shape(restored: Restored, sample_frames: bool) -> VideoLevel | FrameLevel:
    shape = restored.inputs.shape
    frames = {} if len(shape) == 1 else {"num_frames": shape[0], "sample_frames": sample_frames}
    level = make_level("frame" if frames else "video", num_classes=restored.num_classes(), **frames)
    if level.input_shape != shape:
        raise LoadError(
            f"{restored.folder} takes inputs of shape {shape}, which are not the features of YouTube-8M; give the "
            "folder of its run instead, whose configuration names its features."
        )
    return level
