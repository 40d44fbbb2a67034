"""Images a second from shards on an HTTP server against the same shards on the disk, one and two workers.

    OMP_NUM_THREADS=1 python benchmarks/remote_reading.py    # minutes of two cores

The shards hold made JPEGs of 500 x 375 pixels and are of about 100 MB. The server is a process of its own on this
machine. A turn opens the data anew and reads an epoch of shuffled and augmented batches of 64 at 224 pixels; its time
begins before `setup`, so it holds the fetching ("first": nothing was fetched before), the look at the headers and the
start of the workers. "again" is a later start, which finds the files here. "near" reads the shards one after another
(`shuffle_buffer` of half a shard) with room for two and a half of them only, so it fetches all of them again, ahead of
the workers; "near, disk" is the same order of local files. They take turns, so that the load of the machine meets all
of them; what counts is the median of the ratios to the disk's turn of the same round. Rates are taken by the clock, and
by the processor time of this process and its workers, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image

from ensemblenet.data import ImageData
from ensemblenet.data.remote import remote_file
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import environment

RESULTS = Path(__file__).parent / "results" / "remote_reading.json"
SIZE = (500, 375)


def jpegs(count: int) -> list[bytes]:
    """Noise of several scales, which compresses about as photographs do."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        layers = [
            np.asarray(Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).resize(SIZE), np.float32)
            for size in ((4, 6), (24, 32), (375, 500))
        ]
        image = 0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]
        buffer = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def make_shards(folder: Path, shards: int, megabytes: float) -> int:
    """Write shards `train-N.tar` of so many megabytes; returns the number of images."""
    images, total = jpegs(40), 0
    for shard in range(shards):
        written = 0
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            while written < 1e6 * megabytes:
                data = images[total % len(images)]
                for end, content in ((".jpg", data), (".cls", str(total % 10).encode())):
                    member = tarfile.TarInfo(f"{total:06}{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                written += len(data)
                total += 1
    return total


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    port = 18765
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/"):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def read(place: str, shards: int, workers: int, epochs: int, buffer: int | None) -> int:
    """The number of images that were read."""
    pattern = f"train-{{0..{shards - 1}}}.tar"
    data = ImageData(place, "wds/", pattern, pattern, batch_size=64, num_workers=workers, seed=0, shuffle_buffer=buffer)
    data.setup("fit")
    loader = data.train_dataloader()
    images = sum(len(targets) for _ in range(epochs) for _, targets in loader)
    data.teardown("fit")  # as Lightning does: the workers end, and are counted
    return images


def rates_of(*source: Any) -> dict[str, float]:
    """Images a second by the clock, and by the processor's time of this process and its workers."""
    before = os.times()
    images = read(*source)
    after = os.times()
    return {"clock": images / (after[4] - before[4]), "processor": images / (sum(after[:4]) - sum(before[:4]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "shards")
        folder.mkdir()
        total = make_shards(folder, options.shards, options.megabytes)
        with served(folder) as url:
            os.environ["ENSEMBLENET_CACHE"] = str(Path(place, "cache"))
            (folder / "small").write_bytes(b"1")
            for name in (str(folder), url):  # imports
                ImageData(name)
            remote_file(f"{url}/small").fetch()
            for workers in options.workers:
                rates = defaultdict(list)
                for number in range(options.rounds):
                    os.environ["ENSEMBLENET_CACHE"] = str(Path(place, f"cache-{workers}-{number}"))
                    os.environ["ENSEMBLENET_CACHE_GB"] = ""
                    near = total // options.shards // 2
                    for name, source, buffer in (
                        ("disk", str(folder), None),
                        ("first", url, None),
                        ("again", url, None),
                        ("near, disk", str(folder), near),
                        ("near", url, near),
                    ):
                        if name == "near":
                            os.environ["ENSEMBLENET_CACHE_GB"] = str(2.5 * options.megabytes / 1e3)
                            for copy in Path(os.environ["ENSEMBLENET_CACHE"]).glob("*.file"):
                                copy.unlink()
                        rates[name].append(rates_of(source, options.shards, workers, options.epochs, buffer))
                ratios = {
                    f"{name}, {by}": statistics.median(
                        one[by] / disk[by] for one, disk in zip(rates[name], rates[beside], strict=True)
                    )
                    for name, beside in (("first", "disk"), ("again", "disk"), ("near", "near, disk"))
                    for by in ("clock", "processor")
                }
                found.append({"workers": workers, "images_per_second": dict(rates), "ratio": ratios})
                print(found[-1], flush=True)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write_json(options.output, {"environment": environment(), "settings": settings, "images": total, "results": found})


if __name__ == "__main__":
    main()
