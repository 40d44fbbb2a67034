"""Fields of `tf.train.Example` and `tf.train.SequenceExample`, straight from their bytes.

Both messages are maps from names to features; a `SequenceExample` has a second map, from names to lists of features.
Only the wanted features are decoded, and unknown fields are ignored, as protocol buffers demand. Bytes that are no such
message raise `ValueError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

__all__ = [
    "BYTES_LIST",
    "FLOAT_LIST",
    "INT64_LIST",
    "Fields",
    "Layout",
    "bytes_of",
    "floats_of",
    "frames_of",
    "integers_of",
    "only_value",
    "packed_integers",
    "read_fields",
]

Span = tuple[int, int]  # the first byte of a value, and the end
Fields = dict[str, Span]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3  # the fields of a feature
_KINDS = {BYTES_LIST: "BytesList", FLOAT_LIST: "FloatList", INT64_LIST: "Int64List"}


def read_fields(data: bytes) -> tuple[Fields, Fields]:
    """Find the features of a message.

    Returns:
        The features (an `Example`'s, or the context of a `SequenceExample`) and the lists of features.

    Raises:
        ValueError: the bytes are no such message.

    Example:
        >>> features, lists = read_fields(b"\\n\\x0e\\n\\x0c\\n\\x02id\\x12\\x06\\n\\x04\\n\\x0202")
        >>> features, lists
        ({'id': (10, 16)}, {})
        >>> bytes_of(b"\\n\\x0e\\n\\x0c\\n\\x02id\\x12\\x06\\n\\x04\\n\\x0202", features["id"])
        [b'02']
    """
    maps: tuple[Fields, Fields] = ({}, {})
    for number, _, begin, end in _fields(data, (0, len(data))):
        if number in (1, 2):
            for entry, _, *span in _fields(data, (begin, end)):
                if entry == 1:
                    name, value = _map_entry(data, (span[0], span[1]))
                    maps[number - 1][name] = value
    return maps


def _map_entry(data: bytes, span: Span) -> tuple[str, Span]:
    name, value = "", (span[1], span[1])
    for number, _, begin, end in _fields(data, span):
        if number == 1:
            name = data[begin:end].decode()
        elif number == 2:
            value = (begin, end)
    return name, value


def bytes_of(data: bytes, span: Span) -> list[bytes]:
    """The values of a feature that is a `BytesList`."""
    return [data[begin:end] for values in _lists(data, span, BYTES_LIST) for _, _, begin, end in _fields(data, values)]


def floats_of(data: bytes, span: Span) -> np.ndarray:
    """The values of a feature that is a `FloatList`, packed or not; if possible a view of the bytes.

    Example:
        >>> floats_of(b"\\x12\\x06\\n\\x04\\x00\\x00\\x80?", (0, 8)).tolist()
        [1.0]
    """
    runs = [
        np.frombuffer(data, "<f4", (end - begin) // 4, begin)
        for values in _lists(data, span, FLOAT_LIST)
        for _, _, begin, end in _fields(data, values)
    ]
    return runs[0] if len(runs) == 1 else np.concatenate([np.zeros(0, "<f4"), *runs])


def integers_of(data: bytes, span: Span) -> list[int]:
    """The values of a feature that is an `Int64List`, packed or not.

    Example:
        >>> integers_of(b"\\x1a\\x04\\n\\x02\\x05\\x07", (0, 6))
        [5, 7]
    """
    found = []
    for values in _lists(data, span, INT64_LIST):
        for _, kind, begin, end in _fields(data, values):
            while begin < end:
                number, begin = _varint(data, begin)
                found.append(number - (1 << 64) if number >> 63 else number)
                if kind == _VARINT:
                    break
    return found


def frames_of(data: bytes, span: Span, size: int) -> np.ndarray:
    """A feature list of one `BytesList` a frame, each of `size` bytes: shape (T, size), uint8.

    Frames of one size lie at equal distances, so the result is a view of the bytes, made without a loop.

    Raises:
        ValueError: a frame has another size.
    """
    header = _frame_header(size)
    block = np.frombuffer(data, np.uint8, span[1] - span[0], span[0])
    stride = len(header) + size
    if len(block) % stride == 0:
        grid = block.reshape(-1, stride)
        if (grid[:, : len(header)] == header).all():
            return grid[:, len(header) :]
    frames = [value for _, _, *feature in _fields(data, span) for value in bytes_of(data, (feature[0], feature[1]))]
    wrong = next((len(frame) for frame in frames if len(frame) != size), None)
    if wrong is not None:
        raise ValueError(f"has frames of {wrong} bytes, not {size}")
    return np.frombuffer(b"".join(frames), np.uint8).reshape(-1, size)


@lru_cache
def _frame_header(size: int) -> np.ndarray:
    """The bytes before those of a frame: the starts of a feature, of its list, and of the value."""
    header = b""
    for _ in range(3):
        header = b"\x0a" + _encode_varint(size + len(header)) + header
    return np.frombuffer(header, np.uint8)


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


# -- messages of the same layout: what one is found to hold tells where others hold theirs


def only_value(data: bytes, span: Span) -> tuple[int, Span] | None:
    """The kind of a feature and its one value, a byte string or packed numbers; None for a feature of another form.

    Example:
        >>> only_value(b"\\x1a\\x04\\n\\x02\\x05\\x07", (0, 6)) == (INT64_LIST, (4, 6))
        True
    """
    lists = list(_fields(data, span))
    values = [value for _, wire, begin, end in lists if wire == _BYTES for value in _fields(data, (begin, end))]
    if len(lists) == len(values) == 1 and values[0][1] == _BYTES:
        return lists[0][0], values[0][2:]
    return None


@dataclass(frozen=True)
class Layout:
    """Where the values of a message lie, and all bytes around them: names, kinds and lengths.

    What is around values alone says where they lie. So of another message of the same length, with the same bytes
    around, they lie at the same places, and it need not be parsed.

    Args:
        around: cuts the bytes around the values out of a message.
        bytes_around: what it gives.
        values: cuts the values out.
    """

    around: Callable[[Any], tuple[bytes, ...]]
    bytes_around: tuple[bytes, ...]
    values: Callable[[Any], tuple[memoryview, ...]]

    @classmethod
    def of(cls, data: bytes, values: Sequence[Span], unread: Sequence[Span] = ()) -> Layout:
        """The layout of a message.

        Args:
            data: the message.
            values: of at least two features, see [`only_value`][ensemblenet.data.tfexample.only_value].
            unread: the same, of features that are of no interest.

        Example:
            >>> layout = Layout.of(b"a1b2c", [(3, 4), (1, 2)])
            >>> [layout.fits(data) for data in (b"a7b8c", b"a7x8c")], list(map(bytes, layout.values(b"a7b8c")))
            ([True, False], [b'8', b'7'])
        """
        borders = [0, *(place for span in sorted([*values, *unread]) for place in span), len(data)]
        around = itemgetter(*map(slice, borders[::2], borders[1::2]))
        return cls(around, around(data), itemgetter(*(slice(*span) for span in values)))

    def fits(self, data: bytes) -> bool:
        """Whether a message of the same length is laid out like that."""
        return self.around(data) == self.bytes_around


def packed_integers(parts: Sequence[bytes | memoryview]) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers of many values of `Int64List`, and which value each is of; None if one is longer than 4 bytes.

    Example:
        >>> packed_integers([b"\\x05\\x80\\x01", b"", b"\\x07"])
        (array([  5, 128,   7]), array([0, 0, 2]))
        >>> packed_integers([b"\\x80", b"\\x01"]) is None  # the first ends within a number
        True
    """
    data = np.frombuffer(b"".join(parts), np.uint8)
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    last = np.flatnonzero(data < 128)
    first = np.concatenate([[0], last + 1])
    lengths = last - first[:-1] + 1
    if first[-1] < len(data) or lengths.max(initial=0) > 4 or (owners[first[:-1]] != owners[last]).any():
        return None
    shifts = 7 * (np.arange(len(data)) - np.repeat(first[:-1], lengths))
    numbers = np.add.reduceat((data & 127).astype(np.int64) << shifts, first[:-1]) if len(data) else first[:0]
    return numbers, owners[last]


# -- the wire format


def _lists(data: bytes, span: Span, kind: int) -> Iterator[Span]:
    """The lists of a kind in a feature; one of another kind that is not empty raises an error."""
    for number, _, begin, end in _fields(data, span):
        if number == kind:
            yield begin, end
        elif number in _KINDS and begin < end:
            raise ValueError(f"is a list of another kind: {_KINDS[number]}, not {_KINDS[kind]}")


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: number, wire type, first byte and end of the value."""
    position, limit = span
    while position < limit:
        key, begin = _varint(data, position) if data[position] > 127 else (data[position], position + 1)
        kind = key & 7
        if kind == _BYTES:
            length, begin = _varint(data, begin)
            position = begin + length
        elif kind == _VARINT:
            _, position = _varint(data, begin)
        elif kind == _FIXED32:
            position = begin + 4
        elif kind == _FIXED64:
            position = begin + 8
        else:
            raise ValueError(f"has a field of the unknown wire type {kind}")
        if position > limit:
            raise ValueError("has a field that is longer than the message")
        yield key >> 3, kind, begin, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of variable length, and its end."""
    try:
        byte = data[position]
        if byte < 128:
            return byte, position + 1
        number, shift = byte & 127, 7
        while shift < 70:
            position += 1
            byte = data[position]
            number |= (byte & 127) << shift
            if byte < 128:
                return number, position + 1
            shift += 7
    except IndexError:
        raise ValueError("ends within a number") from None
    raise ValueError("has a number of more than 10 bytes")
