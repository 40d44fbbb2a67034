"""Data that is damaged in hundreds of ways: read, counted and skipped, or refused in one line, soon."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from commands import run_apart, script
from made_images import encoded, make_folders, make_tars

from ensemblenet.data.image_sets import open_images
from ensemblenet.data.video_sets import find_videos
from ensemblenet.errors import DataError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "damaged_data.py"


def test_damage_is_skipped_or_refused_in_one_line(tmp_path: Path) -> None:
    """The script's short form: no traceback, no hang, no memory."""
    done = run_apart(tmp_path / "printed", script, SCRIPT, "--count", "100")
    assert done.code == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 14
    for line in lines:
        assert line["same values"] < 90, line  # there was damage, and it was seen
        assert line["seconds"] < 5
        assert line["MB"] < 200


def headers(data: bytes) -> list[int]:
    """Where those of files begin."""
    begins = range(0, len(data), 512)
    return [at for at in begins if data[at + 257 : at + 262] == b"ustar" and data[at + 156 : at + 157] == b"0"]


@pytest.mark.parametrize("size", [-1, -512, -1024, -2048])
def test_a_negative_size_in_a_tar_is_refused(tmp_path: Path, size: int) -> None:
    """Python's own reader goes back to an earlier header for ever."""
    path = make_tars(tmp_path) / "train.tar"
    data = bytearray(path.read_bytes())
    begin = headers(data)[6]
    data[begin + 124 : begin + 136] = size.to_bytes(12, "big", signed=True)
    data[begin + 148 : begin + 156] = b" " * 8
    data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])
    path.write_bytes(data)
    with pytest.raises(DataError, match="negative size"):
        open_images(tmp_path, "", "train", None, True, {})


@pytest.mark.parametrize("other", [b"\0", b"x"])
def test_files_behind_a_damaged_header_of_a_tar_are_not_lost_in_silence(tmp_path: Path, other: bytes) -> None:
    """A header of zeros looks like the end of the tar."""
    path = make_tars(tmp_path) / "train.tar"
    data = bytearray(path.read_bytes())
    begin = headers(data)[6] - 1024  # before it lie a header of its own for the exact time, and that one's text
    data[begin : begin + 512] = other * 512
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"follow byte {begin:,}"):
        open_images(tmp_path, "", "train", None, True, {})


def test_a_tar_without_its_end_is_told(tmp_path: Path) -> None:
    path = make_tars(tmp_path) / "train.tar"
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    os.truncate(path, end)
    with pytest.warns(UserWarning, match=r"train\.tar has no end mark"):
        assert len(open_images(tmp_path, "", "train", None, True, {})) == 24


def test_a_link_to_itself_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    make_folders(tmp_path, train=1)
    for place in (tmp_path / "train" / "loop.png", tmp_path / "train" / "cat" / "loop.png"):
        place.symlink_to(place)
    images = open_images(tmp_path, "", "train", None, True, {})
    assert len(images) == 4
    with pytest.raises(DataError, match=r"cat/loop\.png cannot be decoded"):
        images.image(1)


def test_lines_of_any_length_are_read_in_time(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encoded(0, 0))
    lines = ["a.mp4 cat", "n" * 300 + ".mp4 cat", "d/" * 3000 + "b.mp4 cat", "a.mp4" + " " * 200_000 + ";"]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    found = find_videos(tmp_path, "train.txt")
    assert (found.labels, found.missing) == (["cat", ";"], 2)
