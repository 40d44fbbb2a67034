"""Labelled videos in the layouts that downloaders of Kinetics leave: annotations, lists and class folders."""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemblenet.data.classes import in_order
from ensemblenet.data.views import Span
from ensemblenet.errors import DataError

__all__ = ["VIDEO_SUFFIXES", "LabelledVideos", "find_videos", "order_of_labels"]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_COLUMNS = {"label", "youtube_id"}


@dataclass(frozen=True)
class LabelledVideos:
    """Videos of one split.

    Args:
        where: name of the split, for messages.
        paths: N files.
        labels: N names of classes.
        spans: N pairs of seconds, where an annotation names them, else None.
        missing: number of videos that the annotation or list names and that do not exist.
    """

    where: str
    paths: list[Path]
    labels: list[str]
    spans: list[Span | None]
    missing: int = 0


def find_videos(folder: Path, split: str) -> LabelledVideos:
    """Find the videos of a split, in any of the layouts.

    Args:
        folder: of the data.
        split: an annotation of Kinetics within it (`train.csv` with the columns `label`, `youtube_id` and, for most
            downloaders, `time_start` and `time_end`), a list with a line `PATH LABEL` for each video, or a folder of
            class folders. Files that an annotation names are looked for in all of `folder`, as
            `ID_000010_000020.mp4` or `ID.mp4`, in the class's folder if there are several; class folders may have
            underscores for spaces, and lack quotes and brackets. Some videos of Kinetics are gone for ever, so missing
            ones are counted.

    Raises:
        DataError: there is no such split, a line of it is malformed, or none of its videos exists.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "train" / "high_jump").mkdir(parents=True)
        >>> (folder / "train" / "high_jump" / "a.mp4").touch()
        >>> find_videos(folder, "train").labels
        ['high jump']
    """
    place = Path(folder, split)
    if place.is_dir():
        found = _of_class_folders(place)
    elif not place.is_file():
        raise DataError(f"{place} is neither a folder of class folders nor a file that lists videos.")
    else:
        lines = place.read_text(encoding="utf-8").splitlines()
        header = set(next(csv.reader(lines[:1]), []))
        found = _of_annotation(place, lines, folder) if header >= _COLUMNS else _of_list(place, lines)
    if not found.paths:
        raise DataError(f"None of the {found.missing:,} videos of {place} is in {folder}.")
    return found


def _of_class_folders(place: Path) -> LabelledVideos:
    paths = sorted(path for path in place.glob("*/*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not paths:
        raise DataError(f"{place} holds no class folders with videos ({', '.join(VIDEO_SUFFIXES)}).")
    return LabelledVideos(str(place), paths, [_class_name(path.parent.name) for path in paths], [None] * len(paths))


def _of_annotation(place: Path, lines: Sequence[str], folder: Path) -> LabelledVideos:
    by_name: dict[str, list[Path]] = defaultdict(list)
    walk = os.walk(folder, followlinks=True)  # videos often lie on another disk
    for path in sorted(Path(parent, name) for parent, _, names in walk for name in names):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            by_name[path.stem].append(path)
    paths, labels, spans, missing = [], [], [], 0
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            start, end, label = row.get("time_start"), row.get("time_end"), _class_name(row["label"])
            span = (float(start), float(end)) if start and end else None
            files = [path for name in _file_names(row["youtube_id"], span) for path in by_name.get(name, ())]
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{place}, line {number} is no row of Kinetics: {error}") from error
        own = [path for path in files if _plain(path.parent.name) == _plain(label)] or files
        if own:
            paths.append(own[0])
            labels.append(label)
            spans.append(span)
        missing += not own
    return LabelledVideos(str(place), paths, labels, spans, missing)


def _file_names(video: str, span: Span | None) -> list[str]:
    """The names that downloaders give to a clip, the more specific one first."""
    if not video:
        raise ValueError("youtube_id is empty.")
    return [*([f"{video}_{int(span[0]):06d}_{int(span[1]):06d}"] if span else []), video]


def _of_list(place: Path, lines: Sequence[str]) -> LabelledVideos:
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().replace("\t", " ").rpartition("," if "," in line else " ")
        if not path.strip() or not label.strip():
            raise DataError(f"{place}, line {number} must be a path and a label, got {line!r}.")
        paths.append(place.parent / path.strip())
        labels.append(_class_name(label))
    kept = [k for k, path in enumerate(paths) if path.is_file()]
    missing = len(paths) - len(kept)
    return LabelledVideos(str(place), [paths[k] for k in kept], [labels[k] for k in kept], [None] * len(kept), missing)


def _class_name(name: str) -> str:
    return name.strip().strip('"').replace("_", " ")


def _plain(name: str) -> str:
    """A class's name without the characters that downloaders leave out of the names of folders."""
    return re.sub(r"[^\w\s-]", "", _class_name(name)).lower()


def order_of_labels(names: Sequence[str]) -> list[str]:
    """The classes of labels, each once, in the usual order of Kinetics: by number if all are numbers, else by name.

    Example:
        >>> order_of_labels(["10", "9", "10"]), order_of_labels(["run", "Swim", "run"])
        (['9', '10'], ['Swim', 'run'])
    """
    return in_order(names) if all(name.isdecimal() for name in names) else sorted(set(names))
