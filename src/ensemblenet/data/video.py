"""Frames of videos, decoded by PyAV or by torchcodec: the wanted ones, and few others.

Shapes: T frames of H x W pixels are a tensor (T, 3, H, W), uint8, RGB.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ensemblenet.errors import DataError, first_line

__all__ = ["ClipSampling", "Decoder", "Short", "TorchcodecVideo", "Video", "reader"]

Decoder = Literal["pyav", "torchcodec"]
Short = Literal["loop", "pad"]


class Video:
    """A video file, open for reading; a context manager.

    Opening it lists its packets and decodes nothing. So frames have numbers even where the frame rate varies, and a
    seek goes to the last key frame before the wanted frame.

    Args:
        path: of a file that FFmpeg can read.
        short_side: pixels of the shorter side of the frames; None keeps the file's size. Videos with a rotation in
            their header are read upright.

    Attributes:
        times: the seconds at which the frames are shown, ascending.

    Raises:
        DataError: no video, or a broken one; it names the file. Reading frames raises it too.
    """

    def __init__(self, path: Path | str, short_side: int | None = None) -> None:
        self.path = Path(path)
        self.short_side = short_side
        self._container = self._open()
        try:
            self._stream = self._only_stream()
            self._stream.thread_count = 1  # many videos are decoded side by side, by workers
            self._stamps, self._keys = self._list_packets()
        except BaseException:
            self.close()
            raise
        self.times = np.array(self._stamps, dtype=float) * float(self._stream.time_base or 1)

    def __len__(self) -> int:
        return len(self._stamps)

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; garbage collection alone may leave it open for long."""
        self._container.close()

    def frames(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Decode some frames, in any order and more than once.

        Args:
            indices: T numbers in [0, len(self)).

        Returns:
            (T, 3, H, W), uint8.
        """
        stamps = [self._stamps[index] for index in indices]
        wanted = sorted(set(stamps))
        pictures = dict(zip(wanted, self._pictures(wanted), strict=True))
        shapes = {picture.shape for picture in pictures.values()}
        if len(shapes) > 1:
            raise DataError(f"{self.path}: its frames have {len(shapes)} sizes.")
        return torch.from_numpy(np.stack([pictures[stamp] for stamp in stamps])).permute(0, 3, 1, 2)

    def _open(self) -> Any:
        av = _pyav()
        try:
            return av.open(str(self.path))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.path} cannot be opened as a video: {reason}") from error

    def _only_stream(self) -> Any:
        pictures = _pyav().stream.Disposition.attached_pic  # the cover of a song
        for stream in self._container.streams.video:
            if not stream.disposition & pictures:
                return stream
        raise DataError(f"{self.path} has no video stream.")

    def _list_packets(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The time stamps of all frames; and of key frames, those of showing and of reading."""
        av = _pyav()
        try:
            packets = [
                (packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
                for packet in self._container.demux(self._stream)
                if packet.size and packet.pts is not None and not packet.is_discard
            ]
        except av.error.FFmpegError as error:
            raise DataError(f"{self.path} is damaged: {error.strerror}") from error
        if not packets:
            raise DataError(f"{self.path} holds no frames.")
        first, *_ = packets
        keys = [(shown, read) for shown, read, is_key in packets if is_key]
        return sorted({shown for shown, *_ in packets}), sorted(keys) or [first[:2]]

    def _pictures(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of some time stamps, ascending; the next one in place of a frame that the decoder drops."""
        decoded, frame = iter(()), None
        for stamp in wanted:
            if frame is None or self._key_before(stamp) > self._key_before(frame.pts):
                decoded, frame = self._decode_towards(stamp, frozenset(wanted)), None
            while frame is None or frame.pts < stamp:
                following = next(decoded, None)
                if following is None:
                    break
                frame = following
            if frame is None:
                raise DataError(f"{self.path} is damaged: no frame can be decoded.")
            yield self._upright(frame)

    def _key_before(self, stamp: int) -> int:
        """The number of the last key frame that is not after a time stamp, or 0."""
        return max(0, bisect.bisect_right(self._keys, stamp, key=lambda key: key[0]) - 1)

    def _decode_towards(self, stamp: int, wanted: frozenset[int]) -> Iterator[Any]:
        """Frames from a key frame on, up to and behind that of a time stamp."""
        # some containers seek by the time of showing, others by that of reading, and some mark frames as key frames
        # that are none: then start further ahead
        *starts, earliest = (start for key in reversed(self._keys[: self._key_before(stamp) + 1]) for start in key)
        for start in starts:
            decoded = self._decode(start, wanted)
            first = next(decoded, None)
            if first is not None and first.key_frame and first.pts <= stamp:
                return chain([first], decoded)
        return self._decode(earliest, wanted)

    def _decode(self, start: int, wanted: frozenset[int]) -> Iterator[Any]:
        """Frames from a key frame on, without frames that are neither wanted nor needed to decode others."""
        av = _pyav()
        try:
            self._container.seek(start, stream=self._stream)
            for packet in self._container.demux(self._stream):
                self._stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield from (frame for frame in packet.decode() if frame.pts is not None)
        except av.error.FFmpegError as error:
            where = f"{self.path} is damaged after {float(start * self._stream.time_base):.2f} s"
            raise DataError(f"{where}: {error.strerror}") from error

    def _upright(self, frame: Any) -> np.ndarray:
        height, width = _resized(frame.height, frame.width, self.short_side)
        picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))


class TorchcodecVideo(Video):
    """The same, with frames decoded by torchcodec, which needs FFmpeg's libraries on the system.

    PyAV still opens the file and lists its packets, so time stamps, frame numbers and messages for files that cannot
    be opened are the same. Frames of MP4 files are equal at the file's size; resized ones differ a little, as FFmpeg
    and torchvision resize in different ways. With open groups of pictures, in transport streams and in old
    AVI files torchcodec 0.17 gives wrong frames where PyAV here gives the right ones.
    """

    def __init__(self, path: Path | str, short_side: int | None = None) -> None:
        super().__init__(path, short_side)
        try:
            self._decoder: Any = _torchcodec()(self.path, stream_index=self._stream.index, num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            self.close()
            raise DataError(f"{self.path} is damaged: {first_line(error)}") from error

    def frames(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Decode some frames; see [`Video.frames`][]."""
        from torchvision.transforms.v2.functional import resize

        try:
            pictures = self._decoder.get_frames_at(list(map(int, indices))).data
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(f"{self.path} is damaged: {first_line(error)}") from error
        *_, height, width = pictures.shape
        return resize(pictures, list(_resized(height, width, self.short_side)), antialias=True)

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._decoder = None


def reader(decoder: Decoder) -> type[Video]:
    """The class that reads videos with a decoder.

    Raises:
        DataError: the decoder is not installed; here once, not for every video.

    Example:
        >>> reader("pyav").__name__
        'Video'
    """
    _pyav()
    if decoder == "pyav":
        return Video
    _torchcodec()
    return TorchcodecVideo


@dataclass(frozen=True)
class ClipSampling:
    """Chooses the frames of clips.

    Args:
        num_frames: T.
        stride: from one frame of a clip to the next.
        seconds: the length of a clip, in place of a stride; clips then look alike at all frame rates.
        short: what follows the last frame where a clip is longer than the video: the first frames again ("loop"), or
            the last frame ("pad").

    Raises:
        DataError: a number below 1, or a length of no time.

    Example:
        >>> sampling = ClipSampling(num_frames=4, stride=2)
        >>> [clip.tolist() for clip in sampling.uniform(np.arange(10) / 25, 2)]
        [[0, 2, 4, 6], [3, 5, 7, 9]]
        >>> [clip.tolist() for clip in sampling.uniform(np.arange(5) / 25, 1)]
        [[0, 2, 4, 1]]
    """

    num_frames: int = 16
    stride: int = 4
    seconds: float | None = None
    short: Short = "loop"

    def __post_init__(self) -> None:
        if min(self.num_frames, self.stride) < 1 or (self.seconds is not None and not self.seconds > 0):
            raise DataError(
                "A clip needs num_frames >= 1, stride >= 1 and seconds > 0; got "
                f"num_frames={self.num_frames}, stride={self.stride}, seconds={self.seconds}."
            )

    def random(self, times: np.ndarray) -> np.ndarray:
        """A clip with a random beginning, drawn from PyTorch's global generator.

        Args:
            times: seconds at which the frames of the video are shown.

        Returns:
            T numbers of frames.
        """
        return self._clip(times, torch.rand(()).item())

    def uniform(self, times: np.ndarray, num_clips: int) -> list[np.ndarray]:
        """Clips spread evenly from the first frames to the last; a single one lies in the middle."""
        if num_clips == 1:
            return [self._clip(times, 0.5)]
        return [self._clip(times, place / (num_clips - 1)) for place in range(num_clips)]

    def _clip(self, times: np.ndarray, place: float) -> np.ndarray:
        """The clip that begins at a share, from 0 to 1, of its possible beginnings."""
        steps = np.arange(self.num_frames)
        if self.seconds is None:
            room = max(0, len(times) - (self.num_frames - 1) * self.stride - 1)
            frames = min(room, int(place * (room + 1))) + steps * self.stride
            return frames % len(times) if self.short == "loop" else np.minimum(frames, len(times) - 1)
        shown = times - times[0]
        length = shown[-1] * len(times) / max(1, len(times) - 1) or self.seconds  # the last frame is shown as well
        moments = place * max(0.0, length - self.seconds) + steps * self.seconds / self.num_frames
        if self.short == "loop":
            moments %= length
        return np.searchsorted(shown, moments + 1e-9, side="right") - 1


def _resized(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    if short_side is None:
        return height, width
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale)), max(short_side, round(width * scale))


def _pyav() -> Any:
    try:
        import av
        from av import logging
    except ImportError as error:
        raise DataError('Videos need PyAV: pip install "ensemblenet[video]"') from error
    logging.set_level(logging.PANIC)  # its messages name no file; ours do
    return av


def _torchcodec() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # the latter where it finds no FFmpeg
        raise DataError(
            "decoder=torchcodec needs the package torchcodec, made for this PyTorch, and FFmpeg's libraries: "
            f"pip install torchcodec; decoder=pyav needs neither. {first_line(error)}"
        ) from error
    return VideoDecoder
