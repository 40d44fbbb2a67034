"""The settings of `fit`: what its parser takes, where a stored configuration comes in, and what is made of them."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from functools import partial
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
from ensemblenet.storage.bucket import address, is_address, push, run_folder
from ensemblenet.storage.lock import KeepFolder, sole_writer
from ensemblenet.storage.runs import (
    CHECKPOINT,
    CONFIG,
    RESULTS,
    create_run_folder,
    environment,
    go_on,
    keep_config,
    keep_earlier,
    keep_environment,
    resumable,
)
from ensemblenet.storage.specs import plain, with_data_folder
from ensemblenet.storage.trust import config_option, resumed
from ensemblenet.training.callbacks import (
    Accepted,
    Announce,
    AveragedWeights,
    ConvertFirst,
    EpochSeed,
    KeepClasses,
    KnowCapacity,
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
from ensemblenet.training.processes import agreed_folder, goes_on_unasked, is_first_process, is_slurm_job
from ensemblenet.training.requeue import Requeue
from ensemblenet.training.resume import applied_settings, changed_setting, is_longer, take_unfinished
from ensemblenet.training.sharding import check_sharding

__all__ = ["FitCLI", "complete_arguments"]

_USAGE = "ensemblenet fit FILE [--data FOLDER] [--KEY VALUE ...]"
_DESCRIPTION = """Train a network, or the multi-headed model that it converts to.

It needs a YAML file: `ensemblenet fit mnist1d/ensemblenet`. Every setting of the file
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
        trust: whether a teacher's folder may name code of its author's own.
    """

    folder: Path

    command = "fit"  # that goes on with such a run

    def __init__(self, args: list[str], held: ExitStack, trust: bool = False) -> None:
        self.held = held
        self.trust = trust
        self.changed: list[str] = []  # of a resumed run: what decides its result and is not what it was
        self._environment = environment()
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
        parser.add_argument("--runs", default="runs", help="where run folders are made; a folder, or s3://BUCKET/PATH")
        parser.add_argument(
            "--plan",
            type=Literal["given", "search"],
            default="given",
            help="'search' trains the base, the automatic plans and one reshaped network in full and keeps the best on "
            "validation data; of model.conversion it finds num_heads, split_at, width and depth",
        )
        parser.add_argument(
            "--base_run",
            type=Path | None,
            help="a finished run of the base on the same data: where it shows no spare capacity, heads split late, and "
            "codistillation_weight 'auto' is 1; with --plan search it is not trained again",
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
            "newest unfinished run of this name and these settings that no process is writing, or else a new one; a "
            "finished run goes on with more --trainer.max_epochs",
        )
        parser.add_argument(
            "--trust", action="store_true", default=SUPPRESS, help=f"with --resume or --teacher: {TRUST_HELP}"
        )

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
        given = self.config["plan"] == "given" and self.config["model"]["conversion"] is None
        if self.config["base_run"] is not None and given:
            raise TrainingError(
                "--base_run is for a conversion, and model.conversion is null; to go on with a run, use --resume."
            )
        rename_scores(listed(self.config["trainer"]["callbacks"]))

    def instantiate_classes(self) -> None:
        """Make module, data and trainer."""
        super().instantiate_classes()
        self.model.trusts_teacher = self.trust

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, whose logs and checkpoints go to the run's folder."""
        chosen = self.config_init["trainer"]
        check_trainer(chosen)
        check_sharding(chosen, self.config["ema"])
        callbacks = listed(chosen["callbacks"])
        check_callbacks(callbacks)
        self.folder = self.find_folder()
        if not (self.folder / CONFIG).exists():
            self.keep_settings()
        steps, ema, base_run = (self.config[key] for key in ("checkpoint_steps", "ema", "base_run"))
        searches = self.config["plan"] == "search"
        speed = Speed()
        own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        kwargs["logger"] = [
            TensorBoardLogger(self.folder, name="tensorboard", version=""),
            CSVLogger(self.folder, name="csv"),
            *more_loggers(self.config["log_to"], self.folder),
            *listed(chosen["logger"]),
        ]
        if chosen["default_root_dir"] is None:  # Lightning would go on from what any Slurm job left in this folder
            kwargs["default_root_dir"] = self.folder
        kwargs["plugins"] = [AtomicCheckpointIO(), *listed(chosen["plugins"])]
        kwargs["callbacks"] = [
            KeepClasses(self.folder),
            *([] if base_run is None or searches else [KnowCapacity(Path(base_run), self.folder)]),
            ConvertFirst(),
            EpochSeed(self.config["seed_everything"]),
            Accepted(self.keep_settings),
            Announce(self.folder, self.changed),
            KeepFolder(self.folder),
            *([Requeue(self.folder)] if is_slurm_job() else []),
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

    def keep_settings(self) -> None:
        """Write configuration and environment: of a new run at once, of a resumed one when it goes on with them."""
        if not is_first_process():
            return
        keep_config(self.folder, self.stored_settings())
        if self._environment:
            keep_environment(self.folder, self._environment)
            self._environment = {}
        if (self.folder / RESULTS).exists():  # of a finished run that is made longer
            keep_earlier(self.folder / RESULTS)
            (self.folder / RESULTS).unlink()

    def stored_settings(self) -> str:
        """The configuration as a run keeps it."""
        stored = _without_objects(self._plain(self.config)) | {"resume": None}
        return yaml.safe_dump(stored, sort_keys=False)

    def find_folder(self) -> Path:
        """The run's folder, the same in all of its processes."""
        return agreed_folder(self.choose_folder)

    def choose_folder(self) -> Path:
        """The run's folder, whose one writer this process is from now on."""
        name, runs, resume = (self.config[key] for key in ("name", "runs", "resume"))
        if resume is None and goes_on_unasked():
            resume = "auto"
        if resume == "auto" and (found := take_unfinished(runs, name, self._change, self.held)):
            return self._resumable(found)
        if resume in (None, "auto"):
            self.changed.clear()
            folder = create_run_folder(runs, name)
            self.held.enter_context(sole_writer(folder))
            return self._resumable(folder, new=True)
        folder = run_folder(resume)
        self.held.enter_context(sole_writer(folder))
        # read again, and as warily: another process may have written it until now; newer settings get their defaults
        stored = self._plain(self.parser.parse_args(config_option(folder / CONFIG, self.trust)))
        if change := self._change(folder, stored, named=True):
            raise TrainingError(f"{resume} was made with {change}. Leave that out, or --resume for a new run.")
        if (folder / RESULTS).exists() and not is_longer(stored, self._plain(self.config)):
            raise TrainingError(
                f"{resume} is finished: it has {RESULTS}. To train it for longer, give more --trainer.max_epochs (or "
                "max_steps) than it had; for a new run, leave --resume out."
            )
        return self._resumable(folder)

    def _resumable(self, folder: Path, new: bool = False) -> Path:
        self.held.enter_context(resumable(folder, self.command, partial(self._begun, folder), new))
        place = address(folder)
        if is_address(place) and self.config["trainer"]["num_nodes"] > 1:
            raise TrainingError(
                f"{place}: runs in a bucket are for one machine, got num_nodes "
                f"{self.config['trainer']['num_nodes']}: give a folder that all machines see."
            )
        push(folder, always=not new)  # early, to see that one may, and to say that the run goes on here
        return folder

    def advice(self) -> str | None:
        """How to go on with the run, where something of it is kept."""
        return go_on(self.command, self.folder) if self._begun(self.folder) else None

    def _begun(self, folder: Path) -> bool:
        trainer = getattr(self, "trainer", None)
        return (trainer is not None and trainer.global_step > 0) or any(folder.rglob("*.ckpt"))

    def _change(self, folder: Path, stored: Mapping[str, Any], named: bool = False) -> str | None:
        """The first setting that decides the result and that the folder's run was made with otherwise."""
        now = self._plain(self.config)
        self.changed[:] = applied_settings(stored, now)
        searches = now["plan"] == "search"  # what is finished of it was trained as it was begun
        return changed_setting(stored, now, named=named and not searches, grows=not searches)

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
