"""Small videos, made for tests: frame t of a video is as bright as 4 t, and its first quarter is marked."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frame(number: int, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """(H, W, 3), uint8; brighter in its upper left quarter."""
    width, height = size
    pixels = np.full((height, width, 3), 4 * number % 200, dtype=np.uint8)
    pixels[: height // 2, : width // 2] += 50
    return pixels


def make_video(
    path: Path,
    frames: int = 20,
    size: tuple[int, int] = (48, 32),
    codec: str = "libx264",
    pixels: str = "yuv444p",
    moments: Sequence[int] | None = None,
    **options: object,
) -> Path:
    """Encode a video of 25 frames a second, or with frames at some milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if codec == "libx264":
        options = {"crf": 1, "g": 8, "bf": 2} | options
    base = Fraction(1, 25) if moments is None else Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.time_base = base
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(frame(number, size), format="rgb24").reformat(format=pixels)
            picture.pts = number if moments is None else moments[number]
            picture.time_base = base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def make_sound(path: Path) -> Path:
    """A file with sound and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


def show_with(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Have an MP4 say that the pixel at (x, y) is to be shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def turn_clockwise(path: Path) -> Path:
    """Have an MP4 say that it is to be shown a quarter turn clockwise, as telephones do."""
    return show_with(path, 0, 1, -1, 0)


def make_packed(path: Path, frames: int = 20, size: tuple[int, int] = (48, 32)) -> Path:
    """An AVI as XviD wrote it: a frame and the one that is shown before it in one packet, then an empty packet."""
    context = av.CodecContext.create("mpeg4", "w")
    context.width, context.height = size
    context.pix_fmt, context.time_base, context.framerate = "yuv420p", Fraction(1, 25), Fraction(25)
    context.options = {"bf": "1", "g": "300", "sc_threshold": "1000000000", "b_strategy": "0", "qscale": "1"}
    packets = []
    for number in range(frames):
        picture = av.VideoFrame.from_ndarray(frame(number, size), format="rgb24")
        picture.pts, picture.time_base = number, Fraction(1, 25)
        packets += map(bytes, context.encode(picture))
    packets += map(bytes, context.encode(None))
    start = packets[0].index(b"\0\0\1\xb6")
    chunks = [packets[0][:start] + b"\0\0\1\xb2DivX503b1393p" + packets[0][start:]]
    for packet in packets[1:]:
        if packet[packet.index(b"\0\0\1\xb6") + 4] >> 6 == 2:  # shown before the last one
            chunks[-1:] = [chunks[-1] + packet, b"\0\0\1\xb6\x40\x7f"]
        else:
            chunks.append(packet)
    path.write_bytes(_avi(chunks, size))
    return path


def _avi(chunks: Sequence[bytes], size: tuple[int, int]) -> bytes:
    """An AVI of one stream, whose first chunk alone is a key frame."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    number, largest = len(chunks), max(map(len, chunks))
    main = struct.pack("<14I", 40000, 0, 0, 0x10, number, 0, 1, largest, *size, 0, 0, 0, 0)
    header = b"vidsXVID" + struct.pack("<I2H8I4h", 0, 0, 0, 0, 1, 25, 0, number, largest, 0, 0, 0, 0, *size)
    form = struct.pack("<Iii2H4sI2i2I", 40, *size, 1, 24, b"XVID", 0, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", header) + chunk(b"strf", form))
    moved, index = b"movi", b""
    for place, data in enumerate(chunks):
        index += b"00dc" + struct.pack("<3I", 0 if place else 0x10, len(moved), len(data))
        moved += chunk(b"00dc", data)
    content = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + stream) + chunk(b"LIST", moved) + chunk(b"idx1", index)
    return chunk(b"RIFF", b"AVI " + content)


def copy_packets(source: Path, target: Path) -> Path:
    """Move the packets of a video to another container, as they are."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return target
