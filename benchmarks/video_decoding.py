"""How fast clips are decoded and sampled by two workers, side by side with a plain PyAV decode of the whole file.

    python benchmarks/video_decoding.py --data FOLDER        # with videos, short ones too

Files of 300 frames are made of the videos: each is repeated, brought to Kinetics' usual size and encoded as YouTube
does (H.264, a key frame at least every 250 frames, three B-frames). Files are read once before, so they lie in the
page cache, and the readers take turns. Rates are clips per second of the clock; the machine's load is not controlled,
so the ratio within a round counts.

- clip: 8 frames with stride 4 that begin anywhere;
- spread: 8 frames over the whole file.

The plain decode opens the file, decodes all its frames and converts the 8 that are wanted ("8 converted"), or all of
them, as one does who asks for an array of the video ("all converted"). Where FFmpeg's libraries are installed,
`decoder: torchcodec` takes part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ensemblenet.data.video import ClipSampling, TorchcodecVideo, Video, reader
from ensemblenet.errors import DataError

RESULTS = Path(__file__).parent / "results" / "kinetics_decoding.json"
FRAMES, FRAMES_A_SECOND, SHORT_SIDE = 300, 25, 256
SAMPLINGS = {"clip": ClipSampling(num_frames=8, stride=4), "spread": ClipSampling(num_frames=8, stride=42)}
Reader = Callable[[Path, ClipSampling], Tensor]


def lengthen(source: Path, target: Path) -> None:
    """Write a file of 300 frames that repeats a video."""
    with av.open(str(source)) as container:
        frames = list(container.decode(video=0))
    scale = SHORT_SIDE / min(frames[0].height, frames[0].width)
    width, height = (2 * round(scale * side / 2) for side in (frames[0].width, frames[0].height))
    with av.open(str(target), "w") as container:
        options = {"crf": "23", "preset": "medium", "g": "250", "bf": "3"}
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(FRAMES):
            frame = frames[number % len(frames)].reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FRAMES_A_SECOND)
            frame.pict_type = 0  # for the encoder to choose
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# -- the readers


def ours(path: Path, sampling: ClipSampling) -> Tensor:
    with Video(path) as video:
        return video.frames(sampling.random(video.times))


def plain(path: Path, sampling: ClipSampling, convert_all: bool = False) -> Tensor:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    wanted = sampling.random(np.arange(len(frames)) / FRAMES_A_SECOND)
    if convert_all:
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        clip = whole[wanted]
    else:
        clip = np.stack([frames[index].to_ndarray(format="rgb24") for index in wanted])
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def plain_all(path: Path, sampling: ClipSampling) -> Tensor:
    return plain(path, sampling, convert_all=True)


def by_torchcodec(path: Path, sampling: ClipSampling) -> Tensor:
    with TorchcodecVideo(path) as video:
        return video.frames(sampling.random(video.times))


READERS: dict[str, Reader] = {
    "ensemblenet": ours,
    "plain, 8 converted": plain,
    "plain, all converted": plain_all,
}
with suppress(DataError):  # where FFmpeg's libraries are installed
    reader("torchcodec")
    READERS["torchcodec"] = by_torchcodec


class _Clips(Dataset[Tensor]):
    def __init__(self, paths: list[Path], reader: Reader, sampling: ClipSampling) -> None:
        self.paths, self.reader, self.sampling = paths, reader, sampling

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        torch.manual_seed(index)  # the same clips for every reader
        return self.reader(self.paths[index], self.sampling)


def check_same(paths: list[Path]) -> None:
    """All readers give the same clips; torchcodec turns colours by itself, to the nearest few levels."""
    for sampling in SAMPLINGS.values():
        for path in paths:
            clips = []
            for read in READERS.values():
                torch.manual_seed(0)
                clips.append(read(path, sampling))
            apart = [(clip.int() - clips[0].int()).abs().max().item() for clip in clips]
            assert max(apart[:3]) == 0, path
            assert max(apart) <= 8, path


def rate(loader: DataLoader[Tensor]) -> float:
    """Clips a second over an epoch, the workers being there already."""
    start = time.perf_counter()
    count = sum(1 for _ in loader)
    return count / (time.perf_counter() - start)


def measure(paths: list[Path], sampling: ClipSampling, rounds: int) -> dict[str, dict[str, float]]:
    loaders = {
        name: DataLoader(_Clips(paths, reader, sampling), batch_size=None, num_workers=2, persistent_workers=True)
        for name, reader in READERS.items()
    }
    for loader in loaders.values():
        rate(loader)  # starts the workers, and brings the files into the page cache
    rates = [{name: rate(loader) for name, loader in loaders.items()} for _ in range(rounds)]
    rows = {f"{name}, clips/s": summary([row[name] for row in rates]) for name in READERS}
    for name in list(READERS)[1:]:
        rows[f"ratio to {name}"] = summary([row["ensemblenet"] / row[name] for row in rates])
    return rows


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "low": round(min(values), 2),
        "high": round(max(values), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with videos in it, at any depth")
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = sorted(options.data.rglob("*.mp4"))
    sources = found[:: max(1, len(found) // options.files)][: options.files]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number:03}.mp4") for number in range(len(sources))]
        for source, path in zip(sources, paths, strict=True):
            lengthen(source, path)
        check_same(paths[:4])
        results = {name: measure(paths, sampling, options.rounds) for name, sampling in SAMPLINGS.items()}
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    report = {
        "command": "python benchmarks/video_decoding.py --data FOLDER",
        "environment": {
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("torch", "av", "numpy")},
            "cpus": os.cpu_count(),
            "workers": 2,
        },
        "files": {"number": len(paths), "frames": FRAMES, "short_side": SHORT_SIDE, "kilobytes": round(kilobytes)},
        "rounds": options.rounds,
        **results,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
