"""Options that several commands share, each declared once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ensemblenet.storage import TRUST_HELP

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ensemblenet.cost import Budget

__all__ = [
    "add_base",
    "add_data",
    "add_split",
    "add_trained_models",
    "add_trust",
    "base_of",
    "check_new",
    "command_parser",
    "positive_integer",
]

_BASE = "a timm name such as resnet18, torchvision:NAME, or module.path:callable, a callable that returns a network"
_TRAINED = "the folder of a run of `fit`, a saved model, or its address on the Hugging Face Hub, hf://owner/name"


def command_parser(
    command: str, description: str, epilog: str | None = None, allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    """A parser for what follows `ensemblenet COMMAND`; those with options --data.KEY allow no abbreviations."""
    return argparse.ArgumentParser(
        prog=f"ensemblenet {command}", description=description, epilog=epilog, allow_abbrev=allow_abbrev
    )


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


def _budget(text: str) -> float | Budget:
    from ensemblenet.cost import Budget

    try:
        if "=" not in text:
            return float(text)
        shares = dict(part.split("=") for part in text.split(","))
        return Budget(**{name: float(share) for name, share in shares.items()})
    except (ValueError, TypeError) as error:
        form = "a number, or shares by name such as parameters=1,macs=1,activations=1.2,time=1.2"
        raise argparse.ArgumentTypeError(f"must be {form}; got {text!r}") from error


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, what it takes, and how to convert it."""
    parser.add_argument("model", metavar="MODEL", help=_BASE)
    parser.add_argument("--num-heads", type=positive_integer, default=2, help="K (default: %(default)s)")
    parser.add_argument(
        "--budget",
        type=_budget,
        default=1.0,
        metavar="SHARE",
        help="the most all may cost, as a share of the base's parameters and of its MACs, or several shares by name: "
        "parameters=1,macs=1,activations=1.2,time=1.2 (default: %(default)s)",
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

    from ensemblenet.errors import ConversionError
    from ensemblenet.inputs import InputSpec
    from ensemblenet.models.sources import create, default_input_shape

    base = create(options.model, options.num_classes)
    shape = options.input_shape or default_input_shape(base)
    if shape is None:
        raise ConversionError(f"{options.model} does not say what inputs it takes: give --input-shape.")
    return base, InputSpec(shape).random()


# -- a trained network, and data for it


def add_trained_models(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add MODEL, or several as RUN."""
    if several:
        parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{_TRAINED}; several are shown together")
    else:
        parser.add_argument("model", metavar="MODEL", help=_TRAINED)
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust."""
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)


def add_data(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add what names a data module; besides there are options `--data.KEY`, which the parser does not know."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML with class_path and init_args of a data module, as for `fit`",
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
