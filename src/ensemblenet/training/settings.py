"""The settings of `fit`: what its parser takes, where a stored configuration comes in, and what is made of them."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ensemblenet.errors import TrainingError
from ensemblenet.storage import TRUST_HELP
from ensemblenet.storage.atomic import atomic_path
from ensemblenet.storage.lock import KeepFolder, sole_writer
from ensemblenet.storage.runs import (
    CHECKPOINT,
    CONFIG,
    RESULTS,
    create_run_folder,
)
from ensemblenet.storage.specs import plain, with_data_folder
from ensemblenet.storage.trust import config_option, resumed
from ensemblenet.training.callbacks import (
    Announce,
    AveragedWeights,
    ConvertFirst,
    EpochSeed,
    KeepClasses,
    Progress,
    Speed,
)
from ensemblenet.training.checkpoints import AtomicCheckpointIO, RunCheckpoint
from ensemblenet.training.loggers import more_loggers
from ensemblenet.training.module import Classifier
from ensemblenet.training.options import (
    REPLACED,
    check_callbacks,
    check_replaced,
    check_trainer,
    listed,
    rename_scores,
)
from ensemblenet.training.processes import agreed_folder, is_first_process
from ensemblenet.training.resume import changed_setting, take_unfinished
from ensemblenet.training.search import before_search

__all__ = ["FitCLI", "complete_arguments"]

_USAGE = "ensemblenet fit FILE [--data FOLDER] [--KEY VALUE ...]"
_DESCRIPTION = """Train a network, or the multi-headed model that it converts to.

It needs a YAML file: `ensemblenet fit configs/mnist1d/ensemblenet.yaml`. Every setting of the file
is also an option below. `model.base` takes a class_path with init_args, your own classes too if their folder
is on PYTHONPATH; so does `data`, and `--data FOLDER` is short for --data.init_args.folder FOLDER. The run gets a
folder of its own under --runs with the configuration, the environment, logs for TensorBoard and as CSV,
checkpoints, and results.json.
"""
# Defaults of callbacks may be such, as Timer's is, and are written to config.yaml.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))


class FitCLI(LightningCLI):
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
            auto_configure_optimizers=False,
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
        for name in REPLACED:  # runs of earlier versions have them in their configuration, without a value
            parser.add_argument(f"--{name}", type=str | dict[str, Any] | None, default=SUPPRESS, help=SUPPRESS)
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
        parser.add_argument("--trust", action="store_true", default=SUPPRESS, help=f"with --resume: {TRUST_HELP}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say of a setting that there is not which one was perhaps meant."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise TrainingError(plain(error, parser)) from error

    def before_instantiate_classes(self) -> None:
        """Refuse what the run could not honour, and take the names of version 0.1."""
        check_replaced({name: self.config.pop(name, None) for name in REPLACED})
        if (steps := self.config["checkpoint_steps"]) is not None and steps < 1:
            raise TrainingError(f"checkpoint_steps must be at least 1, got {steps}.")
        rename_scores(listed(self.config["trainer"]["callbacks"]))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, whose logs and checkpoints go to the run's folder."""
        chosen = self.config_init["trainer"]
        check_trainer(chosen)
        callbacks = listed(chosen["callbacks"])
        check_callbacks(callbacks)
        self.folder = agreed_folder(self._choose_folder)
        if is_first_process():
            with atomic_path(self.folder / CONFIG) as unfinished:
                self.parser.save(self.config, unfinished, overwrite=True, skip_unset=False)
                stored = yaml.safe_load(unfinished.read_text())
                unfinished.write_text(yaml.safe_dump(_without_objects(stored), sort_keys=False))
        steps, ema = self.config["checkpoint_steps"], self.config["ema"]
        speed = Speed()
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        kwargs["logger"] = [
            TensorBoardLogger(self.folder, name="tensorboard", version=""),
            CSVLogger(self.folder, name="csv"),
            *more_loggers(self.config["log_to"], self.folder),
            *listed(chosen["logger"]),
        ]
        kwargs["plugins"] = [AtomicCheckpointIO(), *listed(chosen["plugins"])]
        kwargs["callbacks"] = [
            KeepClasses(self.folder),
            ConvertFirst(),
            EpochSeed(self.config["seed_everything"]),
            Announce(self.folder),
            KeepFolder(self.folder),
            speed,
            *([] if chosen["enable_progress_bar"] is False or own_bar else [Progress(speed)]),
            LearningRateMonitor("step"),
            *([] if ema is None else [AveragedWeights(ema)]),
            self._checkpoints(save_on_train_epoch_end=True),
            *([self._checkpoints(every_n_train_steps=steps, save_on_train_epoch_end=False)] if steps else []),
            *callbacks,
        ]
        trainer = super().instantiate_trainer(**kwargs)
        if chosen["profiler"] is not None:  # without a file, it would report to a log that nobody sees
            profiler = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]
            profiler.dirpath, profiler.filename = profiler.dirpath or self.folder, profiler.filename or "profile"
        return trainer

    def _checkpoints(self, **when: Any) -> ModelCheckpoint:
        return RunCheckpoint(self.folder / CHECKPOINT.parent, CHECKPOINT.stem, enable_version_counter=False, **when)

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


def complete_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--data FOLDER` written out, behind the configuration of the run that they resume."""
    return resumed(with_data_folder(arguments), "auto")


def _without_objects(stored: Any) -> Any:
    """A stored configuration without defaults that are objects: they have no text, and stay the defaults."""
    if not isinstance(stored, dict):
        return [_without_objects(value) for value in stored] if isinstance(stored, list) else stored
    return {
        name: _without_objects(value)
        for name, value in stored.items()
        if not str(value).startswith("Unable to serialize instance")
    }
