"""One cell of a study: one method trained once with one setting and one seed, and measured."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, seed_everything
from torch import Tensor, nn

from ensemblenet.data import DataModule
from ensemblenet.errors import EnsembleNetError, TrainingError
from ensemblenet.study.measures import Measures
from ensemblenet.study.methods import METHODS, Contender, Setup, Source
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule

__all__ = ["Cell", "Outcome", "Precision", "Workers", "instantiate", "run_cell", "train", "training_memory"]

Phase = Literal["tune", "test"]
Precision = Literal["32", "bf16"]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """All that the outcome of one training depends on, as plain data.

    Args:
        name: of the method in this study.
        method: a key of `METHODS`.
        setup: what the method is set up with.
        base: `class_path` and `init_args` of the network.
        data: `class_path` and `init_args` of the data module.
        phase: "tune" is measured on validation examples, "test" on test examples.
        seed: of the weights, the order of examples and augmentation.
        optimization: optimizer, learning rate and weight decay.
        epochs: passes over the training examples.
        device: where to train.
        precision: "bf16" trains and measures under bfloat16 autocast, "32" in float32.
    """

    name: str
    method: str
    setup: Setup
    base: dict[str, Any]
    data: dict[str, Any]
    phase: Phase
    seed: int
    optimization: Optimization
    epochs: int
    device: str = "cpu"
    precision: Precision = "32"

    @property
    def key(self) -> str:
        """A text that two cells share exactly if they are the same."""
        return json.dumps(asdict(self), sort_keys=True)

    def data_module(self) -> LightningDataModule:
        """The data, set up; a process keeps those of its last cell."""
        data: Any = _data_module(json.dumps(self.data))
        if self.data.get("init_args", {}).get("seed", 0) is None:
            data.seed = self.seed  # of data that asks for the run's own
        return data

    def contender(self, example: Tensor) -> Contender:
        """The untrained network with its loss, for inputs like these, (N, *)."""

        def make_base() -> nn.Module:
            return instantiate(nn.Module, self.base).to(example.device)

        made = METHODS[self.method].build(Source(make_base, example, self.seed), self.setup)
        # the layouts in which convolutions of images and of clips are fast
        for clips in (module for module in made.modules() if isinstance(module, nn.Conv3d)):
            clips.to(memory_format=torch.channels_last_3d)
        return made.to(memory_format=torch.channels_last) if example.ndim == 4 else made


def run_cell(cell: Cell) -> Outcome:
    """Train and measure; an error is an outcome as well, so that a study goes on.

    Returns:
        `status` "done" with what [`ensemblenet.study.measures.Measures`][] lists, `seconds` and `cpu_seconds` of
        training; or `status` "failed" with the `reason`.
    """
    try:
        data = cell.data_module()
        example = _inputs(next(iter(data.train_dataloader()))).to(cell.device)
        contender = cell.contender(example)
        effort = train(contender, data, cell.optimization, cell.epochs, cell.seed, cell.precision)
        loader = data.val_dataloader() if cell.phase == "tune" else data.test_dataloader()
        return {"status": "done", **_measure(contender, loader, cell.setup.task, cell.precision), **effort}
    except Exception as error:
        return {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}


class Workers:
    """Processes of one thread each that run cells; a context manager, as they end with it.

    Args:
        number: how many processes; 0 runs the cells in this one, one after another.
    """

    def __init__(self, number: int) -> None:
        self.pool: ProcessPoolExecutor | None = None
        if number > 0:
            spawn = get_context("spawn")
            self.pool = ProcessPoolExecutor(number, mp_context=spawn, initializer=_start_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Outcome]]:
        """Give the outcome of each cell as soon as it is there.

        Raises:
            TrainingError: a worker died, as it does when memory ends.
        """
        if self.pool is None:
            yield from ((cell, run_cell(cell)) for cell in cells)
            return
        try:
            pending = {self.pool.submit(run_cell, cell): cell for cell in cells}
            for outcome in as_completed(pending):
                yield pending[outcome], outcome.result()
        except BrokenExecutor as error:
            raise TrainingError(
                "A worker process died, perhaps for want of memory. What is finished is kept: go on with --resume, "
                "with fewer --workers."
            ) from error


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a killed study would leave its workers waiting for ever
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def train(
    contender: Contender,
    data: LightningDataModule,
    optimization: Optimization,
    epochs: int,
    seed: int,
    precision: Precision = "32",
) -> dict[str, float]:
    """Train in place, without Lightning's cost per step, which is larger than a step of a small network.

    Args:
        contender: what to train, on its device.
        data: a data module whose training batches begin with inputs and targets.
        optimization: optimizer and learning rate; all modules of the method are trained by it.
        epochs: passes over the training examples.
        seed: of the data, unless it has a seed of its own; and every epoch starts from a seed made of this one.
        precision: of the forward pass.

    Returns:
        `seconds` by the clock, and `cpu_seconds` of this process.

    Raises:
        TrainingError: the loss became non-finite.
    """
    device = next(contender.parameters()).device
    if isinstance(data, DataModule):
        data.reseed(seed)
    loader = data.train_dataloader()
    steps = epochs * len(loader)
    optimizer = build_optimizer(contender, optimization)
    schedule = build_schedule(optimizer, steps, optimization)
    started, started_cpu = time.perf_counter(), time.process_time()
    contender.train()
    step = 0
    for epoch in range(epochs):
        seed_everything((seed * 1_000_003 + epoch) % 2**32, verbose=False)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for batch in loader:
            x, y = _inputs(batch).to(device), _targets(batch).to(device)
            with _autocast(device, precision):
                loss = contender.loss(x, y, step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            step += 1
        if not total.isfinite():  # asked once an epoch: a GPU would have to wait at every step
            raise TrainingError(f"The loss became {total.item()} in epoch {epoch} at lr={optimization.lr:.3g}.")
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}


def training_memory(contender: Contender, x: Tensor, target: Tensor, optimization: Optimization) -> int:
    """The bytes that one training step holds: weights, gradients, optimizer state, and what backward needs.

    It is counted, not measured: allocators and temporary results come on top. The contender is trained by one step.

    Args:
        contender: an untrained contender.
        x: a training batch, (N, *).
        target: its targets.
        optimization: whose optimizer keeps the state.

    Example:
        >>> contender = Contender(nn.Linear(4, 3), lambda z, y, progress: z.square().mean())
        >>> training_memory(contender, torch.zeros(10, 4), torch.zeros(10), Optimization("sgd", momentum=0.0))
        400
    """
    optimizer = build_optimizer(contender, optimization)
    weights = {parameter.untyped_storage().data_ptr() for parameter in contender.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = contender.train().loss(x, target, 1.0)
    loss.backward()
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    gradients = [parameter.grad for parameter in contender.parameters() if parameter.grad is not None]
    buffers = list(contender.buffers())
    return sum(saved.values()) + sum(t.nbytes for t in (*contender.parameters(), *buffers, *gradients, *state))


def instantiate(kind: type[Any], spec: dict[str, Any]) -> Any:
    """Make what a `class_path` with `init_args` describes.

    Args:
        kind: what it must be an instance of.
        spec: plain data with the two keys.

    Raises:
        TrainingError: the class does not take these arguments; user errors of its own pass.

    Example:
        >>> instantiate(nn.Module, {"class_path": "torch.nn.ReLU", "init_args": {"inplace": True}})
        ReLU(inplace=True)
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made", required=True)
    try:
        return parser.instantiate(parser.parse_object({"made": spec}))["made"]
    except (ArgumentError, ValueError) as error:
        if isinstance(error, EnsembleNetError):
            raise
        raise TrainingError(f"{spec['class_path']} cannot be made: {error}") from error


@lru_cache(maxsize=1)
def _data_module(spec: str) -> LightningDataModule:
    data = instantiate(LightningDataModule, json.loads(spec))
    data.prepare_data()
    data.setup()
    return data


@torch.no_grad()
def _measure(contender: Contender, loader: Iterable[Any], task: Any, precision: Precision) -> Outcome:
    device = next(contender.parameters()).device
    contender.eval()
    measures: Measures | None = None
    for batch in loader:
        with _autocast(device, precision):
            outputs, prediction = contender(_inputs(batch).to(device))
        if measures is None:
            measures = Measures(outputs.shape[2], len(outputs), task)
        measures.update(outputs, prediction, _targets(batch))
    if measures is None:
        raise TrainingError("There are no examples to measure on.")
    values = measures.compute()
    if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
        raise TrainingError("The trained network's outputs are not finite.")
    students = contender.students or range(len(values["head_errors"]))
    return values | {"head_error": sum(values["head_errors"][k] for k in students) / len(students)}


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """To be entered anew for every step: within one, autocast keeps the weights that it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _inputs(batch: Any) -> Tensor:
    return batch[0]


def _targets(batch: Any) -> Tensor:
    return batch[1]
