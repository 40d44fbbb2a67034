"""The command line: one command a function, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["main", "positive_integer"]

_COMMANDS = {
    "demo": (
        "ensemblenet.cli.demo",
        "train a base and its conversions on MNIST-1D; a table, figures and a page",
    ),
    "info": ("ensemblenet.cli.commands", "where a network can be split, and how wide heads a budget allows"),
    "convert": ("ensemblenet.cli.commands", "convert a network into a multi-headed one and save it"),
    "benchmark": ("ensemblenet.cli.commands", "how fast a network's heads run: one by one, fused, compiled"),
    "compare": ("ensemblenet.study.compare", "train every method with the same effort; a page that says who wins"),
    "fit": ("ensemblenet.training.fit", "train a base or its conversion from a YAML file"),
    "validate": ("ensemblenet.evaluation.scoring", "score a trained network and its heads on validation data"),
    "test": ("ensemblenet.evaluation.scoring", "the same on test data"),
    "export": ("ensemblenet.cli.export", "write a trained model for other programs: ONNX, AOTInductor and more"),
    "predict": ("ensemblenet.evaluation.predictions", "what a trained network says of examples, as CSV or Parquet"),
    "report": ("ensemblenet.reports.networks", "one page about trained networks: curves, calibration, heads, examples"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `ensemblenet COMMAND --help` says what it needs.

    Args:
        arguments: what follows the program's name; None takes it from the command line.

    Returns:
        The exit status: 0, or 2 for an error that the user can mend, which is then one line on stderr. Bugs
        keep their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    chosen = parser.parse_args(arguments[:1])  # what follows is the command's own
    from ensemblenet.errors import EnsembleNetError

    module, _ = _COMMANDS[chosen.command]
    command = getattr(importlib.import_module(module), chosen.command)
    try:
        command(arguments[1:])
    except (EnsembleNetError, FileNotFoundError, FileExistsError) as error:
        print(f"ensemblenet {chosen.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ensemblenet {chosen.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def positive_integer(text: str) -> int:
    """What options that count something take.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemblenet",
        description="Turn any network into a smaller and better multi-headed one.",
        epilog="commands:\n"
        + "\n".join(f"  {name:10}{summary}" for name, (_, summary) in _COMMANDS.items())
        + "\n\n`ensemblenet COMMAND --help` says what a command needs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
