"""Memory of the tagging metrics over as many videos as YouTube-8M's full validation set has.

    OMP_NUM_THREADS=2 python benchmarks/tagging_memory.py

Logits of 2 heads and targets are drawn once and used again, rolled along classes, so that what grows is the metrics'.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from ensemblenet.metrics.tagging import TaggingMetrics
from ensemblenet.storage.runs import environment

RESULTS = Path(__file__).parent / "results" / "tagging_memory.json"
VIDEOS, CLASSES, HEADS, BATCH = 1_100_000, 3862, 2, 2000


def resident() -> float:
    """Memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(HEADS, BATCH, CLASSES) - 5
    target = (torch.rand(BATCH, CLASSES) < 3 / CLASSES).long()
    metrics = TaggingMetrics(CLASSES, HEADS)
    metrics.update(logits, target)
    metrics.reset()  # what the first update allocates for itself is there now
    before, begin = resident(), time.perf_counter()
    for step in range(VIDEOS // BATCH):
        metrics.update(logits.roll(step, 2), target)
        if step % 50 == 0:
            print(f"{step * BATCH:,} videos, {resident() - before:.0f} MB more, {time.perf_counter() - begin:.0f} s")
    after = resident()
    scores = metrics.compute()
    record = {
        "environment": environment(),
        "videos": VIDEOS,
        "classes": CLASSES,
        "heads": HEADS,
        "mb_after_updates": round(after - before, 1),
        "mb_after_compute": round(resident() - before, 1),
        "gap": float(scores["gap"]),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
