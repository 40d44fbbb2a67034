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


def turn_clockwise(path: Path) -> Path:
    """Have an MP4 say that it is to be shown a quarter turn clockwise, as telephones do."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
