"""TFRecord files: found, indexed, read, and refused."""

from __future__ import annotations

import gzip
import re
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shards import framed, serialized, videos, write
from tfrecord.writer import TFRecordWriter

from ensemblenet.data.tfrecord import find_shards, index_shard, index_shards
from ensemblenet.errors import DataError

RECORDS = [b"first", b"", b"the third" * 1000]


@pytest.fixture(params=["x.tfrecord", "x.tfrecord.gz"])
def path(request, tmp_path):
    return write(tmp_path / request.param, RECORDS)


def test_records_come_back_in_order_with_their_offsets(path: Path) -> None:
    shard = index_shard(str(path))
    assert len(shard) == 3
    found = list(shard.read())
    assert [record.data for record in found] == RECORDS
    assert [record.offset for record in found] == [0, 16 + 5, 2 * 16 + 5]
    assert [record.data for record in shard.read(1, 2)] == RECORDS[1:2]
    assert list(shard.read(2, 2)) == []


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "x.tfrecord").touch()
    assert len(index_shard(str(tmp_path / "x.tfrecord"))) == 0


def test_files_are_found_by_folder_pattern_and_name(tmp_path: Path) -> None:
    for name in ("a0.tfrecord", "a1.tfrecord.gz", "b0.tfrecord", "notes.txt"):
        write(tmp_path / name, RECORDS)
    names = [path.rsplit("/", 1)[1] for path in find_shards(str(tmp_path))]
    assert names == ["a0.tfrecord", "a1.tfrecord.gz", "b0.tfrecord"]
    assert find_shards(["a?.tfrecord*", "b0.tfrecord"], str(tmp_path)) == find_shards(str(tmp_path))
    assert find_shards(str(tmp_path / "*0.tfrecord")) == [str(tmp_path / f"{x}0.tfrecord") for x in "ab"]


def test_remote_files_are_read_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/x0.tfrecord", b"".join(map(framed, RECORDS)))
    memory.pipe("/bucket/x1.tfrecord", framed(b"more"))
    paths = find_shards("x*.tfrecord", "memory://bucket")
    assert all(path.startswith("memory://") for path in paths)
    shards = index_shards(paths)
    assert [record.data for shard in shards for record in shard.read()] == [*RECORDS, b"more"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}", r"No files match /.*; give a file, a pattern, or a folder of \.tfrecord"),
        ("{folder}/*.tfrecord", r"No files match .*/\*\.tfrecord"),
        ("{folder}/missing.tfrecord", "No files match .*/missing.tfrecord"),
        ("nosuch://x/*.tfrecord", "nosuch://x/.* cannot be opened: .*nosuch"),
    ],
)
def test_patterns_without_files(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=message):
        find_shards(pattern.format(folder=tmp_path))


@pytest.mark.parametrize("content", [b"x" * 100, b"\x1f\x8b" + b"z" * 50])
@pytest.mark.parametrize("on_broken", ["error", "skip"])
def test_a_file_of_another_format_is_always_an_error(tmp_path: Path, content: bytes, on_broken: str) -> None:
    (tmp_path / "x.tfrecord").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tfrecord is not a TFRecord file"):
        index_shard(str(tmp_path / "x.tfrecord"), on_broken)


def test_a_file_that_only_its_name_makes_gzip(tmp_path: Path) -> None:
    (tmp_path / "x.tfrecord.gz").write_bytes(b"".join(map(framed, RECORDS)))
    with pytest.raises(DataError, match=r"x\.tfrecord\.gz cannot be read: .*gzip"):
        index_shard(str(tmp_path / "x.tfrecord.gz"))


@pytest.mark.parametrize("cut", [1, 4, 7000, 9016 - 12, 9016 - 5])
def test_a_truncated_file_names_the_record(path: Path, cut: int) -> None:
    data = fsspec.open(str(path), compression="infer").open().read()
    path = path.with_name("cut.tfrecord")
    path.write_bytes(data[:-cut])
    with pytest.raises(DataError, match=r"cut\.tfrecord: the record at byte 37 is truncated"):
        index_shard(str(path))
    with pytest.warns(UserWarning, match=r"byte 37 is truncated.*The rest of the file is left out"):
        shard = index_shard(str(path), "skip")
    assert [record.data for record in shard.read()] == RECORDS[:2]


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tfrecord.gz", [np.random.default_rng(0).bytes(5000)] * 2)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"x\.tfrecord\.gz cannot be read: .*end-of-stream"):
        index_shard(str(path))


@pytest.mark.parametrize("length", [2**28 + 1, 5 * 2**30, 2**63, 2**64 - 1])
@pytest.mark.parametrize("name", ["x.tfrecord", "x.tfrecord.gz"])
def test_a_record_that_claims_too_much(tmp_path: Path, length: int, name: str) -> None:
    header = length.to_bytes(8, "little")
    data = framed(b"first") + header + TFRecordWriter.masked_crc(header) + bytes(2**20)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=rf"the record at byte 21 claims {length:,} bytes; up to 268,435,456 are read"):
        index_shard(str(tmp_path / name))


@pytest.mark.parametrize("position", [0, 5, 8, 11])
def test_a_damaged_header(tmp_path: Path, position: int) -> None:
    data = bytearray(b"".join(map(framed, RECORDS)))
    data[37 + position] ^= 1
    (tmp_path / "x.tfrecord").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tfrecord: the header at byte 37 is damaged"):
        index_shard(str(tmp_path / "x.tfrecord"))


@pytest.mark.parametrize("position", [12, 300, 9012, 9015])
def test_damaged_data_is_an_error_or_passed_over(tmp_path: Path, position: int) -> None:
    data = bytearray(b"".join(map(framed, [*RECORDS, b"last"])))
    data[37 + position] ^= 1
    (tmp_path / "x.tfrecord").write_bytes(data)
    shard = index_shard(str(tmp_path / "x.tfrecord"))
    with pytest.raises(DataError, match=re.escape("the record at byte 37 is damaged: its checksum does not fit")):
        list(shard.read())
    with pytest.warns(UserWarning, match="byte 37 is damaged.*Skipped"):
        found = list(shard.read(on_broken="skip"))
    assert [record and record.data for record in found] == [b"first", b"", None, b"last"]


def test_whole_files_give_no_warning(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(index_shard(str(path), "skip").read(on_broken="skip"))


def test_official_records_read_as_they_were_written(tmp_path: Path) -> None:
    records = [serialized(video) for video in videos(5)]
    assert [r.data for r in index_shard(str(write(tmp_path / "x.tfrecord", records))).read()] == records
