"""Options that several commands share, each declared once."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemblenet.errors import TrainingError
from ensemblenet.storage import TRUST_HELP

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ensemblenet.cost import Budget
    from ensemblenet.ensemble import EnsembleNet
    from ensemblenet.recipe import Conversion

__all__ = [
    "CommandParser",
    "add_base",
    "add_data",
    "add_device",
    "add_plan",
    "add_split",
    "add_trained_models",
    "add_trust",
    "base_of",
    "budget_share",
    "check_new",
    "check_place",
    "check_there",
    "command_parser",
    "config_file",
    "configs",
    "conversion_of",
    "converted",
    "dashed",
    "device_name",
    "positive_integer",
    "underscored",
    "with_config",
]

_BASE = (
    "a timm name such as resnet18, torchvision:NAME, transformers:NAME, or module.path:callable, a callable that "
    "returns a network; or a folder that `convert` wrote, for its base"
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")  # of an address, as it stands in a path; a drive has one letter
_TRAINED = "the folder of a run of `fit`, a saved model, or its address, s3://bucket/run or hf://owner/name"


class CommandParser(argparse.ArgumentParser):
    """What follows `ensemblenet COMMAND`: `--num_heads` is `--num-heads`, and a mistake is one line.

    Example:
        >>> parser = command_parser("test", "", allow_abbrev=False)
        >>> _ = parser.add_argument("model")
        >>> parser.parse_with_data(["--data.num_test", "30", "RUN"])
        (Namespace(model='RUN'), ['--data.num_test', '30'])
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The arguments, underscores in the names of options read as dashes."""
        given = sys.argv[1:] if args is None else args
        written = [self._known(argument) or argument for argument in given]
        return super().parse_known_args(written, namespace)

    def _known(self, argument: str) -> str | None:
        """An argument that names an option, spelt as the option is."""
        spellings = (argument, dashed(argument), underscored(argument))
        return next((text for text in spellings if text.partition("=")[0] in self._option_string_actions), None)

    def parse_with_data(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The command's own arguments, and the options of the data module, which may stand anywhere among them.

        Args:
            arguments: with `--data.KEY VALUE`, and `--data FOLDER` where the command means no files by it.
        """
        own: list[str] = []
        changes: list[str] = []
        rest = iter(arguments)
        for argument in rest:
            if argument.startswith("--data.") and self._known(argument) is None and not self.allow_abbrev:
                changes += [underscored(argument), *([] if "=" in argument else islice(rest, 1))]
            else:
                own.append(argument)
        options = self.parse_args(own)
        if isinstance(folder := getattr(options, "data", None), str):
            changes = ["--data", folder, *changes]
        return options, changes

    def error(self, message: str) -> Any:
        """End the command with one line, and the options that were perhaps meant."""
        if unknown := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += f". Did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` says what it takes)\n")


def command_parser(
    command: str, description: str, epilog: str | None = None, allow_abbrev: bool = True
) -> CommandParser:
    """A parser for what follows `ensemblenet COMMAND`; those with options --data.KEY allow no abbreviations."""
    return CommandParser(
        prog=f"ensemblenet {command}", description=description, epilog=epilog, allow_abbrev=allow_abbrev
    )


def dashed(argument: str) -> str:
    """An option with dashes in its name, as the commands that list their options write it.

    Example:
        >>> dashed("--num_heads=4"), dashed("my_run")
        ('--num-heads=4', 'my_run')
    """
    return _renamed(argument, "_", "-")


def underscored(argument: str) -> str:
    """An option with underscores in its name, as the settings of `fit` and `compare` have it.

    Example:
        >>> underscored("--trainer.max-epochs=4"), underscored("my-run")
        ('--trainer.max_epochs=4', 'my-run')
    """
    return _renamed(argument, "-", "_")


def _renamed(argument: str, old: str, new: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace(old, new)}{equals}{value}" if name.startswith("--") else argument


def configs() -> dict[str, Path]:
    """The configurations that come along with the package, by name.

    Example:
        >>> configs()["mnist1d/base"].name
        'base.yaml'
    """
    package = Path(__file__).parents[1]
    folder = next((path for path in (package / "configs", package.parents[1] / "configs") if path.is_dir()), package)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def config_file(text: str) -> Path:
    """The file that a configuration's path or name stands for; a file of your own goes before a name.

    Raises:
        TrainingError: it looks like a name, and nothing is called so.

    Example:
        >>> config_file("mnist1d/base").name, config_file("my.yaml").name
        ('base.yaml', 'my.yaml')
    """
    known = configs()
    if os.path.lexists(text) or not re.fullmatch(r"[\w-]+(/[\w-]+)+", text):
        return Path(text)  # of a file that is not there its reader says so
    if text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        advice = f"did you mean {near[0]}?" if near else "`ensemblenet configs list` has all names."
        raise TrainingError(f"there is neither a file nor a configuration {text}: {advice}")
    return known[text]


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` before a configuration that is no option's value, and files in place of names.

    Example:
        >>> with_config(["fit.yaml", "--name", "x"]), with_config(["--config", "fit.yaml"])
        (['--config', 'fit.yaml', '--name', 'x'], ['--config', 'fit.yaml'])
    """
    written: list[str] = []
    for argument in arguments:
        before = written[-1] if written else ""
        option, equals, value = argument.partition("=")
        if before == "--config":
            written.append(str(config_file(argument)))
        elif option == "--config" and equals:
            written.append(f"--config={config_file(value)}")
        elif argument.startswith("-") or (before.startswith("-") and "=" not in before and before != "--trust"):
            written.append(argument)
        else:
            file = config_file(argument)
            written += ["--config", str(file)] if file.suffix in (".yaml", ".yml") else [argument]
    return written


def positive_integer(text: str) -> int:
    """The number that a text says, for options that count something.

    Raises:
        argparse.ArgumentTypeError: it is not a positive integer.

    Example:
        >>> positive_integer("8")
        8
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers such as 3,32,32; got {text!r}")
    return shape


# -- a network to convert


def budget_share(text: str) -> float | dict[str, float]:
    """A budget as plain data: a share of the base's parameters and MACs, or a share for each cost by name.

    Raises:
        argparse.ArgumentTypeError: it is none of these.

    Example:
        >>> budget_share("0.95"), budget_share("activations=1.2,time=1.2")
        (0.95, {'activations': 1.2, 'time': 1.2})
    """
    from ensemblenet.cost import Budget
    from ensemblenet.errors import BudgetError

    try:
        if text.startswith("{"):  # as a configuration writes it
            shares = json.loads(text)
        elif "=" in text:
            shares = {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
        else:
            shares = float(text)
        Budget.of(shares)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except (ValueError, TypeError) as error:
        form = "a number, or shares by name such as parameters=1,macs=1,activations=1.2,time=1.2"
        raise argparse.ArgumentTypeError(f"must be {form}; got {text!r}") from error
    return shares


def _budget(text: str) -> float | Budget:
    from ensemblenet.cost import Budget

    shares = budget_share(text)
    return Budget.of(shares) if isinstance(shares, dict) else shares


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add how many heads there are to be, where they begin, and what all may cost."""
    parser.add_argument("--num-heads", type=_num_heads, default=2, metavar="K", help="or auto (default: %(default)s)")
    parser.add_argument(
        "--budget",
        type=_budget,
        default=1.0,
        metavar="SHARE",
        help="the most all may cost, as a share of the base's parameters and of its MACs, or several shares by name: "
        "parameters=1,macs=1,activations=1.2,time=1.2 (default: %(default)s)",
    )
    parser.add_argument("--split-at", default="auto", help="a split point that `info` lists (default: %(default)s)")
    parser.add_argument("--min-width", type=float, metavar="SHARE", help="the least width of heads (default: found)")
    parser.add_argument(
        "--shape",
        default="auto",
        metavar="WORD",
        help="of heads: narrow, short (fewer blocks) or auto, which may be both",
    )
    parser.add_argument(
        "--width", type=float, metavar="SHARE", help="of its channels that a head keeps (default: found)"
    )
    parser.add_argument("--depth", type=float, metavar="SHARE", help="of the blocks that it may drop (default: found)")


def _num_heads(text: str) -> int | str:
    return text if text == "auto" else positive_integer(text)


def conversion_of(options: argparse.Namespace) -> Conversion:
    """What the options of `add_plan`, and those of `convert`, ask for."""
    from ensemblenet.recipe import Conversion

    names = ("num_heads", "budget", "split_at", "min_width", "shape", "width", "depth", "init", "importance", "freeze")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return Conversion(**given, seed=getattr(options, "seed", 0))


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, what it takes, and how to convert it."""
    parser.add_argument("model", metavar="MODEL", help=_BASE)
    add_plan(parser)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="of a trained network: safetensors or a state dict; or pretrained, which may download them",
    )
    parser.add_argument("--num-classes", type=int, help="outputs of the network (default: its own)")
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="C,H,W",
        help="shape of one example, such as 3,32,32; needed where the network does not say it",
    )


def base_of(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The network that MODEL names, and two random inputs for it.

    Raises:
        ConversionError: there is no such network, or it does not say what inputs it takes.
    """

    from ensemblenet.conversion.classifier import with_classes
    from ensemblenet.errors import ConversionError
    from ensemblenet.inputs import InputSpec
    from ensemblenet.models.sources import create, default_input_shape

    if (model := converted(options)) is not None:
        recipe = model.recipe
        if recipe is None or recipe.base is None:
            raise ConversionError(f"{options.model} does not say what its base is: name the base in its place.")
        if options.weights is not None:
            raise ConversionError(f"--weights is for a network by name; {options.model} is a saved model.")
        base = recipe.base.build(getattr(options, "trust", False))
        return base, recipe.inputs.random()
    pretrained = options.weights == "pretrained"  # for classes of their own
    base = create(options.model, None if pretrained else options.num_classes, options.weights)
    shape = options.input_shape or default_input_shape(base)
    if shape is None:
        raise ConversionError(f"{options.model} does not say what inputs it takes: give --input-shape.")
    x = InputSpec(shape).random()
    return (with_classes(base, x, options.num_classes)[0] if pretrained and options.num_classes else base), x


def converted(options: argparse.Namespace) -> EnsembleNet | None:
    """The model in the folder that MODEL names; None where it names a network.

    Raises:
        LoadError: it is damaged, or has a base that is not known.
    """
    if not Path(options.model, "recipe.json").is_file():
        return None
    from ensemblenet.storage.checkpoint import load

    return load(options.model, trust=getattr(options, "trust", False))


# -- a trained network, and data for it


def add_trained_models(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add MODEL, or several as RUN."""
    if several:
        parser.add_argument("models", nargs="+", metavar="RUN", help=f"{_TRAINED}; several are shown together")
    else:
        parser.add_argument("model", metavar="MODEL", help=_TRAINED)
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust."""
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)


def add_device(parser: argparse.ArgumentParser | argparse._ArgumentGroup, default: str = "auto") -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        type=device_name,
        default=default,
        metavar="NAME",
        help="cpu, cuda, cuda:1 or mps (default: %(default)s)",
    )


def device_name(text: str) -> str:
    """A device's name as it is; whether there is such a device is seen later.

    Raises:
        argparse.ArgumentTypeError: no device has such a name.

    Example:
        >>> device_name("cuda:1")
        'cuda:1'
    """
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda, cuda:1 or mps, got {text!r}")
    return text


def add_data(parser: argparse.ArgumentParser | argparse._ArgumentGroup, folder: bool = True) -> None:
    """Add what names a data module; besides there are options `--data.KEY`, see `CommandParser.parse_with_data`.

    Args:
        parser: of the command.
        folder: whether `--data FOLDER` is the data module's folder.
    """
    if folder:
        parser.add_argument("--data", metavar="FOLDER", help="where the data lies now; short for --data.folder")
    parser.add_argument(
        "--config",
        type=config_file,
        metavar="FILE",
        help="YAML with class_path and init_args of a data module, as for `fit`; or its name in `configs list`",
    )
    parser.add_argument(
        "--data.class_path",
        dest="class_path",
        metavar="NAME",
        help="a data module, such as ensemblenet.data.ImageData; --data.KEY VALUE is an argument of it, or changes one "
        "of a run's own data, such as --data.folder",
    )


def add_split(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --split."""
    parser.add_argument("--split", choices=("val", "test"), default="test", help="which data (default: %(default)s)")


def check_new(path: Path, what: str = "file") -> None:
    """Refuse to overwrite what --output names.

    Raises:
        FileExistsError: it exists.

    Example:
        >>> check_new(Path("nowhere"))
    """
    if path.is_symlink() or path.exists():
        raise FileExistsError(f"{path} exists; --output needs a new {what}.")


def check_place(folder: Path) -> None:
    """See that files can be made in a folder, or the folder itself."""
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if scheme := next(filter(_SCHEME.fullmatch, folder.relative_to(place).parts), None):
        raise TrainingError(f"Results are written to a disk, not to {scheme}//: give a folder, and copy it afterwards.")
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def check_there(path: str) -> None:
    """See that there is what a path names; a pattern, or what is not on this machine, is looked for later."""
    if not ("://" in path or set(path) & set("*?[") or os.path.lexists(path)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
