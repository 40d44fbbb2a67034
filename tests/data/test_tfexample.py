"""The fields of examples against the compiled protocol buffers of the tfrecord package."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shards import example_pb2

from ensemblenet.data.tfexample import bytes_of, floats_of, frames_of, integers_of, packed_integers, read_fields

int64 = st.integers(-(2**63), 2**63 - 1)
float32 = st.floats(width=32, allow_nan=False)
names = st.text(max_size=300)
feature = st.one_of(
    st.lists(st.binary(max_size=200)).map(lambda v: example_pb2.Feature(bytes_list={"value": v})),
    st.lists(float32).map(lambda v: example_pb2.Feature(float_list={"value": v})),
    st.lists(int64).map(lambda v: example_pb2.Feature(int64_list={"value": v})),
)


def values(data, span):
    """What each kind of feature reads; nothing where another kind is refused."""
    found = []
    for read in (bytes_of, floats_of, integers_of):
        try:
            found.append(list(read(data, span)))
        except ValueError as error:
            assert re.fullmatch(r"is a list of another kind: (\w+), not (?!\1)\w+", str(error))  # noqa: PT017
            found.append([])
    return found


def expected(feature):
    return [list(feature.bytes_list.value), list(feature.float_list.value), list(feature.int64_list.value)]


@given(st.dictionaries(names, feature, max_size=5))
def test_features_of_an_example(features: dict[str, Any]) -> None:
    data = example_pb2.Example(features={"feature": features}).SerializeToString()
    for tail in (b"", b"\x12\x00"):
        found, lists = read_fields(data + tail)
        assert lists == {}
        assert {name: values(data, span) for name, span in found.items()} == {
            name: expected(value) for name, value in features.items()
        }


@given(st.dictionaries(names, feature, max_size=3), st.lists(st.binary(min_size=130, max_size=130), max_size=4))
def test_context_and_frames_of_a_sequence_example(context: dict[str, Any], frames: list[bytes]) -> None:
    message = example_pb2.SequenceExample(context={"feature": context})
    message.feature_lists.feature_list["rgb"].feature.extend(
        example_pb2.Feature(bytes_list={"value": [frame]}) for frame in frames
    )
    data = message.SerializeToString()
    found, lists = read_fields(data)
    assert {name: values(data, span) for name, span in found.items()} == {
        name: expected(value) for name, value in context.items()
    }
    assert frames_of(data, lists["rgb"], 130).tolist() == [list(frame) for frame in frames]


def test_unpacked_numbers_and_unknown_fields() -> None:
    # a float_list with two values of wire type 5, an int64_list with two of type 0, each behind unknown fields
    floats = b"\x0d" + np.float32(1.5).tobytes() + b"\x0d" + np.float32(-2).tobytes()
    integers = b"\x08\x07\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    unknown = b"\x7a\x03abc" + b"\x78\x05" + b"\x7d1234" + b"\x7912345678"
    for tag, numbers, expected in ((b"\x12", floats, [[], [1.5, -2.0], []]), (b"\x1a", integers, [[], [], [7, -1]])):
        data = unknown + tag + bytes([len(numbers)]) + numbers
        assert values(data, (0, len(data))) == expected


@given(st.lists(st.lists(st.integers(0, 2**28 - 1), max_size=5), max_size=6))
def test_packed_integers_of_many_features(lists: list[list[int]]) -> None:
    features = [example_pb2.Feature(int64_list={"value": numbers}).SerializeToString() for numbers in lists]
    packed = [feature[4:] for feature in features]  # behind two tags and two lengths
    found = packed_integers(packed)
    assert found is not None
    numbers, owners = found
    assert [numbers[owners == index].tolist() for index in range(len(lists))] == lists


@pytest.mark.parametrize(
    "parts", [[b"\x80"], [b"\x80", b"\x01"], [b"\x01", b"\x81\x82\x83\x84\x01"], [b"\xff" * 9 + b"\x01"]]
)
def test_packed_integers_that_are_cut_or_long_are_left_to_the_general_parser(parts: list[bytes]) -> None:
    assert packed_integers(parts) is None


def test_frames_that_are_not_laid_out_at_equal_distances() -> None:
    frames = [bytes([i] * 4) for i in range(3)]
    features = [b"\x0a\x06\x0a\x04" + frame for frame in frames]
    features[1] += b"\x78\x01"  # an unknown field
    data = b"".join(b"\x0a" + bytes([len(feature)]) + feature for feature in features)
    assert frames_of(data, (0, len(data)), 4).tolist() == [list(frame) for frame in frames]
    with pytest.raises(ValueError, match="has frames of 4 bytes, not 5"):
        frames_of(data, (0, len(data)), 5)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_cleanly(data: bytes) -> None:
    try:
        found, _ = read_fields(data)
        for span in found.values():
            values(data, span)
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05abc", "has a field that is longer than the message"),
        (b"\x0a", "ends within a number"),
        (b"\x0b", "has a field of the unknown wire type 3"),
    ],
)
def test_bytes_that_are_no_message(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_fields(data)


def test_a_number_without_an_end_takes_no_time() -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match="has a number of more than 10 bytes"):
        read_fields(b"\xff" * 2**20)
    assert time.process_time() - begun < 1


def test_only_an_empty_feature_may_be_of_another_kind() -> None:
    empty = example_pb2.Feature(bytes_list={"value": []}).SerializeToString()
    assert integers_of(empty, (0, len(empty))) == []
    floats = example_pb2.Feature(float_list={"value": [3.0]}).SerializeToString()
    with pytest.raises(ValueError, match="is a list of another kind: FloatList, not Int64List"):
        integers_of(floats, (0, len(floats)))
