"""The command `fit`: train from a YAML file, and show the results."""

from __future__ import annotations

import json
from argparse import Action, ArgumentError, ArgumentParser, ArgumentTypeError, HelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ensemblenet.cli.options import add_device, budget_share, command_parser, device_name, underscored, with_config
from ensemblenet.errors import TrainingError
from ensemblenet.storage import TRUST_HELP

__all__ = ["SHORT_NAMES", "fit", "taken_engine", "written_out"]


@dataclass(frozen=True)
class _Setting:
    """A setting that most runs have.

    Args:
        key: in the configuration.
        help: what it is.
        option: its short name, which other commands have as well; None where the key is the option.
        metavar: what its value is.
        written: makes of the value what the configuration holds.
    """

    key: str
    help: str
    option: str | None = None
    metavar: str = "VALUE"
    written: Callable[[str], str] = str


_SETTINGS = [
    _Setting("data", "folder of the data; or the name of a data module", metavar="FOLDER"),
    _Setting("model.conversion.num_heads", "number of heads", "num-heads", "K"),
    _Setting(
        "model.conversion.budget",
        "the most all may cost, as a share of the base: 0.95, or parameters=1,time=1.2",
        "budget",
        "SHARE",
        lambda text: json.dumps(budget_share(text)),
    ),
    _Setting("model.conversion.split_at", "a split point that `info` lists", "split-at", "NAME"),
    _Setting("model.conversion.init", "fresh, or inherit the weights of a trained base", "init", "WAY"),
    _Setting("model.base.init_args.weights", "of the base: pretrained, or a file", "weights", "FILE"),
    _Setting("model.conversion.num_classes", "of another task: fresh classifiers in the heads", "num-classes", "N"),
    _Setting("model.conversion.freeze", "trunk: train the heads alone", "freeze", "trunk"),
    _Setting("plan", "search: train the base and the plans for it in full, keep the best", metavar="search"),
    _Setting("model.codistillation_weight", "lambda of co-distillation", "weight", "LAMBDA"),
    _Setting("model.teacher", "a finished run or saved model that teaches the heads", "teacher", "FOLDER"),
    _Setting("model.optimization.lr", "the highest learning rate", "lr"),
    _Setting("data.init_args.batch_size", "examples of a step, on each device", "batch-size", "N"),
    _Setting("trainer.max_epochs", "passes over the training data", "epochs", "N"),
    _Setting("trainer.precision", "such as bf16-mixed", "precision"),
    _Setting("seed_everything", "of weights, order and augmentation", "seed", "N"),
    _Setting("runs", "where run folders are made, such as s3://bucket/runs", metavar="FOLDER"),
    _Setting("resume", "go on with a killed run: its folder or URL, or auto", metavar="FOLDER"),
]
_RARE = [  # `--help all` shows these
    _Setting("model.conversion.min_width", "the least width of heads", "min-width", "SHARE"),
    _Setting("model.conversion.shape", "of heads: narrow, short (fewer blocks) or auto", "shape", "WORD"),
    _Setting("model.conversion.width", "of its channels that a head keeps", "width", "SHARE"),
    _Setting("model.conversion.depth", "of the blocks that it may drop", "depth", "SHARE"),
    _Setting("model.conversion.importance", "which channels and blocks heads inherit", "importance", "WAY"),
    _Setting("base_run", "with --plan search: a finished run of the base", metavar="FOLDER"),
    _Setting("model.teacher_weight", "of the teacher; without --teacher, of the trained base", "teacher-weight"),
    _Setting("model.teacher_temperature", "of the teacher's distillation, 1 by default", "teacher-temperature", "T"),
    _Setting("model.heads", "how heads run: auto, looped, fused, compiled, checkpointed", metavar="WAY"),
    _Setting("model.optimization.optimizer", "adamw, sgd, or a name of timm's", metavar="NAME"),
    _Setting("model.optimization.warmup", "the share of all steps in which the learning rate rises", "warmup", "SHARE"),
    _Setting("model.optimization.layer_decay", "of each layer's learning rate, as 0.75", "layer-decay", "SHARE"),
    _Setting("model.optimization.weight_decay", "of the optimizer", "weight-decay"),
    _Setting("ema", "keep an average of the weights, such as 0.9999", metavar="DECAY"),
    _Setting("name", "begins the name of the run's folder"),
    _Setting("checkpoint_steps", "save also after every so many steps", metavar="N"),
]
_SHORT = {setting.option: setting for setting in (*_SETTINGS, *_RARE) if setting.option}
SHORT_NAMES = (*_SHORT, "device")


def fit(arguments: Sequence[str]) -> Path:
    """Train, test, and print the results, see [`ensemblenet.training.fit.fit`][].

    Args:
        arguments: command-line arguments.

    Returns:
        The run's folder.

    Raises:
        TrainingError: bad arguments, or what training raises.
    """
    if {"-h", "--help"} & set(arguments):
        parser = _parser()
        if "all" not in arguments:
            parser.formatter_class = _Short
            parser.parse_args(["--help"])
        parser.print_help()
    from ensemblenet.reports.tables import results_table  # slow to import, and nothing that the help needs
    from ensemblenet.storage import bucket
    from ensemblenet.storage.runs import RESULTS
    from ensemblenet.training.processes import is_first_process

    cluster, arguments = taken_engine(arguments)
    if cluster is None:
        from ensemblenet.training.fit import fit as train

        folder = train(written_out(arguments))
    else:
        from ensemblenet.training.on_ray import fit_on_ray

        folder = fit_on_ray(written_out(arguments), **cluster)
    if is_first_process():
        console = Console()
        rows = json.loads((folder / RESULTS).read_text())["rows"]
        console.print(results_table(rows, f"tested on {rows[0].get('tested_on', 'the test data')}"))
        console.print(f"Results and logs: {bucket.address(folder)}", highlight=False, soft_wrap=True)
    return folder


def taken_engine(arguments: Sequence[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """What arguments say of the cluster that `--engine ray` uses, None for this machine; and the other arguments.

    Raises:
        TrainingError: another engine, or options of a cluster without one.

    Example:
        >>> taken_engine(["mine.yaml", "--engine", "ray", "--epochs", "3"])
        ({'address': 'auto'}, ['mine.yaml', '--epochs', '3'])
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--engine", choices=("local", "ray"), default="local")
    finder.add_argument("--address")
    finder.add_argument("--cpus_per_trial", "--cpus-per-trial", type=int)
    finder.add_argument("--gpus_per_trial", "--gpus-per-trial", type=float)
    try:
        found, others = finder.parse_known_args(arguments)
    except ArgumentError as error:
        raise TrainingError(str(error)) from error
    given = {name: value for name, value in vars(found).items() if value is not None and name != "engine"}
    if found.engine == "ray":
        return {"address": "auto"} | given, others
    if given:
        raise TrainingError(f"--{next(iter(given))} needs --engine ray.")
    return None, others


def _parser() -> ArgumentParser:
    """What has a short name, for the help and for shells; LightningCLI's parser takes all settings."""
    parser = command_parser(
        "fit",
        "Train a network, or the multi-headed model that it converts to. It needs a YAML file, such as "
        "mnist1d/ensemblenet, which the settings below change. The run gets a folder of its own with its "
        "configuration, logs, checkpoints, results and model.",
        "`ensemblenet fit --help all` lists every setting, those of Lightning's Trainer among them.",
    )
    parser.usage = "ensemblenet fit FILE [--SETTING VALUE ...]"
    parser.add_argument("config", metavar="FILE", help="or a name in `ensemblenet configs list`; or --config FILE")
    for setting in _SETTINGS:
        parser.add_argument(f"--{setting.option or setting.key}", metavar=setting.metavar, help=setting.help)
    add_device(parser, default="the file's")
    rare = parser.add_argument_group(_Short.left_out)
    for setting in _RARE:
        rare.add_argument(f"--{setting.option or setting.key}", metavar=setting.metavar, help=setting.help)
    rare.add_argument("--engine", metavar="ENGINE", help="local, or ray: processes of a cluster; docs/scale.md")
    rare.add_argument("--address", help="of Ray: auto (default), HOST:PORT or ray://HOST:PORT")
    rare.add_argument("--cpus_per_trial", metavar="N", help="of a plan search on Ray: threads of a candidate, 1")
    rare.add_argument("--gpus_per_trial", metavar="X", help="of a plan search on Ray: 0; a fraction shares a GPU")
    rare.add_argument("--trust", action="store_true", help=TRUST_HELP)
    return parser


class _Short(HelpFormatter):
    """Help without the group of settings that few runs need."""

    left_out = "more settings"

    def start_section(self, heading: str | None) -> None:
        """Take all that follows until the section's end."""
        self.is_shown = heading != self.left_out
        super().start_section(heading)

    def add_argument(self, action: Action) -> None:
        """Take it where its section is shown; a section without any is not."""
        if self.is_shown:
            super().add_argument(action)


def written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with short names of settings written out, and `--config` before a file."""
    written: list[str] = []
    values = iter(with_config(arguments))
    for argument in values:
        name, equals, value = underscored(argument).partition("=")
        short = name.removeprefix("--").replace("_", "-") if name.startswith("--") else ""
        if short not in SHORT_NAMES:
            written.append("--help" if argument == "all" else name + equals + value)
            continue
        if not equals and (value := next(values, None)) is None:
            raise TrainingError(f"--{short} needs a value.")
        try:
            if short == "device":
                kind, _, index = device_name(value).partition(":")
                written += [f"--trainer.accelerator={kind}", *([f"--trainer.devices=[{index}]"] if index else [])]
            else:
                written.append(f"--{_SHORT[short].key}={_SHORT[short].written(value)}")
        except ArgumentTypeError as error:
            raise TrainingError(f"--{short}: {error}") from error
    return written
