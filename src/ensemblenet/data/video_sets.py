"""Labelled videos in the layouts that downloaders of Kinetics leave: annotations, lists and class folders."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from ensemblenet.data.classes import class_name, in_order
from ensemblenet.data.listing import class_folders, find_in, find_shards
from ensemblenet.data.remote import MissingError, RemoteFile, in_threads, joined, remote_file
from ensemblenet.data.tars import TarFile, by_class, files_of_tar
from ensemblenet.data.video import VideoFile
from ensemblenet.data.views import Span
from ensemblenet.errors import DataError

__all__ = ["VIDEO_SUFFIXES", "LabelledVideos", "find_videos", "order_of_labels"]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_LABEL = ".cls"
_NEEDED = ("label", "youtube_id")
_COLUMNS = {*_NEEDED, "time_start", "time_end"}

# A line of a list. A path ends with a suffix that videos have; another one ends at the first tab, else at the last
# comma or semicolon, else at the last space. Several numbers are other columns, no label.
_SUFFIXES = "|".join(re.escape(suffix) for suffix in VIDEO_SUFFIXES)
_LINES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf'"?(?P<path>.+(?:{_SUFFIXES}))"?(?:\s*(?=[\t,;]))?(?P<between>[\s,;])\s*(?P<label>[^\s,;].*)',
        r"(?P<path>[^\t]+)(?P<between>\t)\s*(?P<label>.+)",
        r"(?P<path>.+)(?P<between>[,;])(?P<label>.+)",
        r"(?P<path>.+)(?P<between> )(?P<label>.+)",
    )
]
_NUMBERS = re.compile(r"[\d.]+([\s,;]+[\d.]+)+")


@dataclass(frozen=True)
class LabelledVideos:
    """Videos of one split.

    Args:
        where: name of the split, for messages.
        paths: N files.
        labels: N names of classes.
        spans: N pairs of seconds, where an annotation names them, else None.
        missing: number of videos that the annotation or list names and that do not exist.
        example: the first of these that was looked for, for messages.
    """

    where: str
    paths: list[VideoFile]
    labels: list[str]
    spans: list[Span | None]
    missing: int = 0
    example: str = ""


def find_videos(folder: Path | str, split: str, fit: bool = True) -> LabelledVideos:
    """Find the videos of a split, in any of the layouts.

    Args:
        folder: of the data, or its URL.
        split: an annotation of Kinetics within it (`train.csv` with the columns `label`, `youtube_id` and, for most
            downloaders, `time_start` and `time_end`), a list with a line `PATH LABEL` for each video, or a folder of
            class folders. Files that an annotation names are looked for in all of `folder`, as
            `ID_000010_000020.mp4` or `ID.mp4`, in the class's folder if there are several; class folders may have
            underscores for spaces, and lack quotes and brackets. Some videos of Kinetics are gone for ever, so missing
            ones are counted. Or a pattern of tars, such as `train-{000..099}.tar`: of class folders, or with a label
            in `.cls` beside each video. Videos that an annotation names may lie in tars, too, and at a URL they must;
            those of a list may be URLs.
        fit: whether tars at a URL must all fit on this machine at once.

    Raises:
        DataError: there is no such split, a line of it is malformed, or none of its videos exists.
        FetchError: a server fails.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "train" / "high_jump").mkdir(parents=True)
        >>> (folder / "train" / "high_jump" / "a.mp4").touch()
        >>> find_videos(folder, "train").labels
        ['high jump']
    """
    place = joined(folder, split)
    if split.endswith(".tar"):
        found = _of_tars(place, find_shards(folder, split, fit))
    elif isinstance(place, Path) and place.is_dir():
        found = _of_class_folders(place)
    elif isinstance(place, Path) and not place.is_file():
        raise DataError(f"{place} is neither a folder of class folders nor a file that lists videos.")
    else:
        text = _text_of(place)
        try:
            header, separator = _header_of(text)
            found = _of_annotation(place, text, header, separator, folder, fit) if header else _of_list(place, text)
        except csv.Error as error:
            raise DataError(f"{place} cannot be read: {error}.") from error
    if not found.paths:
        raise DataError(f"None of the {found.missing:,} videos of {place} is there: no {found.example}.")
    return found


def _of_class_folders(place: Path) -> LabelledVideos:
    by_class = class_folders(place, VIDEO_SUFFIXES)
    videos = sorted((path, _class_name(name)) for name, paths in by_class.items() if name for path in paths)
    if not videos:
        raise DataError(f"{place} holds no class folders with videos ({', '.join(VIDEO_SUFFIXES)}).")
    paths, labels = map(list, zip(*videos, strict=True))
    return LabelledVideos(str(place), paths, labels, [None] * len(paths))


def _of_tars(place: Path | str, tars: Sequence[Path | RemoteFile]) -> LabelledVideos:
    """Videos in class folders, or each with its label beside it."""
    files = [
        file for found in in_threads(lambda tar: files_of_tar(tar, VIDEO_SUFFIXES, _LABEL), tars) for file in found
    ]
    labels = {(file.tar, _stem(file)): file.text for file in files if file.name.endswith(_LABEL)}
    videos = [file for file in files if not file.name.endswith(_LABEL)]
    if labels:
        if bare := [file for file in videos if (file.tar, _stem(file)) not in labels]:
            raise DataError(f"{bare[0]} has no label: some videos have one in a file *{_LABEL} beside them.")
        named = [(file, _class_name(labels[file.tar, _stem(file)])) for file in videos]
    else:
        by_name = by_class(videos)
        named = [(file, _class_name(name)) for name, found in by_name.items() if name for _, file in found]
    if not named:
        raise DataError(f"{place} holds neither class folders with videos nor videos with labels in *{_LABEL}.")
    paths, names = map(list, zip(*named, strict=True))
    return LabelledVideos(str(place), paths, names, [None] * len(paths))


def _stem(file: TarFile) -> str:
    return str(PurePosixPath(file.name).with_suffix(""))


def _text_of(place: Path | str) -> str:
    """The text of a list, in UTF-8, or in UTF-16 as spreadsheets store it."""
    with place.open("rb") if isinstance(place, Path) else remote_file(place).open() as file:
        data = file.read()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].split(b"\n")
        where = f"{place}, line {len(before)}, column {len(before[-1]) + 1}"
        raise DataError(
            f"{where}: is no text in {encoding[:6].upper().rstrip('-')}; store the file in UTF-8."
        ) from error


def _header_of(text: str) -> tuple[list[str], str]:
    """The columns of an annotation and what separates them; no columns if the first line is a video's."""
    first = next(io.StringIO(text, newline=None), "")
    names = {
        separator: [
            name.strip().lower().replace(" ", "_") for name in next(csv.reader([first], delimiter=separator), [])
        ]
        for separator in ",;\t"
    }
    separator = max(names, key=lambda separator: len(_COLUMNS & set(names[separator])))
    found = names[separator]
    is_header = _COLUMNS & set(found) and not any(name.endswith(VIDEO_SUFFIXES) for name in found)
    return found if is_header else [], separator


def _videos_in(folder: Path | str, fit: bool) -> Iterator[tuple[PurePath, VideoFile]]:
    """All videos of a folder, in tars of it too, by their places in it; at a URL those in tars alone."""
    tars: Sequence[Path | RemoteFile]
    if isinstance(folder, Path):
        files = find_in(folder, (*VIDEO_SUFFIXES, ".tar"))
        tars = [path for path in files if path.suffix.lower() == ".tar"]
        yield from ((path, path) for path in files if path.suffix.lower() != ".tar")
    else:
        tars = find_shards(folder, "*.tar", fit)
    for found in in_threads(lambda tar: files_of_tar(tar, VIDEO_SUFFIXES), tars):
        yield from ((PurePosixPath(file.name), file) for file in found)


def _of_annotation(
    place: Path | str, text: str, header: Sequence[str], separator: str, folder: Path | str, fit: bool
) -> LabelledVideos:
    if missing := [name for name in _NEEDED if name not in header]:
        raise DataError(
            f"{place} has no column {missing[0]}; it has {', '.join(header)}. (A list of videos has no header.)"
        )
    by_name: dict[str, list[tuple[PurePath, VideoFile]]] = defaultdict(list)
    for path, file in _videos_in(folder, fit):
        by_name[path.stem].append((path, file))
    paths, labels, spans, missing_ids = [], [], [], []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    next(rows)
    for cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{place}, line {rows.line_num}"
        if any(cell.strip() for cell in cells[len(header) :]):
            raise DataError(
                f"{where} has {len(cells)} columns, and the header {len(header)}; quote a {separator!r} in a cell."
            )
        row = dict.fromkeys(header, "") | dict(zip(header, map(str.strip, cells), strict=False))
        span, label, video = _span(where, row), _class_name(row["label"]), row["youtube_id"]
        if not video or not label:
            raise DataError(f"{where}: {'label' if video else 'youtube_id'} is empty.")
        files = [found for name in _file_names(video, span) for found in by_name.get(name, ())]
        if own := [found for found in files if _plain(found[0].parent.name) == _plain(label)] or files:
            paths.append(own[0][1])
            labels.append(label)
            spans.append(span)
        else:
            missing_ids.append(_file_names(video, span)[0])
    example = f"{missing_ids[0]}{VIDEO_SUFFIXES[0]} anywhere in {folder}" if missing_ids else ""
    return LabelledVideos(str(place), paths, labels, spans, len(missing_ids), example)


def _span(where: str, row: Mapping[str, str]) -> Span | None:
    """The seconds of a clip, if its row has them."""
    seconds = []
    for column in ("time_start", "time_end"):
        text = row.get(column, "")
        try:
            seconds.append(float(text) if text else None)
        except ValueError:
            raise DataError(f"{where}: {column} must be seconds, got {text!r}.") from None
    start, end = seconds
    if start is None or end is None:
        return None
    if not 0 <= start <= end < math.inf:
        raise DataError(f"{where}: time_start and time_end must be ascending seconds, got {start:g} and {end:g}.")
    return start, end


def _file_names(video: str, span: Span | None) -> list[str]:
    """The names that downloaders give to a clip, the more specific one first."""
    return [*([f"{video}_{int(span[0]):06d}_{int(span[1]):06d}"] if span else []), video]


def _of_list(place: Path | str, text: str) -> LabelledVideos:
    named = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        found = next((match for pattern in _LINES if (match := pattern.fullmatch(line.strip()))), None)
        label = found["label"].strip() if found else ""
        has_more = found and found["between"] != " " and found["between"] in label and label[:1] != '"'
        if found is None or not _class_name(label) or has_more or _NUMBERS.fullmatch(label):
            raise DataError(f"{place}, line {number} must be a path and a label, got {line.strip()!r}.")
        parent = place.parent if isinstance(place, Path) else place.rpartition("/")[0]
        named.append((joined(parent, found["path"].strip()), _class_name(label)))
    files = in_threads(_existing, [path for path, _ in named], "Looking for videos")
    paths = [file for file in files if file is not None]
    labels = [label for (_, label), file in zip(named, files, strict=True) if file is not None]
    missing = [path for (path, _), file in zip(named, files, strict=True) if file is None]
    example = str(missing[0]) if missing else ""
    return LabelledVideos(str(place), paths, labels, [None] * len(paths), len(missing), example)


def _existing(path: Path | str) -> VideoFile | None:
    """The file of a list's line, if it is there."""
    if isinstance(path, str):
        with suppress(MissingError):
            return remote_file(path)
        return None
    # names with accents have two spellings, of which a copy from another system may have the other
    spellings = [path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))]
    return next((spelt for spelt in spellings if os.path.isfile(spelt)), None)


def _class_name(name: str) -> str:
    name = name.strip()
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1].replace('""', '"')
    return class_name(name.replace("_", " ")).strip()


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
