"""Train from a YAML file, and go on where a run was killed."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from torch.utils.data import DataLoader

from ensemblenet.cost import measure_cost
from ensemblenet.data import __all__ as data_modules
from ensemblenet.data import load_all
from ensemblenet.data.loading import seed_generators
from ensemblenet.errors import TrainingError
from ensemblenet.recipe import Conversion
from ensemblenet.storage import TRUST_HELP
from ensemblenet.storage.atomic import atomic_path, write_json
from ensemblenet.storage.lock import KeepFolder, sole_writer
from ensemblenet.storage.restore import Describes, expect_classes, store, stored_classes
from ensemblenet.storage.runs import (
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    RESULTS,
    create_run_folder,
    environment,
    quiet_lightning,
    scores_row,
)
from ensemblenet.storage.trust import config_option
from ensemblenet.training.averaging import AveragedWeights
from ensemblenet.training.checkpoints import AtomicCheckpointIO
from ensemblenet.training.classes import KeepClasses
from ensemblenet.training.module import Classifier
from ensemblenet.training.processes import agreed_folder, is_first_process
from ensemblenet.training.progress import Progress, Speed
from ensemblenet.training.resume import changed_setting, take_unfinished
from ensemblenet.training.search import Candidate, before_search, candidates, search

__all__ = ["EpochSeed", "fit"]

_USAGE = "ensemblenet fit --config FILE [--data FOLDER] [--KEY VALUE ...]"
_DESCRIPTION = """Train a network, or the multi-headed model that it converts to.

It needs a YAML file: `ensemblenet fit --config configs/mnist1d/ensemblenet.yaml`. Every setting of the file
is also an option below. `model.base` takes a class_path with init_args, your own classes too if their folder
is on PYTHONPATH; so does `data`, and `--data FOLDER` is short for --data.init_args.folder FOLDER. The run gets a
folder of its own under --runs with the configuration, the environment, logs for TensorBoard and as CSV,
checkpoints, and results.json.
"""
_MLFLOW_RUN = "mlflow_run.txt"
_TRUST = "--trust"


def fit(arguments: Sequence[str]) -> Path:
    """Train from a configuration, test, and write down the results.

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.

    Raises:
        TrainingError: bad arguments, nothing to resume, a run that another process is writing or that was made
            with other settings, or a loss that became non-finite.
    """
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it takes them for the user's
    with ExitStack() as held:
        cli = _opened(arguments, held)
        if cli.config["plan"] == "search":
            # what is stored was checked or typed before
            found = [*config_option(cli.folder / CONFIG, trust=True), *_arguments(_searched(cli))]
            cli = _opened(found, held, cli.folder)
        return _finished(cli)


def _finished(cli: _FitCLI) -> Path:
    """The folder of a run after its training, its test and its results."""
    folder, module, data = cli.folder, cli.model, cli.datamodule
    if is_first_process():
        write_json(folder / ENVIRONMENT, environment())
    _train(cli)
    [metrics] = cli.trainer.test(module, data, verbose=False)
    if not is_first_process():
        return folder
    description = data.description() if isinstance(data, Describes) else {}
    store(module.network, module.task, module.example_inputs.shape[1:], description, folder)
    row = _row(module, metrics, cli.config["seed_everything"])
    write_json(folder / RESULTS, {"rows": [row]})
    return folder


def _opened(arguments: Sequence[str], held: ExitStack, folder: Path | None = None) -> _FitCLI:
    """A run that is ready to begin, or to go on; its folder is this process's until held ends."""
    quiet_lightning()
    complete = _with_stored_config(_with_data_folder(arguments))
    load_all()
    try:
        return _FitCLI(complete, held, folder)
    except ArgumentError as error:
        raise TrainingError(_plain(error)) from error
    except MisconfigurationException as error:
        raise TrainingError(str(error)) from error
    except ValueError as error:  # of a class that the configuration names; jsonargparse wraps it at length
        raise TrainingError(str(_innermost(error))) from error


def _train(cli: _FitCLI) -> None:
    checkpoint = cli.folder / CHECKPOINT
    resumed = str(checkpoint) if checkpoint.exists() else None
    expect_classes(stored_classes(cli.folder), cli.datamodule)
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resumed, weights_only=True)
    except MisconfigurationException as error:
        raise TrainingError(str(error)) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"A process that loads data died: {error} If memory ran out, use fewer num_workers or smaller batches."
        ) from error
    if cli.trainer.interrupted:
        raise KeyboardInterrupt


def _searched(cli: _FitCLI) -> Candidate:
    """The plan that short runs in a folder within the run's chose."""
    if cli.trainer.world_size > 1:
        raise TrainingError("--plan search runs in one process; train the plan that it finds in several.")
    epochs = cli.config["trainer"]["max_epochs"]
    if epochs is None:
        raise TrainingError("--plan search shortens runs by epochs: give --trainer.max_epochs.")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    inputs, *_ = next(iter(cli.datamodule.train_dataloader()))
    entrants = candidates(cli.model.network, inputs, cli.model.conversion or Conversion())

    def score(candidate: Candidate, length: int) -> float:
        where = ["--runs", str(cli.folder / "search"), "--name", f"{candidate.name}-{length}-epochs"]
        short = ["--resume", "auto", *where, "--trainer.max_epochs", str(length)]
        with ExitStack() as held:
            stored = config_option(cli.folder / CONFIG, trust=True)
            proxy = _opened([*stored, *short, *_arguments(candidate)], held)
            _train(proxy)
            [metrics] = proxy.trainer.validate(proxy.model, proxy.datamodule, verbose=False)
        gc.collect()  # trainers and modules refer to each other: those of earlier runs would fill the memory
        return metrics[f"val/{'accuracy' if proxy.model.task == 'multiclass' else 'gap'}"]

    return search(cli.folder, entrants, epochs, score)


def _arguments(chosen: Candidate) -> list[str]:
    conversion = None if chosen.conversion is None else asdict(chosen.conversion)
    return ["--plan", "given", "--model.conversion", json.dumps(conversion)]


def _plain(error: ArgumentError) -> str:
    """What jsonargparse says, without the types that an optional setting was tried as."""
    text = " ".join(str(error).split())
    key = re.match(r'Parser key "([\w.]+)": ', text)
    inner = re.search(r"(Problem with given class_path '[^']*': .+?)(?= - Expected a <class| Given value type|$)", text)
    return f"{key[1]}: {inner[1]}" if key and inner else text


def _innermost(error: BaseException) -> BaseException:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


class EpochSeed(Callback):
    """Starts every epoch and every step from a seed of its own: what is replayed after a kill draws the same numbers.

    Shuffling, augmentation, mixing and dropout then depend on (seed, epoch, batch) alone and no generator needs saving.
    It holds for data that is loaded in the main process, and for data modules that seed their examples themselves.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loader a generator of its own: making its iterator would draw from the global one."""
        loader = trainer.train_dataloader
        if isinstance(loader, DataLoader) and loader.generator is None:
            loader.generator = torch.Generator()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed all global generators for the epoch, on all processes alike."""
        mixed = self.seed * 1_000_003 + trainer.current_epoch
        seed_everything(mixed % 2**32, verbose=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed them for the step, on each process otherwise."""
        key = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed_generators(*key)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(torch.initial_seed())


class Announce(Callback):
    """Says where a run is kept, how its heads run, where it goes on; and, at its end, how many records were skipped.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, once for all processes."""
        if not trainer.is_global_zero:
            return
        lines = [f"Run folder: {self.folder}"]
        if isinstance(pl_module, Classifier) and pl_module.conversion is not None:
            lines.append(f"The heads run {pl_module.choice.heads}: {pl_module.choice.reason}.")
        if trainer.global_step:
            lines.append(f"It goes on in epoch {trainer.current_epoch}, after {trainer.global_step:,} steps.")
        for line in lines:
            Console().print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it, where damaged records are skipped."""
        if trainer.is_global_zero and (skipped := getattr(trainer.train_dataloader, "skipped", 0)):
            print(f"Damaged records skipped in training, counted once an epoch: {skipped:,}")


class _FitCLI(LightningCLI):
    """Reads the configuration and makes module, data and trainer, and the run's folder.

    Args:
        args: command-line arguments.
        held: when it ends, other processes may write the folder.
        folder: of a run that this process has opened before; None makes or finds one.
    """

    folder: Path

    def __init__(self, args: list[str], held: ExitStack, folder: Path | None = None) -> None:
        self.held, self.opened = held, folder
        super().__init__(
            Classifier,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            seed_everything_default=0,
            run=False,
            args=args,
            parser_kwargs={
                "prog": "ensemblenet fit",
                "usage": _USAGE,
                "description": _DESCRIPTION,
                "exit_on_error": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the run and not to Lightning."""
        parser.add_argument("--name", default="fit", help="begins the name of the run's folder")
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made")
        parser.add_argument(
            "--plan",
            type=Literal["given", "search"],
            default="given",
            help="'search' finds by short runs whether the base or which of its conversions to train in full; of "
            "model.conversion the budget, seed, init and combine stay",
        )
        parser.add_argument(
            "--checkpoint_steps",
            type=int | None,
            help="save the run's state also after every so many batches, to resume in the middle of a long epoch; "
            "the data must be able to (all of ensemblenet.data are)",
        )
        parser.add_argument(
            "--ema",
            type=float | None,
            help="test and store an exponential moving average of the weights with this decay, such as 0.9999",
        )
        parser.add_argument(
            "--log_to",
            type=Literal["wandb", "mlflow"] | None,
            help="log also to Weights & Biases or MLflow; for more settings, use --trainer.logger",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            help="go on with a killed run: its folder, whose configuration is then the default; or 'auto' for the "
            "newest unfinished run of this name and these settings that no process is writing, or else a new one",
        )
        parser.add_argument(_TRUST, action="store_true", default=argparse.SUPPRESS, help=f"with --resume: {TRUST_HELP}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, whose logs and checkpoints go to the run's folder."""
        self.folder = agreed_folder(self._choose_folder)
        if is_first_process():
            with atomic_path(self.folder / CONFIG) as unfinished:
                self.parser.save(self.config, unfinished, overwrite=True, skip_unset=False)
        chosen = self.config_init["trainer"]
        steps, ema = self.config["checkpoint_steps"], self.config["ema"]
        speed = Speed()
        kwargs["logger"] = [
            TensorBoardLogger(self.folder, name="tensorboard", version=""),
            CSVLogger(self.folder, name="csv"),
            *_more_loggers(self.config["log_to"], self.folder),
            *_listed(chosen["logger"]),
        ]
        kwargs["plugins"] = [AtomicCheckpointIO(), *_listed(chosen["plugins"])]
        kwargs["callbacks"] = [
            EpochSeed(self.config["seed_everything"]),
            Announce(self.folder),
            KeepFolder(self.folder),
            KeepClasses(self.folder),
            speed,
            *([] if chosen["enable_progress_bar"] is False else [Progress(speed)]),
            LearningRateMonitor("step"),
            *([] if ema is None else [AveragedWeights(ema)]),
            self._checkpoints(save_on_train_epoch_end=True),
            *([self._checkpoints(every_n_train_steps=steps, save_on_train_epoch_end=False)] if steps else []),
            *_listed(chosen["callbacks"]),
        ]
        return super().instantiate_trainer(**kwargs)

    def _checkpoints(self, **when: Any) -> ModelCheckpoint:
        return ModelCheckpoint(self.folder / CHECKPOINT.parent, CHECKPOINT.stem, enable_version_counter=False, **when)

    def _choose_folder(self) -> Path:
        """The run's folder, whose one writer this process is from now on."""
        name, runs, resume = (self.config[key] for key in ("name", "runs", "resume"))
        if self.opened is not None:
            return self.opened
        if resume == "auto" and (found := take_unfinished(Path(runs), name, self._change, self.held)):
            return found
        if resume in (None, "auto"):
            folder = create_run_folder(Path(runs), name)
            self.held.enter_context(sole_writer(folder))
            return folder
        folder = Path(resume)
        # settings newer than the run get their defaults; what may be named was checked with the arguments
        stored = self.parser.parse_args(config_option(folder / CONFIG, trust=True))
        self.held.enter_context(sole_writer(folder))
        if (folder / RESULTS).exists():
            raise TrainingError(f"{folder} is finished: it has {RESULTS}. Leave --resume out for a new run.")
        if change := self._change(folder, self._plain(stored), may_move=True):
            raise TrainingError(f"{folder} was made with {change}. Leave that out, or --resume for a new run.")
        return folder

    def _change(self, folder: Path, stored: Mapping[str, Any], may_move: bool = False) -> str | None:
        """The first setting that decides the result and that the folder's run was made with otherwise."""
        now = self._plain(self.config)
        if now["plan"] == "search":
            stored, now = before_search(stored, folder), before_search(now)
        return changed_setting(stored, now, may_move=may_move)

    def _plain(self, config: Namespace) -> dict[str, Any]:
        return yaml.safe_load(self.parser.dump(config, skip_unset=False))


def _more_loggers(name: str | None, folder: Path) -> list[Logger]:
    """W&B or MLflow, in the run's folder, under the run's name."""
    if name is None:
        return []
    try:
        if name == "wandb":
            return [WandbLogger(folder.name, save_dir=folder, id=folder.name, resume="allow")]
        return [_mlflow(folder)]
    except ModuleNotFoundError as error:
        raise TrainingError(f"--log_to {name} needs its library: pip install {name}.") from error


def _mlflow(folder: Path) -> MLFlowLogger:
    """A logger to MLFLOW_TRACKING_URI, or to a database in the run's folder; a resumed run goes on in its own run."""
    known = folder / _MLFLOW_RUN
    logger = MLFlowLogger(
        "ensemblenet",
        run_name=folder.name,
        tracking_uri=os.getenv("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}",
        run_id=known.read_text() if known.is_file() else None,
    )
    if is_first_process():
        known.write_text(str(logger.run_id))
    return logger


def _listed(chosen: Any) -> list[Any]:
    """What the configuration chose: nothing, one, or several."""
    if chosen is None or isinstance(chosen, bool):
        return []
    return list(chosen) if isinstance(chosen, Sequence) else [chosen]


def _with_stored_config(arguments: list[str]) -> list[str]:
    """The arguments, behind the configuration of the run that they resume."""
    trust = _TRUST in arguments
    untrusting = [argument for argument in arguments if argument != _TRUST]
    resume = _value_of("--resume", arguments)
    if resume in (None, "auto"):
        return untrusting
    if not Path(resume, CONFIG).is_file():
        raise TrainingError(f"{resume} is no run folder: it has no {CONFIG}. Give a folder under runs/, or 'auto'.")
    return [*config_option(Path(resume, CONFIG), trust), *untrusting]


def _with_data_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--data FOLDER` written out."""
    written = list(arguments)
    for place, following in enumerate(written[1:], 1):
        if written[place - 1] == "--data" and _is_folder(following):
            written[place - 1] = "--data.init_args.folder"
    return written


def _is_folder(text: str) -> bool:
    """Whether `--data` means a folder, there or not; else it is a file of settings, or the name of a class."""
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        return False
    return "/" in text or Path(text).is_dir() or not ("." in text or text in data_modules)


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return None


def _row(module: Classifier, metrics: Mapping[str, float], seed: int) -> dict[str, Any]:
    cost = measure_cost(module.network, module.example_inputs)
    method = "base" if module.conversion is None else "ensemblenet"
    test = {key.removeprefix("test/"): value for key, value in metrics.items() if key.startswith("test/")}
    if module.task == "multilabel":
        scores = {name: [100 * test[name]] for name in ("gap", "head_gap", "map")}
    else:
        scores = {f"{head}error": [100 * (1 - test[f"{head}accuracy"])] for head in ("", "head_")}
    return scores_row(method, cost, scores, num_heads=module.num_heads, seed=seed, test=test)
