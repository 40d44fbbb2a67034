"""What happens along a run: its seeds, what it says, what it keeps and averages, and how fast it is."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from ensemblenet.conversion.capacity import Capacity
from ensemblenet.data.loading import seed_epoch, seed_generators
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import TrainingError
from ensemblenet.inputs import Inputs, inputs_and_targets, num_examples
from ensemblenet.metrics.scores import SCORES
from ensemblenet.storage.atomic import write_json
from ensemblenet.storage.bucket import address
from ensemblenet.storage.descriptions import DESCRIPTION
from ensemblenet.storage.restore import Describes, compare_classes, restore, stored_classes
from ensemblenet.training.capacity import CAPACITY, capacity_of
from ensemblenet.training.module import Classifier, plan_in_words

__all__ = [
    "Accepted",
    "Announce",
    "AveragedWeights",
    "ConvertFirst",
    "EpochSeed",
    "KeepClasses",
    "KnowCapacity",
    "Progress",
    "Speed",
    "time_left",
    "what_fits",
]

_WINDOW = 50
_BAR_WIDTH = 8


class EpochSeed(Callback):
    """Starts every epoch and every step from a seed of its own: what is replayed after a kill draws the same numbers.

    Shuffling, augmentation, mixing and dropout then depend on (seed, epoch, batch) alone and no generator needs saving.
    It holds for data that is loaded in the main process, and for data modules that seed their examples themselves.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed all global generators for the epoch, on all processes alike.

        The loader gets a generator of its own: making its iterator would draw from the global one.
        """
        loader = trainer.train_dataloader
        if isinstance(loader, DataLoader) and loader.generator is None:
            loader.generator = torch.Generator()
        seed_epoch(self.seed, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed them for the step, on each process otherwise."""
        key = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed_generators(*key)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(torch.initial_seed())


class KnowCapacity(Callback):
    """Tells the module, before it converts the base, what a run of the base showed.

    It is measured once and kept in the run's folder, so that a resumed run is converted as it was.

    Args:
        base_run: the folder of a finished run of the base.
        folder: the run's.

    Raises:
        ConversionError: that run trained a conversion.
    """

    def __init__(self, base_run: Path, folder: Path) -> None:
        self.base_run = base_run
        self.path = folder / CAPACITY

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure it, on the first process, or read it."""
        if trainer.is_global_zero and not self.path.exists():
            write_json(self.path, asdict(capacity_of(restore(self.base_run, trust=True))))  # what it names was typed
        trainer.strategy.barrier()
        assert isinstance(pl_module, Classifier)
        pl_module.capacity = Capacity(**json.loads(self.path.read_text(encoding="utf-8")))
        if stage == TrainerFn.FITTING:
            rank_zero_info(str(pl_module.capacity))


class ConvertFirst(Callback):
    """Comes before all others, so that what they copy, freeze or average in their own setup is what will be trained.

    Raises:
        TrainingError: the data gives several inputs, which runs of the command line do not know how to store.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the base, which Lightning would have done only after them."""
        pl_module.setup(stage)
        if isinstance(pl_module, Classifier) and not isinstance(pl_module.example_inputs, Tensor):
            inputs = Inputs.of(pl_module.example_inputs).describe(pl_module.network)
            raise TrainingError(
                f"`fit` trains networks of one tensor, and the data gives {inputs}: train it in Python, by Lightning's "
                "Trainer with ensemblenet.training.module.Classifier or by a loop of your own."
            )


class Accepted(Callback):
    """Keeps the settings of a run when its training begins: those of a resumed one were then accepted.

    Args:
        keep: writes them.
    """

    def __init__(self, keep: Callable[[], None]) -> None:
        self.keep = keep

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them; the checkpoint was restored before."""
        self.keep()


class Announce(Callback):
    """Says where a run is kept, what its conversion is, where it goes on, and at its end how much was skipped.

    Args:
        folder: the run's.
        changed: the settings that a resumed run has otherwise from now on, in words.
    """

    def __init__(self, folder: Path, changed: Sequence[str] = ()) -> None:
        self.folder = folder
        self.changed = changed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, once for all processes."""
        if not trainer.is_global_zero:
            return
        lines = [f"Run folder: {address(self.folder)}"]
        if isinstance(pl_module, Classifier) and pl_module.conversion is not None:
            assert isinstance(pl_module.network, EnsembleNet)
            lines.append(plan_in_words(pl_module.network))
            lines.append(f"The heads run {pl_module.choice.heads}: {pl_module.choice.reason}.")
            lines += [pl_module.inherited_scores] if pl_module.inherited_scores else []
        if isinstance(pl_module, Classifier) and pl_module.teacher is not None:
            lines.append(pl_module.teacher.note)
        if trainer.global_step:
            lines.append(f"It goes on in epoch {trainer.current_epoch + 1}, after {trainer.global_step:,} steps.")
            lines += [f"From now on {change}." for change in self.changed]
        for line in lines:
            Console().print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, where damaged records are skipped."""
        if trainer.is_global_zero and (skipped := getattr(trainer.train_dataloader, "skipped", 0)):
            print(f"Damaged records skipped in training, counted once an epoch: {skipped:,}")


class KeepClasses(Callback):
    """Keeps what the data says of itself when training begins, and refuses to go on with data of other classes.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, before the network is made for the data."""
        if stage == "fit":
            compare_classes(stored_classes(self.folder), trainer.datamodule)  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep it, once; a run that an earlier version began has kept nothing."""
        data, kept = trainer.datamodule, self.folder / DESCRIPTION  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.is_global_zero and isinstance(data, Describes) and not kept.exists():
            write_json(kept, data.description())


class AveragedWeights(WeightAveraging):
    """Keeps an exponential moving average of weights and statistics; it is what is validated, tested and stored.

    The decay begins low and rises to its own value, (1 + t) / (10 + t) after t steps, so that the first weights are
    soon forgotten. In a checkpoint the average stands as `state_dict`, the weights in training as
    `current_model_state`.

    Args:
        decay: the share of the average that a step keeps, below 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema must be in [0, 1), got {decay}.")
        self.decay = decay
        super().__init__(multi_avg_fn=self._average)

    def _average(self, averages: list[Tensor], currents: list[Tensor], steps: Tensor) -> None:
        """Move averages of one dtype towards what they average; nothing waits for the GPU."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, currents)  # pyright: ignore[reportPrivateImportUsage]
            return
        kept = ((1 + steps) / (10 + steps)).clamp(max=self.decay)
        change = torch._foreach_sub(currents, averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, (1 - kept).to(averages[0].dtype))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and weights; how the heads run may have changed with the checkpoint."""
        super().setup(trainer, pl_module, "fit")
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model, also where a resumed run had no step left."""
        self._copy_average_to_current(pl_module)


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
        self._steps.append((time.perf_counter(), num_examples(inputs_and_targets(batch)[0]) * trainer.world_size))
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
    """Lightning's bar on one line, epochs counted from 1, with speed and the time left until the run's last step.

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
        """What stands beside the bar, as much of it as the terminal has room for."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        if self._began is None or self.progress is None:
            return items
        began, first = self._began
        seconds = time.perf_counter() - began
        left = time_left(seconds, trainer.global_step - first, int(trainer.estimated_stepping_batches) - first)
        shown = {"left": left} | dict(_as_shown(name, value) for name, value in items.items())
        if self.speed.rate:  # not known in the first step of an epoch
            shown |= {"ex/s": f"{self.speed.rate:.0f}"}
        shown |= {"GB": f"{_memory(pl_module.device) / 1e9:.1f}"}
        batches = str(self.total_train_batches)
        taken = len(self._get_train_description(trainer.current_epoch)) + _BAR_WIDTH + len(f" {batches}/{batches}  ")
        return what_fits(shown, self.progress.console.width - taken)

    def _get_train_description(self, current_epoch: int) -> str:  # Lightning counts from 0
        epochs = self.trainer.max_epochs
        of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        return f"Epoch {current_epoch + 1}{of}".ljust(len(self.validation_description))


def _as_shown(name: str, value: Any) -> tuple[str, Any]:
    """A logged value by a short name, and a score as tables show it: of an accuracy the error in percent."""
    split, _, score = name.rpartition("/")
    if score in SCORES and isinstance(value, float):
        return f"{split} {SCORES[score].heading}".strip(), SCORES[score].text(value)
    return name.removeprefix("train/"), f"{value:.3f}" if isinstance(value, float) else str(value)


def what_fits(items: Mapping[str, str], room: int) -> dict[str, str]:
    """The first items that fit on a line as `name: value`, one blank between them.

    Example:
        >>> what_fits({"left": "0:03:00", "loss": "1.250", "GB": "1.0"}, room=25)
        {'left': '0:03:00', 'loss': '1.250'}
    """
    ends = accumulate(len(f"{name}: {value} ") for name, value in items.items())
    return {name: value for (name, value), end in zip(items.items(), ends, strict=True) if end - 1 <= room}


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
