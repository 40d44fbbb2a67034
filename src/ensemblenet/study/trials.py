"""One trial of a study: a method trained once with one setting and one seed, and measured."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, seed_everything
from torch import Tensor, nn

from ensemblenet._moved import renamed
from ensemblenet.cost import Budget
from ensemblenet.data import DataModule
from ensemblenet.data.loading import seed_epoch
from ensemblenet.errors import LoadError, TrainingError
from ensemblenet.inputs import Tree, call, inputs_and_targets, tensors_in, to_device
from ensemblenet.recipe import Conversion
from ensemblenet.storage.kept import keep_weights, take_weights
from ensemblenet.storage.specs import instantiate, with_defaults
from ensemblenet.study.halves import halve_validation
from ensemblenet.study.measures import Measures
from ensemblenet.study.methods import METHODS
from ensemblenet.study.task import Setup, Source, TrainingTask
from ensemblenet.study.together import all_agree, end_with_parent, in_processes, train_together
from ensemblenet.training.executor import Outcome
from ensemblenet.training.inheriting import calibration_batches
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule, layer_depths

__all__ = [
    "Outcome",
    "Phase",
    "Precision",
    "Trial",
    "Workers",
    "open_data",
    "run_trial",
    "train",
    "training_memory",
    "trial_key",
    "trial_of",
]

__getattr__ = renamed(__name__, {"Cell": "Trial", "run_cell": "run_trial"})

Phase = Literal["tune", "test"]
Precision = Literal["32", "bf16"]


@dataclass(frozen=True)
class Trial:
    """All that the outcome of one training depends on, as plain data.

    Args:
        name: the method's name in this study.
        method: a key of `METHODS`.
        setup: the method's settings.
        base: `class_path` and `init_args` of the network.
        data: `class_path` and `init_args` of the data module.
        phase: "tune" is measured on validation examples, "test" on test examples.
        seed: the seed of weights, order of examples and augmentation.
        optimization: optimizer, learning rate and weight decay.
        epochs: passes over the training examples.
        device: the device to train on.
        precision: "bf16" trains and measures under bfloat16 autocast, "32" in float32.
        halved: whether validation and test examples are halves of the validation data, which has no test split.
        teacher: the trial whose trained network teaches this one; None where the method learns from none.
        devices: the number of devices, with a process each, that train it together.

    Example:
        >>> base = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 40, "out_features": 10}}
        >>> data = {"class_path": "ensemblenet.data.MNIST1D"}
        >>> trial = Trial("base", "base", Setup(), base, data, "test", 0, Optimization(), epochs=1)
        >>> trial.task(torch.zeros(2, 40)).network
        Linear(in_features=40, out_features=10, bias=True)
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
    halved: bool = False
    teacher: Trial | None = None
    devices: int = 1

    @property
    def key(self) -> str:
        """A text that two trials share exactly if they are the same."""
        return trial_key(asdict(self))

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name}, seed {self.seed}"

    @property
    def inherits(self) -> bool:
        """Whether heads begin with the base's weights."""
        return self.setup.conversion.init == "inherit"

    def data_module(self) -> LightningDataModule:
        """The data module, set up; a process keeps that of its last trial, and begins its training data anew."""
        data, _ = open_data(json.dumps(self.data))
        if isinstance(data, DataModule):
            data.reseed(self.seed)
        return data

    def task(self, example: Tree, teacher: nn.Module | None = None, calibration: Sequence[Any] = ()) -> TrainingTask:
        """The network with its loss, before its training.

        Args:
            example: inputs, (N, *), on the trial's device.
            teacher: the network that teaches it.
            calibration: batches of training data, by which heads inherit.
        """
        device = tensors_in(example)[0].device

        def make_base() -> nn.Module:
            return instantiate(nn.Module, self.base).to(device)

        source = Source(make_base, example, self.seed, teacher, calibration if self.inherits else ())
        made = METHODS[self.method].build(source, self.setup)
        if self.optimization.layer_decay < 1:
            made.depths = layer_depths(make_base(), example, self.setup.conversion.output)
        # the layouts in which convolutions of images and of clips are fast
        for clips in (module for module in made.modules() if isinstance(module, nn.Conv3d)):
            clips.to(memory_format=torch.channels_last_3d)
        is_images = isinstance(example, Tensor) and example.ndim == 4
        return made.to(memory_format=torch.channels_last) if is_images else made


def trial_of(stored: Mapping[str, Any]) -> Trial:
    """The trial that a dictionary describes, as `dataclasses.asdict` made it and JSON kept it.

    Example:
        >>> trial = Trial("base", "base", Setup(), {}, {}, "test", 0, Optimization(), epochs=1)
        >>> trial_of(json.loads(json.dumps(asdict(trial)))) == trial
        True
    """
    conversion = dict(stored["setup"]["conversion"])
    if isinstance(conversion["budget"], Mapping):
        conversion["budget"] = Budget.of(conversion["budget"])
    made: dict[str, Any] = {
        "setup": Setup(**{**stored["setup"], "conversion": Conversion(**conversion)}),
        "optimization": Optimization(**stored["optimization"]),
        "teacher": None if stored["teacher"] is None else trial_of(stored["teacher"]),
    }
    return Trial(**{**stored, **made})


def trial_key(stored: Mapping[str, Any]) -> str:
    """The key of a stored trial.

    Arguments that a class or the settings did not have yet are filled in with their defaults, so that older studies
    can be resumed.

    Args:
        stored: a trial as a dictionary.

    Example:
        >>> trial_key({"setup": {}, "device": "cpu"}) == trial_key({"setup": {"weight": 2.0}, "precision": "32"})
        True
    """
    filled = {"device": "cpu", "precision": "32", "halved": False, "teacher": None, "devices": 1, **stored}
    if filled["teacher"] is not None:
        filled["teacher"] = trial_key(filled["teacher"])
    filled["setup"] = _complete_setup(stored.get("setup", {}))
    filled["optimization"] = asdict(Optimization()) | stored.get("optimization", {})
    for name in ("base", "data"):
        filled[name] = json.loads(_complete(name, json.dumps(stored.get(name, {}))))
    return json.dumps(filled, sort_keys=True)


def _complete_setup(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The setup of a stored trial; version 0.1 wrote what is asked of a conversion beside the rest."""
    setup = asdict(Setup())
    beside = {key: value for key, value in stored.items() if key in setup["conversion"]}
    conversion = setup["conversion"] | stored.get("conversion", {}) | beside
    if isinstance(conversion["budget"], dict):
        conversion["budget"] = asdict(Budget()) | conversion["budget"]
    return setup | {key: value for key, value in stored.items() if key not in beside} | {"conversion": conversion}


@lru_cache(maxsize=64)
def _complete(name: str, spec: str) -> str:
    kind = nn.Module if name == "base" else LightningDataModule
    stored = json.loads(spec)
    try:
        return json.dumps(with_defaults(kind, stored), default=str) if "class_path" in stored else spec
    except LoadError:  # an unknown class: such a trial fails, and its key is what was stored
        return spec


def run_trial(trial: Trial, weights: Path | None = None) -> Outcome:
    """Train and measure; an error of the training is an outcome as well, so that a study goes on.

    Args:
        trial: what to train.
        weights: the folder for the weights of trained bases, which teach other trials; None keeps none, and trains a
            teacher anew, which gives the same one.

    Returns:
        `status` "done" with what [`ensemblenet.study.measures.Measures`][] lists, `seconds` and `cpu_seconds` of
        training; or `status` "failed" with the `reason`.

    Example:
        >>> base = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 40, "out_features": 10}}
        >>> data = {"class_path": "no.such.Data"}
        >>> run_trial(Trial("base", "base", Setup(), base, data, "test", 0, Optimization(), epochs=1))["status"]
        'failed'
    """
    if trial.devices > 1:
        return in_processes(partial(_outcome, trial, weights), trial.devices, trial.device)
    return _outcome(trial, weights)


def _outcome(trial: Trial, weights: Path | None) -> Outcome:
    """As `run_trial`, in this process; where several run it, the others than the first measure nothing."""
    try:
        teacher = None if trial.teacher is None else _teacher(trial.teacher, weights)
        task, data = _prepared(trial, teacher)
        effort = _train(trial, task, data)
        if trial.devices > 1:
            if dist.get_rank() > 0:
                return {"status": "done", **effort}
            dist.destroy_process_group()  # or metrics would wait for those of the others
        if weights is not None and trial.method == "base":
            keep_weights(task.network, weights, trial.key)
        loader = data.val_dataloader() if trial.phase == "tune" else data.test_dataloader()
        return {"status": "done", **_measure(task, loader, trial.setup.task, trial.precision), **effort}
    except OSError:  # a full disk, or data that is gone, says nothing of the method
        raise
    except Exception as error:
        return {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}


def _prepared(trial: Trial, teacher: nn.Module | None = None) -> tuple[TrainingTask, LightningDataModule]:
    """What a trial trains, on its device, and its data."""
    data = trial.data_module()
    loader = data.train_dataloader()
    seed_everything(trial.seed, verbose=False)  # decides on the batches by which heads inherit
    batches = calibration_batches(loader) if trial.inherits else [next(iter(loader))]
    example, _ = inputs_and_targets(batches[0])
    return trial.task(to_device(example, trial.device), teacher, batches), data


def _teacher(trial: Trial, weights: Path | None) -> nn.Module:
    """The trained base of a trial, as it was kept; where it was not, or is damaged, it is trained again."""
    task, data = _prepared(trial)
    is_kept = weights is not None and take_weights(task.network, weights, trial.key)
    if trial.devices > 1 and not all_agree(is_kept):  # one may have looked before another trial kept them
        is_kept = False
        task, data = _prepared(trial)
    if not is_kept:
        _train(trial, task, data)
        if weights is not None and (trial.devices == 1 or dist.get_rank() == 0):
            keep_weights(task.network, weights, trial.key)
    return task.network


def _train(trial: Trial, task: TrainingTask, data: LightningDataModule) -> dict[str, float]:
    how = train if trial.devices == 1 else train_together
    return how(task, data, trial.optimization, trial.epochs, trial.seed, trial.precision)


class Workers:
    """Processes of one thread each that run trials; a context manager, as they end with it.

    Args:
        number: the number of processes; 0 runs the trials in this one, one after another.
        weights: as [`run_trial`][ensemblenet.study.trials.run_trial] takes it.

    Example:
        >>> with Workers(0) as workers:
        ...     list(workers.run([]))
        []
    """

    def __init__(self, number: int, weights: Path | None = None) -> None:
        self.number = number
        self.weights = () if weights is None else (weights,)
        self.pool: ProcessPoolExecutor | None = None
        if number > 0:
            spawn = get_context("spawn")
            self.pool = ProcessPoolExecutor(number, mp_context=spawn, initializer=_start_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.pool is not None:
            if error is not None:  # nobody waits for what they do
                for process in list((self.pool._processes or {}).values()):
                    process.terminate()
            self.pool.shutdown(cancel_futures=True)

    def warm_up(self, data: Mapping[str, Any]) -> None:
        """Let all processes start and read the data, while this one does something else."""
        if self.pool is not None:
            with _interrupts_ignored():  # a terminal interrupts all processes; this one ends them
                for _ in range(self.number):
                    self.pool.submit(open_data, json.dumps(data))

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        """Give the outcome of each trial as soon as it is there.

        Raises:
            TrainingError: a worker died, as it does when memory ends.
        """
        if self.pool is None:
            yield from ((trial, run_trial(trial, *self.weights)) for trial in trials)
            return
        try:
            pending = {self.pool.submit(run_trial, trial, *self.weights): trial for trial in trials}
            for outcome in as_completed(pending):
                yield pending[outcome], outcome.result()
        except BrokenExecutor as error:
            raise TrainingError(
                "A worker process died, perhaps for want of memory. What is finished is kept: go on with --resume, "
                "with fewer --workers."
            ) from error


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Also by the processes that are started within it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def train(
    task: TrainingTask,
    data: LightningDataModule,
    optimization: Optimization,
    epochs: int,
    seed: int,
    precision: Precision = "32",
) -> dict[str, float]:
    """Train in place, without Lightning's cost per step, which is larger than a step of a small network.

    Args:
        task: the network and its loss, on its device.
        data: a data module of batches as [`ensemblenet.inputs.inputs_and_targets`][] takes them.
        optimization: optimizer and learning rate; all modules of the method are trained by it.
        epochs: passes over the training examples.
        seed: every epoch starts from a seed made of this one.
        precision: the precision of the forward pass.

    Returns:
        `seconds` by the clock, and `cpu_seconds` of this process.

    Raises:
        TrainingError: the loss became non-finite.
    """
    device = next(task.parameters()).device
    loader = data.train_dataloader()
    steps = epochs * len(loader)
    optimizer = build_optimizer(task, optimization, task.depths)
    schedule = build_schedule(optimizer, steps, optimization)
    started, started_cpu = time.perf_counter(), time.process_time()
    task.train()
    step = 0
    for epoch in range(epochs):
        seed_epoch(seed, epoch)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for batch in loader:
            x, y = to_device(inputs_and_targets(batch), device)
            with _autocast(device, precision):
                loss = task.loss(x, y, step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            step += 1
        if not total.isfinite():  # asked once an epoch: a GPU would have to wait at every step
            raise TrainingError(f"The loss became {total.item()} in epoch {epoch} at lr={optimization.lr:.3g}.")
    effort = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    data.teardown("fit")
    return effort


def training_memory(task: TrainingTask, x: Tree, target: Tensor, optimization: Optimization) -> int:
    """The bytes that one training step holds: weights, gradients, optimizer state, and what backward needs.

    It is counted, not measured: allocators and temporary results come on top. The network is trained by one step.

    Args:
        task: an untrained network and its loss.
        x: a training batch, (N, *).
        target: its targets.
        optimization: whose optimizer keeps the state.

    Example:
        >>> task = TrainingTask(nn.Linear(4, 3), lambda z, y, progress: z.square().mean())
        >>> training_memory(task, torch.zeros(10, 4), torch.zeros(10), Optimization("sgd", momentum=0.0))
        400
    """
    optimizer = build_optimizer(task, optimization)
    weights = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.train().loss(x, target, 1.0)
    loss.backward()
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    buffers = list(task.buffers())
    return sum(saved.values()) + sum(t.nbytes for t in (*task.parameters(), *buffers, *gradients, *state))


@lru_cache(maxsize=1)
def open_data(spec: str) -> tuple[LightningDataModule, tuple[int, int] | None]:
    """A data module that is set up, its validation data halved where there is no test split.

    Args:
        spec: `class_path` and `init_args`, as JSON.

    Returns:
        It, and the number of examples in each half, None where nothing was halved.
    """
    data = instantiate(LightningDataModule, json.loads(spec))
    data.prepare_data()
    data.setup()
    return data, halve_validation(data) if isinstance(data, DataModule) and data.tests_on_validation else None


@torch.no_grad()
def _measure(task: TrainingTask, loader: Iterable[Any], kind: Any, precision: Precision) -> Outcome:
    device = next(task.parameters()).device
    task.eval()
    measures: Measures | None = None
    for batch in loader:
        x, y = inputs_and_targets(batch)
        with _autocast(device, precision):
            outputs, prediction = call(task, to_device(x, device))
        if measures is None:
            measures = Measures(outputs.shape[2], len(outputs), kind)
        measures.update(outputs, prediction, y)
    if measures is None:
        raise TrainingError("There are no examples to measure on.")
    values = measures.compute()
    if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
        raise TrainingError("The trained network's outputs are not finite.")
    students = task.students or range(len(values["head_errors"]))
    return values | {"head_error": sum(values["head_errors"][k] for k in students) / len(students)}


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """To be entered anew for every step: within one, autocast keeps the weights that it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
