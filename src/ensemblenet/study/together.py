"""One trial in several processes, each with a device: they train by Lightning's DDP, and the first one measures."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import parent_process, util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from ensemblenet.errors import LOST_PROCESS, TrainingError
from ensemblenet.inputs import inputs_and_targets
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.runs import quiet_lightning
from ensemblenet.study.task import TrainingTask
from ensemblenet.training.callbacks import EpochSeed
from ensemblenet.training.executor import Outcome
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule

__all__ = ["all_agree", "end_with_parent", "in_processes", "train_together"]

_TIMEOUT = timedelta(minutes=30)
_LOOK = 0.1  # seconds


def in_processes(run: Callable[[], Outcome], number: int, device: str) -> Outcome:
    """The outcome of a function that several processes run together; a failed one where one of them fails.

    Args:
        run: a function of a module with its arguments, as `functools.partial` keeps them.
        number: of processes, which share the threads of this one.
        device: "cpu", or "cuda" for a GPU each.

    Returns:
        That of the first process, with the `cpu_seconds` of all.

    Raises:
        ChildProcessError: one of them was killed, as where memory ends.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # which tells whom it ends
    threads = max(1, torch.get_num_threads() // number)
    with tempfile.TemporaryDirectory() as meeting:
        try:
            start_processes(_process, (run, number, device, threads, meeting), number)
        except (ProcessRaisedException, ProcessExitedException) as error:
            told = [json.loads(file.read_text()) for file in Path(meeting).glob("*.json")]
            failed = [outcome for outcome in told if outcome["status"] == "failed"]
            own = [outcome for outcome in failed if not re.search(LOST_PROCESS, outcome["reason"])]
            if own and not getattr(error, "signal_name", None):
                return own[0]
            if isinstance(error, ProcessRaisedException):  # what is no outcome of a trial, such as a full disk
                raise OSError(str(error).strip().splitlines()[-1]) from error
            raise ChildProcessError(
                f"One of the {number} processes of a trial died, perhaps for want of memory. What is finished is kept: "
                "go on with --resume."
            ) from error
        outcomes = [json.loads((Path(meeting) / f"{rank}.json").read_text()) for rank in range(number)]
    return outcomes[0] | {"cpu_seconds": sum(outcome["cpu_seconds"] for outcome in outcomes)}


def _process(rank: int, run: Callable[[], Outcome], number: int, device: str, threads: int, meeting: str) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)  # by which Lightning knows that it has nothing to start
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{meeting}/meeting",
        rank=rank,
        world_size=number,
        timeout=_TIMEOUT,
    )
    outcome = run()
    write_json(Path(meeting) / f"{rank}.json", outcome)
    while outcome["status"] == "done" and not (Path(meeting) / "0.json").exists():
        time.sleep(_LOOK)  # the first one may not have heard all that this one said
    getattr(util, "_exit_function")()  # noqa: B009  as where a process ends by itself; no part of its types
    os._exit(outcome["status"] == "failed")  # Gloo's threads would abort an interpreter that ends (PyTorch 179291)


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end it, too: it would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def all_agree(found: bool) -> bool:
    """Whether something holds in all processes."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, found)
    return all(answers)


def train_together(
    task: TrainingTask, data: LightningDataModule, optimization: Optimization, epochs: int, seed: int, precision: str
) -> dict[str, float]:
    """As [`ensemblenet.study.trials.train`][], in each of the processes of a group, on its share of the examples."""
    quiet_lightning()
    device = next(task.parameters()).device
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=epochs,
        callbacks=[EpochSeed(seed)],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started, started_cpu = time.perf_counter(), time.process_time()
    trainer.fit(_Trained(task, optimization), datamodule=data)
    effort = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    data.trainer = None  # its loaders would give the share of this process
    task.to(device)
    return effort


class _Trained(LightningModule):
    def __init__(self, task: TrainingTask, optimization: Optimization) -> None:
        super().__init__()
        self.task = task
        self.optimization = optimization

    def on_train_epoch_start(self) -> None:
        self.total = torch.zeros((), device=self.device)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        x, y = inputs_and_targets(batch)
        loss = self.task.loss(x, y, self.trainer.global_step / self.trainer.estimated_stepping_batches)
        self.total += loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        if not self.total.isfinite():
            raise TrainingError(
                f"The loss became {self.total.item()} in epoch {self.current_epoch} at lr={self.optimization.lr:.3g}."
            )

    def validation_step(self, batch: Any, batch_index: int) -> None: ...  # which Lightning misses, and never calls

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.task, self.optimization, self.task.depths)
        schedule = build_schedule(optimizer, int(self.trainer.estimated_stepping_batches), self.optimization)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
