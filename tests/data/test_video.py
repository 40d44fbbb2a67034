"""Frames and clips of video files: against a plain decode of all frames, and what is wrong with bad files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from made_videos import copy_packets, frame, make_packed, make_sound, make_video, show_with, turn_clockwise

from ensemblenet.data.video import ClipSampling, Video, reader
from ensemblenet.errors import DataError

KINDS = {
    "closed.mp4": {"g": 6, "bf": 3},
    "one_key.mp4": {"g": 250, "bf": 3},
    "open.mkv": {"g": 5, "x264-params": "open-gop=1:bframes=3:b-pyramid=strict"},
    "transport.ts": {"g": 6, "bf": 2},
    "wrong_keys.avi": {"codec": "mpeg4", "pixels": "yuv420p", "g": 6, "bf": 2},
    "pictures.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "odd.mp4": {"size": (51, 33)},
    "uneven.mp4": {"moments": [t * t for t in range(20)]},
    "invented.avi": {"x264-params": "b-adapt=0:scenecut=0:weightp=0", "g": 250},
    "invented_mpeg2.avi": {"codec": "mpeg2video", "pixels": "yuv420p", "g": 6, "bf": 2},
    "all_keys.avi": {"codec": "ffv1", "pixels": "bgr0"},
    "program.mpg": {"codec": "mpeg1video", "pixels": "yuv420p", "bf": 2},
    "raw.h264": {"bf": 2},
    "hidden.webm": {"codec": "libvpx", "pixels": "yuv420p", "auto-alt-ref": 1, "lag-in-frames": 16, "b": "200k"},
}


def decode_all(path):
    with av.open(str(path)) as container:
        return np.stack([picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)])


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_plain_decode(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, **KINDS[name])
    expected = torch.from_numpy(decode_all(path)).permute(0, 3, 1, 2)
    rng = np.random.default_rng(0)
    with Video(path) as video:
        assert len(video) == len(expected) == 20
        for wanted in [[index] for index in range(20)] + [rng.integers(20, size=5) for _ in range(10)]:
            assert torch.equal(video.frames(wanted), expected[torch.as_tensor(wanted)])


@pytest.mark.parametrize("container", ["avi", "mkv", "mp4"])
def test_frames_of_packed_streams_come_once_and_in_order(tmp_path: Path, container: str) -> None:
    path = make_packed(tmp_path / "packed.avi")
    if container != "avi":
        path = copy_packets(path, tmp_path / f"packed.{container}")
    with Video(path) as video:
        assert len(video) == 20
        assert video.times.tolist() == pytest.approx([number / 25 for number in range(20)])
        for wanted in (range(20), [7], [19, 0, 7]):
            levels = video.frames(list(wanted))[:, :, -1, -1].float().mean(1)  # frame t is as bright as 4 t
            assert levels.tolist() == pytest.approx([4 * number for number in wanted], abs=1.9)


def test_few_other_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4", frames=60, codec="mpeg4", pixels="yuv420p", g=12, bf=2)
    decoded = []
    whole = Video._decode
    monkeypatch.setattr(Video, "_decode", lambda *arguments: (decoded.append(f) or f for f in whole(*arguments)))
    with Video(path) as video:
        video.frames([57])
        assert 1 <= len(decoded) <= 6  # of the last twelve; two in three refer to others and are not referred to
        decoded.clear()
        video.frames([5, 35])
        assert len(decoded) <= 12


def test_frames_are_resized_to_their_shorter_side(tmp_path: Path) -> None:
    for size, expected in (((48, 32), (16, 24)), ((30, 60), (32, 16)), ((51, 33), (16, 25))):
        with Video(make_video(tmp_path / f"{size[0]}.mp4", size=size), short_side=16) as video:
            assert video.frames([0]).shape == (1, 3, *expected)


def test_rotated_videos_are_read_upright(tmp_path: Path) -> None:
    path = turn_clockwise(make_video(tmp_path / "phone.mp4"))
    with Video(path, short_side=16) as video:
        picture = video.frames([10])[0].float().mean(0)
    assert picture.shape == (24, 16)
    corners = picture[:11, 9:], picture[:11, :7], picture[13:, :7], picture[13:, 9:]
    assert [corner.mean().round().item() for corner in corners] == pytest.approx([90, 40, 40, 40], abs=3)


@pytest.mark.parametrize("a", [-1, 1])
@pytest.mark.parametrize("b", [-1, 1])
@pytest.mark.parametrize("turned", [False, True])
def test_all_eight_display_matrices(tmp_path: Path, a: int, b: int, turned: bool) -> None:
    path = show_with(make_video(tmp_path / "a.mp4", frames=2), *((0, a, b, 0) if turned else (a, 0, 0, b)))
    with Video(path) as video:
        shown = video.frames([1])[0]
    with av.open(str(path)) as container:
        stored = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)][1]
    expected = np.zeros((48, 32, 3) if turned else (32, 48, 3), np.uint8)
    for y, x in np.ndindex(32, 48):  # of a mirrored axis, place 0 is shown last
        across, down = (b * y, a * x) if turned else (a * x, b * y)
        signs = (b, a) if turned else (a, b)
        expected[down - (signs[1] < 0), across - (signs[0] < 0)] = stored[y, x]
    assert np.array_equal(shown.permute(1, 2, 0).numpy(), expected)


def test_times_of_an_uneven_video(tmp_path: Path) -> None:
    moments = [0, 10, 200, 210, 900]
    with Video(make_video(tmp_path / "a.mp4", frames=5, moments=moments)) as video:
        assert (video.times - video.times[0]).tolist() == pytest.approx([t / 1000 for t in moments], abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "cannot be opened as a video"),
        ("text", "cannot be opened as a video"),
        ("absent", "cannot be opened as a video"),
        ("sound", "has no video stream"),
        ("no frames", "holds no frames|cannot be opened|no video stream"),
        ("cut off", "cannot be opened as a video"),
        ("noise", "is damaged"),
    ],
)
def test_bad_files_are_named_and_closed(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "bad clip.mp4"
    match kind:
        case "nothing":
            path.touch()
        case "text":
            path.write_text("no video")
        case "sound":
            make_sound(path)
        case "no frames":
            make_video(path, frames=0)
        case "cut off":  # before its index
            path.write_bytes(make_video(path).read_bytes()[:1500])
        case "noise":
            data = bytearray(make_video(path).read_bytes())
            start = data.index(b"mdat")
            size = int.from_bytes(data[start - 4 : start]) - 8
            data[start + 4 : start + 4 + size] = np.random.default_rng(0).bytes(size)
            path.write_bytes(data)
    before = open_files()
    with pytest.raises(DataError, match=rf"bad clip\.mp4.* ({message})"), Video(path) as video:
        video.frames(range(len(video)))
    assert open_files() == before


def test_files_do_not_stay_open(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4")
    before = open_files()
    for _ in range(30):
        with Video(path) as video:
            video.frames([19, 3])
    assert open_files() == before


# -- torchcodec, where it is installed


@pytest.fixture
def torchcodec():
    try:
        return reader("torchcodec")
    except DataError as error:
        pytest.skip(str(error))


# where key frames are not what a file says, as in the other kinds, torchcodec 0.17 gives wrong frames
@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith((".mp4", ".mov"))])
def test_torchcodec_gives_the_same_frames(tmp_path: Path, torchcodec: Callable[..., Any], name: str) -> None:
    path = make_video(tmp_path / name, **KINDS[name])
    wanted = [7, 0, 19, 7, 12]
    with Video(path) as ours, torchcodec(path) as theirs:
        assert (theirs.times == ours.times).all()
        assert torch.equal(theirs.frames(wanted), ours.frames(wanted))


def test_torchcodec_names_bad_files_and_closes_all(tmp_path: Path, torchcodec: Callable[..., Any]) -> None:
    path = make_video(tmp_path / "noise.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    size = int.from_bytes(data[start - 4 : start]) - 8
    data[start + 4 : start + 4 + size] = np.random.default_rng(0).bytes(size)
    good = make_video(tmp_path / "good.mp4")
    with torchcodec(good) as video:
        video.frames([3])
    before = open_files()
    path.write_bytes(data)
    for _ in range(3):
        with pytest.raises(DataError, match=r"noise\.mp4 is damaged"), torchcodec(path) as video:
            video.frames(range(len(video)))
        with torchcodec(good) as video:
            video.frames([19, 3])
    assert open_files() == before


def test_torchcodec_reads_upright_and_resizes(tmp_path: Path, torchcodec: Callable[..., Any]) -> None:
    path = turn_clockwise(make_video(tmp_path / "phone.mp4"))
    with Video(path, short_side=16) as ours, torchcodec(path, short_side=16) as theirs:
        a, b = ours.frames([10, 3]), theirs.frames([10, 3])
    assert a.shape == b.shape
    assert (a.float() - b.float()).abs().mean() < 2  # they resize in different ways


def test_without_torchcodec_one_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(DataError, match=r"decoder=torchcodec needs the package torchcodec.*decoder=pyav needs neither"):
        reader("torchcodec")


def test_torchcodec_without_ffmpeg_is_no_damaged_video(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(ffmpeg_major_version=None, VideoDecoder=None))
    with pytest.raises(DataError, match=r"needs the package torchcodec.* FFmpeg's libraries were not found"):
        reader("torchcodec")


# -- clips


def even(frames):
    return np.arange(frames) / 25


def test_random_clips_begin_anywhere_and_end_within() -> None:
    sampling = ClipSampling(num_frames=3, stride=2)
    torch.manual_seed(0)
    clips = [tuple(sampling.random(even(8))) for _ in range(400)]
    assert set(clips) == {(start, start + 2, start + 4) for start in range(4)}
    assert min(clips.count(clip) for clip in set(clips)) > 70  # all as often


def test_uniform_clips_reach_from_the_first_to_the_last_frame() -> None:
    clips = ClipSampling(num_frames=4, stride=3).uniform(even(100), 4)
    assert [clip[0] for clip in clips] == [0, 30, 60, 90]
    assert clips[-1][-1] == 99
    [middle] = ClipSampling(num_frames=4, stride=3).uniform(even(100), 1)
    assert middle[0] + middle[-1] == pytest.approx(99, abs=1)


@pytest.mark.parametrize(("short", "expected"), [("loop", [0, 2, 4, 1, 3]), ("pad", [0, 2, 4, 4, 4])])
def test_short_videos(short: str, expected: list[int]) -> None:
    sampling = ClipSampling(num_frames=5, stride=2, short=short)
    assert sampling.random(even(5)).tolist() == expected
    in_seconds = ClipSampling(num_frames=5, seconds=0.4, short=short)
    assert in_seconds.random(even(5)).tolist() == expected


def test_seconds_take_the_frame_that_is_shown() -> None:
    times = np.array([0.0, 0.01, 0.02, 0.5, 1.0, 1.5])  # uneven
    [clip] = ClipSampling(num_frames=4, seconds=2.0).uniform(times, 1)
    assert clip.tolist() == [0, 3, 4, 5][: len(clip)]


def test_seconds_make_frame_rates_alike() -> None:
    sampling = ClipSampling(num_frames=5, seconds=1.0)
    slow, fast = (sampling.uniform(np.arange(4 * rate) / rate, 3) for rate in (10, 30))
    for a, b in zip(slow, fast, strict=True):
        assert (a / 10).tolist() == pytest.approx((b / 30).tolist(), abs=0.1)


def test_a_single_frame_is_a_clip() -> None:
    for sampling in (ClipSampling(num_frames=3, stride=4), ClipSampling(num_frames=3, seconds=1.0)):
        assert sampling.random(np.zeros(1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [{"num_frames": 0}, {"stride": 0}, {"seconds": 0.0}])
def test_impossible_clips(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="num_frames >= 1, stride >= 1 and seconds > 0; got"):
        ClipSampling(**wrong)


def test_the_made_frames_differ() -> None:
    assert len({frame(number).tobytes() for number in range(20)}) == 20
