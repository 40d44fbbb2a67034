"""How fast a run is, what memory it takes, and how long it will take yet."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ["Progress", "Speed", "time_left"]

_WINDOW = 50
_BAR_WIDTH = 10


class Speed(Callback):
    """Logs examples a second over all processes, `speed/examples_per_second`, and memory, `speed/memory_gb`.

    Both are taken over the last steps of training, without the time of validation. Memory is the most that the GPU had
    to hold so far, or what the process holds where there is none.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what lies between epochs."""
        self._steps.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self._steps.append((time.perf_counter(), len(batch[0]) * trainer.world_size))
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]  0: never
        if len(self._steps) > 1 and every and trainer.global_step % every == 0:
            values = {"speed/examples_per_second": self.rate, "speed/memory_gb": _memory(pl_module.device) / 1e9}
            pl_module.log_dict(values, rank_zero_only=True, batch_size=1)

    @property
    def rate(self) -> float:
        """Examples a second; 0 where that is not known yet."""
        if len(self._steps) < 2:
            return 0.0
        seconds = self._steps[-1][0] - self._steps[0][0]
        return sum(examples for _, examples in list(self._steps)[1:]) / seconds


class Progress(RichProgressBar):
    """Lightning's bar, with examples a second and the time left until the last step of the run.

    Args:
        speed: what measures it.
    """

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self.speed = speed
        self._began: tuple[float, int] | None = None

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """In training a short bar, and no times of the epoch: what stands beside it would not fit a terminal."""
        columns = super().configure_columns(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return columns
        description, bar, batches, *_ = columns
        bar.bar_width = _BAR_WIDTH
        return [description, bar, batches]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when it began, and at which step."""
        super().on_train_start(trainer, pl_module)
        self._began = time.perf_counter(), trainer.global_step

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        if self._began is None or not trainer.training:
            return items
        began, first = self._began
        seconds = time.perf_counter() - began
        left = time_left(seconds, trainer.global_step - first, int(trainer.estimated_stepping_batches) - first)
        return items | {
            "examples/s": f"{self.speed.rate:.0f}",
            "GB": f"{_memory(pl_module.device) / 1e9:.1f}",
            "left": left,
        }


def time_left(seconds: float, done: int, steps: int) -> str:
    """How long the rest takes at the speed so far, validation included.

    Example:
        >>> time_left(60.0, done=10, steps=40), time_left(1.0, done=0, steps=40)
        ('0:03:00', '?')
    """
    if done < 1:
        return "?"
    return str(timedelta(seconds=round(seconds / done * max(0, steps - done))))


def _memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
