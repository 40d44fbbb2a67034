"""Frames of videos, decoded by PyAV or by torchcodec: the wanted ones, and few others.

Shapes: T frames of H x W pixels are a tensor (T, 3, H, W), uint8, RGB.
"""

from __future__ import annotations

import bisect
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemblenet.data.remote import RemoteFile
from ensemblenet.data.tars import TarFile
from ensemblenet.errors import DataError, first_line

__all__ = ["ClipSampling", "Decoder", "Short", "TorchcodecVideo", "Video", "VideoFile", "reader"]

VideoFile = Path | TarFile | RemoteFile
Decoder = Literal["pyav", "torchcodec"]
Short = Literal["loop", "pad"]

_REORDERED = ("h264", "hevc")  # whose headers need not say whether frames are reordered


class _Packet(NamedTuple):
    """When a packet's frame is shown and read, in the stream's units, and whether decoding can begin with it."""

    shown: Any  # None where the file does not say
    read: Any
    is_key: bool


class Video:
    """A video file, open for reading; a context manager.

    Opening it lists its packets and decodes nothing. So frames have numbers even where the frame rate varies, and a
    seek goes to the last key frame before the wanted frame. Where the file does not say when its frames are shown
    (see `_is_stamped`), frames are numbered in the order in which the decoder gives them: opening decodes the file once
    to count them, and reading decodes from the first frame on.

    Args:
        path: of a file that FFmpeg can read; one in a tar or on a server is read into memory.
        short_side: pixels of the shorter side of the frames; None keeps the file's size. Videos that are to be shown
            turned or mirrored, as their header says, are read as they are shown.

    Attributes:
        times: the seconds at which the frames are shown, ascending.

    Raises:
        DataError: no video, or a broken one; it names the file. Reading frames raises it too.
    """

    def __init__(self, path: VideoFile | str, short_side: int | None = None) -> None:
        self.path = Path(path) if isinstance(path, str) else path
        self.short_side = short_side
        self._matrix: Sequence[int] | None = None
        # has threads; a frame of its own would keep them until it is freed, in a forked worker for ever
        self._reformatter = _pyav().video.reformatter.VideoReformatter()
        self._container = self._open()
        try:
            self._stream = self._only_stream()
            self._stream.thread_count = 1  # many videos are decoded side by side, by workers
            packets = self._list_packets()
            self._has_stamps = self._is_stamped(packets)
            if self._has_stamps:
                first = packets[0]
                keys = [(packet.shown, packet.read) for packet in packets if packet.is_key]
                self._stamps, unit = sorted({packet.shown for packet in packets}), self._stream.time_base or 1
                self._keys = sorted(keys) or [(first.shown, first.read)]
            else:
                self._stamps = list(range(sum(1 for _ in self._decode_all())))
                unit = 1 / (self._stream.average_rate or self._stream.guessed_rate or 25)
            if not self._stamps:
                raise DataError(f"{self.path} holds no frames.")
        except BaseException:
            self.close()
            raise
        self.times = np.array(self._stamps, dtype=float) * float(unit)

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
        found = self._pictures(wanted) if self._has_stamps else self._pictures_in_order(wanted)
        pictures = dict(zip(wanted, map(self._as_shown, found), strict=True))
        shapes = {picture.shape for picture in pictures.values()}
        if len(shapes) > 1:
            raise DataError(f"{self.path}: its frames have {len(shapes)} sizes.")
        return torch.from_numpy(np.stack([pictures[stamp] for stamp in stamps])).permute(0, 3, 1, 2)

    def _open(self) -> Any:
        av = _pyav()
        source = self._source()
        try:
            return av.open(source)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.path} cannot be opened as a video: {reason}") from error

    def _source(self) -> str | io.BytesIO:
        """What decoders open; a server that does not give it is no broken video."""
        if isinstance(self.path, Path):
            return str(self.path)
        with self.path.open() as file:
            return io.BytesIO(file.read())

    def _only_stream(self) -> Any:
        pictures = _pyav().stream.Disposition.attached_pic  # the cover of a song
        for stream in self._container.streams.video:
            if not stream.disposition & pictures:
                return stream
        raise DataError(f"{self.path} has no video stream.")

    def _list_packets(self) -> list[_Packet]:
        av = _pyav()
        try:
            packets = [
                _Packet(packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
                for packet in self._container.demux(self._stream)
                if packet.size and not packet.is_discard
            ]
        except av.error.FFmpegError as error:
            raise DataError(f"{self.path} is damaged: {error.strerror}") from error
        if not packets:
            raise DataError(f"{self.path} holds no frames.")
        return packets

    def _is_stamped(self, packets: Sequence[_Packet]) -> bool:
        """Whether each frame has a time stamp of its own in the file, which the decoder gives back with it.

        AVI has none, and program streams have few; FFmpeg invents the rest, which is wrong where frames are read in
        another order than they are shown. Packed streams (two frames in a packet, then an empty one) keep their
        invented stamps when they are copied to another container: there stamps rise from packet to packet although
        frames are reordered.
        """
        shown = [packet.shown for packet in packets]
        if None in shown or len(set(shown)) < len(shown):
            return False
        codec, kind = self._stream.codec_context, self._container.format.name
        is_reordered = codec.has_b_frames or codec.name in _REORDERED
        is_packed = codec.name == "mpeg4" and shown == sorted(shown)
        return not (kind == "mpeg" or (is_reordered and (kind == "avi" or is_packed)))

    def _pictures(self, wanted: Sequence[int]) -> Iterator[Any]:
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
            yield frame

    def _pictures_in_order(self, wanted: Sequence[int]) -> Iterator[Any]:
        """The frames of some numbers, ascending."""
        following = iter(wanted)
        due = next(following, None)
        for number, frame in enumerate(self._decode_all()):
            if number == due:
                yield frame
                due = next(following, None)
            if due is None:
                return
        raise DataError(f"{self.path} is damaged: frame {due} cannot be decoded.")

    def _decode_all(self) -> Iterator[Any]:
        """All frames, in the decoder's order; from a container of its own, as such files may not allow a seek."""
        av = _pyav()
        try:
            with self._open() as container:
                stream = container.streams[self._stream.index]
                stream.thread_count = 1
                yield from container.decode(stream)
        except av.error.FFmpegError as error:
            raise DataError(f"{self.path} is damaged: {error.strerror}") from error

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

    def _as_shown(self, frame: Any) -> np.ndarray:
        """A frame as the display matrix has it: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
        if self._matrix is None:  # once, as side data and its frame refer to each other and stay in memory
            matrix = frame.side_data.get("DISPLAYMATRIX")
            self._matrix = (1, 0, 0, 0, 1) if matrix is None else struct.unpack("=9i", bytes(matrix))
        a, b, _, c, d, *_ = self._matrix
        height, width = _resized(frame.height, frame.width, self.short_side)
        picture = self._reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
        if abs(b) > abs(a):  # a quarter turn, to the nearest
            picture, a, d = picture.swapaxes(0, 1), c, b
        return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


class TorchcodecVideo(Video):
    """The same, with frames decoded by torchcodec, which needs FFmpeg's libraries on the system.

    PyAV still opens the file and lists its packets, so time stamps, frame numbers and messages for files that cannot
    be opened are the same. Frames of MP4 files are equal at the file's size; resized ones differ a little, as FFmpeg
    and torchvision resize in different ways. With open groups of pictures, in transport streams and in old
    AVI files torchcodec 0.17 gives wrong frames where PyAV here gives the right ones; files without time stamps are
    left to PyAV.
    """

    def __init__(self, path: VideoFile | str, short_side: int | None = None) -> None:
        super().__init__(path, short_side)
        try:
            self._decoder: Any = _torchcodec()(self._source(), stream_index=self._stream.index, num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            self.close()
            raise DataError(f"{self.path} is damaged: {first_line(error)}") from error

    def frames(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Decode some frames; see [`Video.frames`][ensemblenet.data.video.Video.frames]."""
        from torchvision.transforms.v2.functional import resize

        if not self._has_stamps:
            return super().frames(indices)
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
        import torchcodec  # pyright: ignore[reportMissingImports]
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

        if getattr(torchcodec, "ffmpeg_major_version", True) is None:  # 0.17 imports without, for images alone
            raise RuntimeError("FFmpeg's libraries were not found.")
    except (ImportError, RuntimeError) as error:  # the latter where it finds no FFmpeg
        raise DataError(
            "decoder=torchcodec needs the package torchcodec, made for this PyTorch, and FFmpeg's libraries: "
            f"pip install torchcodec; decoder=pyav needs neither. {first_line(error)}"
        ) from error
    return VideoDecoder
