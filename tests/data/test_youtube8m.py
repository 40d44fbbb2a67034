"""YouTube-8M records against what was written, and bad ones."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shards import AUDIO, CLASSES, RGB, example_pb2, serialized, videos, write
from tfrecord.writer import TFRecordWriter

from ensemblenet.data import YouTube8M
from ensemblenet.data.records import RecordLoader, Share
from ensemblenet.data.tfrecord import Record, index_shards
from ensemblenet.data.youtube8m_levels import make_level
from ensemblenet.errors import DataError

FEATURES = {"video": {"mean_rgb": RGB, "mean_audio": AUDIO}, "frame": {"rgb": RGB, "audio": AUDIO}}
FEATURES["segment"] = FEATURES["frame"]


def level(kind, **options):
    return make_level(kind, FEATURES[kind], CLASSES, **options)


def records(made, path="x.tfrecord"):
    data = [video if isinstance(video, bytes) else serialized(video) for video in made]
    return [Record(path, 7 * i, record) for i, record in enumerate(data)]


def decode(kind, made, **options):
    return level(kind, **options).decode(records(made), random.Random(0))


def multi_hot(made):
    targets = torch.zeros(len(made), CLASSES, dtype=torch.int8)
    for target, video in zip(targets, made, strict=True):
        target[video.labels] = 1
    return targets


def dequantised(video):
    """The challenge's definition, in double precision."""
    q = np.concatenate([video.rgb, video.audio], axis=1).astype(np.float64)
    return torch.from_numpy(q * (4 / 255) + 4 / 512 - 2)


def test_videos() -> None:
    made = videos(9)
    batch = decode("video", made)
    assert batch.ids == [video.id for video in made]
    expected = torch.stack([torch.from_numpy(np.concatenate([video.rgb, video.audio])) for video in made])
    assert torch.equal(batch.inputs, expected)
    assert torch.equal(batch.targets, multi_hot(made))


def alike(number, order=("id", "labels", "mean_rgb", "mean_audio")):
    """Records whose features come in one order, as in a file of one writer; every third has more labels."""
    made = []
    for index, video in enumerate(videos(number)):
        labels = [index % CLASSES, (index + 5) % CLASSES][: 1 + (index % 3 == 0)]
        whole = example_pb2.Example.FromString(serialized(replace(video, labels=labels)))
        entries = [
            example_pb2.Example(features={"feature": {name: whole.features.feature[name]}}).features.SerializeToString()
            for name in order
        ]
        body = b"".join(entries)
        made.append(b"\x0a" + bytes([len(body) & 127 | 128, len(body) >> 7]) + body + b"\x12\x00")
    return made


def outcome(decode, *arguments):
    """What decoding gives, to the bit, or the message of its error."""
    try:
        ids, inputs, targets = decode(*arguments)
    except DataError as error:
        return str(error)
    return ids, inputs.dtype, inputs.shape, inputs.numpy().tobytes(), targets.dtype, targets.numpy().tobytes()


def test_videos_of_known_layouts_are_decoded_at_once_and_equal_to_the_bit() -> None:
    reader = level("video")
    made = [
        *alike(12),
        *alike(12, ("mean_rgb", "mean_audio", "id", "labels")),
        *alike(3, ("labels", "id", *FEATURES["video"])),
    ]
    random.Random(0).shuffle(made)
    made = records(made)
    at_once = reader._decode_at_once(made)
    assert at_once is not None
    assert outcome(lambda: at_once) == outcome(reader._decode_each, made)
    assert 3 <= sum(map(len, reader._layouts.values())) <= 12
    backwards = replace(reader, features=dict(reversed(reader.features.items())))
    assert outcome(backwards.decode, made, None) == outcome(backwards._decode_each, made)
    less = replace(reader, features={"mean_audio": AUDIO})  # the other feature's values differ, and matter to nobody
    assert outcome(less.decode, made, None) == outcome(less._decode_each, made)
    assert sum(map(len, less._layouts.values())) == sum(map(len, reader._layouts.values()))


@pytest.mark.parametrize("needs_labels", [False, True])
def test_a_changed_byte_has_the_same_outcome_as_with_the_general_parser(needs_labels: bool) -> None:
    reader = replace(level("video"), needs_labels=needs_labels)
    good = alike(2)
    reader.decode(records(good), random.Random(0))
    outcomes = set()
    for place in range(len(good[1])):
        for change in (1, 2, 8, 128, 255):
            changed = bytearray(good[1])
            changed[place] ^= change
            made = records([good[0], bytes(changed)])
            expected = outcome(reader._decode_each, made)
            assert outcome(reader.decode, made, None) == expected
            outcomes.add(expected if isinstance(expected, str) else "decoded")
    assert len(outcomes) > 20
    assert sum(map(len, reader._layouts.values())) <= 256


def test_records_without_a_layout_are_read_by_the_general_parser() -> None:
    unlabelled = example_pb2.Example.FromString(alike(1)[0])
    del unlabelled.features.feature["labels"]
    unpacked = alike(1)[0].replace(b"\x1a\x04\x0a\x02\x00\x05", b"\x1a\x04\x08\x00\x08\x05")
    assert unpacked != alike(1)[0]
    one_number = [
        unpacked.replace(b"\x08\x00\x08\x05", numbers) for numbers in (b"\x08\x85\x80\x00", b"\x08\x05\x08\x00")
    ]
    many = [of_kinds(labels=example_pb2.Feature(int64_list={"value": range(count)})) for count in (0, 1, CLASSES)]
    for odd in ([unlabelled.SerializeToString()], [unpacked], one_number, many):
        made = records([*alike(3), *odd, *alike(3)])
        reader = level("video")
        assert outcome(reader.decode, made, None) == outcome(reader._decode_each, made)
    full, made = level("video"), records(alike(3))
    full._layouts.update({0: [None] * 256})
    assert full._decode_at_once(made) is None
    assert outcome(full.decode, made, None) == outcome(full._decode_each, made)


@pytest.mark.parametrize("num_frames", [4, 12, 30])
def test_frames_are_cut_or_padded(num_frames: int) -> None:
    made = videos(6, frames=20)
    batch = decode("frame", made, num_frames=num_frames)
    assert batch.inputs.shape == (6, num_frames, RGB + AUDIO)
    for video, inputs in zip(made, batch.inputs, strict=True):
        length = min(num_frames, len(video.rgb))
        torch.testing.assert_close(inputs[:length].double(), dequantised(video)[:length], rtol=0, atol=5e-7)
        assert (inputs[length:] == 0).all()
    assert torch.equal(batch.targets, multi_hot(made))


def test_no_byte_stands_for_zero() -> None:
    video = replace(videos(1, frames=1)[0], rgb=np.arange(256, dtype=np.uint8).reshape(16, 16))
    video = replace(video, audio=np.zeros((16, AUDIO), np.uint8))
    frames = decode("frame", [video], num_frames=16).inputs[0, :, :RGB].flatten()
    assert (frames != 0).all()
    assert (frames.diff() > 0).all()
    assert frames[[0, -1]].tolist() == pytest.approx([-2 + 4 / 512, 2 + 4 / 512])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_sampled_frames_are_spread_over_the_video(length: int, train: bool) -> None:
    video = replace(videos(1, frames=1)[0], rgb=np.arange(length, dtype=np.uint8)[:, None].repeat(RGB, 1))
    video = replace(video, audio=np.zeros((length, AUDIO), np.uint8))
    reader = replace(level("frame", num_frames=8, sample_frames=True), train=train)
    inputs = reader.decode(records([video]), random.Random(0)).inputs[0, :, 0]
    chosen = ((inputs.double() + 2 - 4 / 512) / (4 / 255)).round().tolist()
    stretches = [(i * length / 8, (i + 1) * length / 8) for i in range(8)]
    assert all(int(low) <= frame <= high for frame, (low, high) in zip(chosen, stretches, strict=True))
    if not train:
        assert chosen == [int((i + 0.5) * length / 8) for i in range(8)]


def test_sampling_draws_anew_each_time_in_training_only() -> None:
    made = videos(4, frames=40)
    for train in (False, True):
        reader = replace(level("frame", num_frames=5, sample_frames=True), train=train)
        draws = [reader.decode(records(made), random.Random(seed)).inputs for seed in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert torch.equal(draws[0], draws[2]) != train


def test_rated_segments() -> None:
    made = [
        replace(video, rgb=video.rgb[:1].repeat(30, 0), audio=np.arange(30 * AUDIO, dtype=np.uint8).reshape(30, AUDIO))
        for video in videos(2, frames=1)
    ]
    made[0] = replace(made[0], segments=[(10, 3, 1.0), (20, 3, 0.0), (10, 5, 0.0)])
    made[1] = replace(made[1], segments=[(25, 7, 1.0)])
    batch = decode("segment", made)
    assert batch.ids == [f"{made[0].id}:10", f"{made[0].id}:20", f"{made[1].id}:25"]
    for inputs, video, start in zip(batch.inputs, (made[0], made[0], made[1]), (10, 20, 25), strict=True):
        torch.testing.assert_close(inputs.double(), dequantised(video)[start : start + 5], rtol=0, atol=5e-7)
    expected = torch.full((3, CLASSES), -1, dtype=torch.int8)
    expected[0, 3], expected[0, 5], expected[1, 3], expected[2, 7] = 1, 0, 0, 1
    assert torch.equal(batch.targets, expected)


def test_test_shards_have_no_labels_and_older_ones_another_id() -> None:
    data = TFRecordWriter.serialize_tf_example(
        {"video_id": (b"abc", "byte"), "mean_rgb": ([0.5] * RGB, "float"), "mean_audio": ([0.5] * AUDIO, "float")}
    )
    batch = decode("video", [data])
    assert batch.ids == ["abc"]
    assert batch.targets.sum() == 0


@pytest.mark.parametrize(
    ("kind", "made", "message"),
    [
        (
            "frame",
            videos(1),
            "is of a video-level shard (it has id, labels, mean_audio, mean_rgb); set level to 'video'",
        ),
        ("video", videos(1, frames=3), "is of a frame-level shard (it has audio, rgb); set level to 'frame'"),
        ("segment", videos(1, frames=3), "has no segments; they are in the validation shards of 2019 only"),
        ("video", [replace(videos(1)[0], rgb=np.ones(5))], "has 5 values of mean_rgb, where 16 were expected"),
        (
            "frame",
            [replace(videos(1, frames=3)[0], rgb=np.ones((3, 5), np.uint8))],
            "has a feature 'rgb' that has frames of 5 bytes, not 16",
        ),
        (
            "frame",
            [replace(videos(1, frames=3)[0], rgb=np.ones((9, RGB), np.uint8))],
            "has features of different lengths: {'rgb': 9, 'audio': ",
        ),
        (
            "frame",
            [replace(videos(1, frames=3)[0], rgb=np.ones((0, RGB), np.uint8), audio=np.ones((0, AUDIO), np.uint8))],
            "has no frames",
        ),
        (
            "video",
            [replace(videos(1)[0], labels=[1, CLASSES])],
            "has the label 20 in labels; num_classes=20 allows 0 to 19",
        ),
        ("video", [replace(videos(1)[0], labels=[-1])], "has the label -1 in labels"),
        (
            "segment",
            [replace(videos(1, frames=3)[0], segments=[(0, CLASSES, 1.0)])],
            "has the label 20 in segment_labels",
        ),
        (
            "video",
            [b"\x0a\x05abc"],
            "is neither a tf.train.Example nor a SequenceExample: it has a field that is longer",
        ),
        (
            "video",
            [TFRecordWriter.serialize_tf_example({"image": (b"", "byte")})],
            "has no feature 'mean_rgb'; it has image",
        ),
        ("video", [b""], "has no feature 'mean_rgb'; it has none"),
    ],
)
def test_bad_records_say_which_and_why(kind: str, made: list[Any], message: str) -> None:
    good = [] if isinstance(made[0], bytes) else videos(1, None if kind == "video" else 3, seed=1)
    if kind == "segment":
        good = []
    with pytest.raises(DataError, match=re.escape(f"x.tfrecord: the record at byte {7 * len(good)} {message}")):
        decode(kind, [*good, *made])


def of_kinds(**kinds: example_pb2.Feature) -> bytes:
    """A video of 16 + 8 features, some of them given."""
    whole = {
        "id": example_pb2.Feature(bytes_list={"value": [b"ab12"]}),
        "labels": example_pb2.Feature(int64_list={"value": [3]}),
        "mean_rgb": example_pb2.Feature(float_list={"value": [0.5] * RGB}),
        "mean_audio": example_pb2.Feature(float_list={"value": [0.5] * AUDIO}),
    }
    return example_pb2.Example(features={"feature": whole | kinds}).SerializeToString()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            {"labels": {"bytes_list": {"value": [b"3"]}}},
            "'labels' that is a list of another kind: BytesList, not Int64List",
        ),
        (
            {"labels": {"float_list": {"value": [3.0]}}},
            "'labels' that is a list of another kind: FloatList, not Int64List",
        ),
        (
            {"mean_rgb": {"bytes_list": {"value": [b"x" * 16]}}},
            "'mean_rgb' that is a list of another kind: BytesList, not FloatList",
        ),
        (
            {"mean_audio": {"int64_list": {"value": [1] * 8}}},
            "'mean_audio' that is a list of another kind: Int64List, not FloatList",
        ),
        ({"id": {"int64_list": {"value": [1]}}}, "'id' that is a list of another kind: Int64List, not BytesList"),
        ({"labels": {"int64_list": {"value": [2**40]}}}, "has the label 1099511627776 in labels"),
    ],
)
def test_features_of_another_kind_name_it(kinds: dict[str, Any], message: str) -> None:
    data = of_kinds(**{name: example_pb2.Feature(**kind) for name, kind in kinds.items()})
    with pytest.raises(DataError, match=re.escape(message)):
        decode("video", [data])


def test_frames_of_floats_name_the_kind() -> None:
    message = example_pb2.SequenceExample.FromString(serialized(videos(1, frames=3)[0]))
    del message.feature_lists.feature_list["rgb"].feature[:]
    message.feature_lists.feature_list["rgb"].feature.add(float_list={"value": [0.5] * RGB})
    with pytest.raises(DataError, match="'rgb' that is a list of another kind: FloatList, not BytesList"):
        decode("frame", [message.SerializeToString()])


@pytest.mark.parametrize("kind", ["video", "frame"])
def test_what_is_trained_or_tested_on_has_labels(tmp_path: Path, kind: str) -> None:
    made = [serialized(video) for video in videos(4, None if kind == "video" else 3)]
    if kind == "video":
        made[-1] = of_kinds()
        message = example_pb2.Example.FromString(made[-1])
        del message.features.feature["labels"]
    else:
        message = example_pb2.SequenceExample.FromString(made[-1])
        del message.context.feature["labels"]
    made[-1] = message.SerializeToString()
    assert decode(kind, made).targets[-1].sum() == 0  # to predict it needs none
    for split in ("train", "validate"):
        write(tmp_path / f"{split}0.tfrecord", made)
    data = data_module(tmp_path, level=kind, features=FEATURES[kind])
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        with pytest.raises(DataError, match="has no labels: it can be predicted, and neither trained nor tested on"):
            list(loader)


def test_a_record_without_an_id() -> None:
    data = TFRecordWriter.serialize_tf_example(
        {"mean_rgb": ([0.5] * RGB, "float"), "mean_audio": ([0.5] * AUDIO, "float")}
    )
    with pytest.raises(DataError, match="has 0 ids of a video, where 1 was expected"):
        decode("video", [data])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "clip"}, "level must be one of 'video', 'frame', 'segment', got 'clip'"),
        ({"level": "video", "num_frames": 3}, "num_frames and sample_frames are for level 'frame', not 'video'"),
        ({"level": "frame", "num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"level": "video", "num_classes": 0}, "must be positive, got 0"),
        ({"level": "video", "features": {"mean_rgb": -1}}, "must be positive"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        make_level(**arguments)


@pytest.fixture
def folder(tmp_path):
    for split, seed in (("train", 0), ("validate", 10)):
        for shard in range(3):
            write(tmp_path / f"{split}{shard:04}.tfrecord", videos(10, seed=seed + shard))
    return tmp_path


def data_module(folder, **options):
    settings = {"features": FEATURES["video"], "num_classes": CLASSES, "batch_size": 4, "num_workers": 0, "seed": 0}
    return YouTube8M(str(folder), **settings | options)


def test_the_data_module_splits_by_file_name(folder: Path) -> None:
    data = data_module(folder)
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (4, RGB + AUDIO)
    assert y.shape == (4, CLASSES)
    seen = torch.cat([y for _, y in data.val_dataloader()])
    written = [video for seed in (10, 11, 12) for video in videos(10, seed=seed)]
    assert torch.equal(seen, multi_hot(written))
    data.setup("test")
    assert len(data.test_dataloader()) == 8


def test_workers_report_a_bad_record_in_one_line(folder: Path) -> None:
    write(folder / "train0001.tfrecord", videos(10, frames=3))
    data = data_module(folder, num_workers=2)
    data.setup("fit")
    with pytest.raises(DataError) as caught:
        list(data.train_dataloader())
    assert re.fullmatch(
        r".*/train0001\.tfrecord: the record at byte [\d,]+ is of a frame-level shard .* set level to 'frame'\.",
        str(caught.value),
    )


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No files match .*/train\*\.tfrecord\*"):
        data_module(tmp_path).setup("fit")


def test_frames_of_gzip_shards(tmp_path: Path) -> None:
    made = videos(5, frames=6)
    path = write(tmp_path / "x.tfrecord.gz", made)
    loader = RecordLoader(index_shards([str(path)]), level("frame", num_frames=6).decode, Share(2))
    assert [video for batch in loader for video in batch.ids] == [video.id for video in made]
