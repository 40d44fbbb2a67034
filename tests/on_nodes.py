"""What tests run on the nodes of a Ray cluster, and two such nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from commands import own_environment
from lightning.pytorch import Callback, LightningModule, Trainer
from ray.cluster_utils import Cluster


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Two nodes of one CPU each on this machine."""
    with _as_a_node():
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    add_node(nodes)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def add_node(nodes: Cluster) -> None:
    """One more node of one CPU."""
    with _as_a_node():
        nodes.add_node(num_cpus=1)


@contextmanager
def _as_a_node() -> Iterator[None]:
    """The environment of a node, whose processes find this module; afterwards SIGTERM is not Ray's to answer."""
    on_terminate = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own_environment(Path(__file__).parent).items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield
    signal.signal(signal.SIGTERM, on_terminate)


class Waiting(torch.nn.Linear):
    """A base that says where it is made, and waits there."""

    def __init__(self, folder: str) -> None:
        super().__init__(40, 10)
        if not ray.is_initialized():
            return
        Path(folder, f"{ray.get_runtime_context().get_node_id()}.{os.getpid()}").touch()
        end = time.monotonic() + 120
        while not Path(folder, "go").exists():
            assert time.monotonic() < end
            time.sleep(0.05)


class Dies(Callback):
    """Kills the last process of a run of heads in its second epoch, once, if it has stored a step."""

    def __init__(self, died: str) -> None:
        self.died = Path(died)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_last = trainer.global_rank == trainer.world_size - 1
        if is_last and pl_module.num_heads > 1 and trainer.current_epoch == 1 and batch_idx and not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
