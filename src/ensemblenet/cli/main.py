"""The command line: `main` finds the command and calls it."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ensemblenet.cli.failures import INTERRUPTED, explain, said_once

__all__ = ["COMMANDS", "main"]

# Each is the function of that name in the module of that name beside this one, imported when it is called.
COMMANDS = {
    "demo": "train a base and its conversions on MNIST-1D; a table, figures and a page",
    "info": "where a network can be split, and how wide heads a budget allows",
    "convert": "convert a network into a multi-headed one and save it",
    "benchmark": "how fast a network's heads run: one by one, fused, compiled",
    "compare": "train every method with the same effort; a page that says who wins",
    "fit": "train a base or its conversion from a YAML file",
    "validate": "score a trained network and its heads on validation data",
    "test": "the same on test data",
    "export": "write a trained model for other programs: ONNX, AOTInductor and more",
    "predict": "what a trained network says of examples, as CSV or Parquet",
    "report": "one page about trained networks: curves, calibration, heads, examples",
    "configs": "the configurations that come along: list, show or copy them",
    "completion": "a script by which your shell completes commands and options",
}

# what messages name in Python, and what that is in the shell
_SPELLED = (
    ("ensemblenet.split_points(base, x) lists", "`ensemblenet info` lists"),
    ("pass trust=True (on the command line --trust); else pass base, a fresh instance", "add --trust"),
    ("add --trust (in Python: trust=True)", "add --trust"),
    ('pass init="inherit"', "use --init inherit"),
    ('Pass init="inherit"', "Use --init inherit"),
    ("pass calibration=, a loader of inputs and targets", "name it by --calibrate"),
    ("output= takes", "--model.conversion.output takes"),
    ("a smaller min_width", "a smaller --min-width"),
)

_STUDIES = ("demo", "compare", "report")  # what draws figures needs more than what trains
_CORE = ("configs",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `ensemblenet COMMAND --help` says what it needs.

    Args:
        arguments: the arguments behind the program's name; None takes those of the command line.

    Returns:
        The exit status: 0; 2 for what the user can mend, which is then one line on stderr; 130 for an interrupt
        (Ctrl-C) and 143 for SIGTERM, with a line that says how to go on where a run can. Bugs keep their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _parser().parse_args(arguments[:1]).command  # what follows is the command's own
    if name != "fit" and "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["RANK"]) > 0:
        return 0  # all others take one process; of those that torchrun starts that is the first
    from ensemblenet.extras import require

    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        if name not in _CORE:
            require("study" if name in _STUDIES else "train")
            _check(name, arguments[1:])
        command = getattr(importlib.import_module(f"ensemblenet.cli.{name}"), name)
        with said_once():
            command(arguments[1:])
        return 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        status, said = explain(error)
        if said is None:
            raise
        if status == INTERRUPTED:
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores further ones
        advice = getattr(error, "__notes__", [])[-1:]  # how to go on, of the outermost run
        line = " ".join(" ".join([said, *advice]).split())
        print(f"ensemblenet {name}: {_in_shell(line)}", file=sys.stderr)
        return status


def _check(name: str, arguments: Sequence[str]) -> None:
    """Refuse what is plainly wrong before a command imports its libraries, which takes seconds."""
    if name in ("fit", "compare"):
        from ensemblenet.cli.settings import check_settings

        check_settings(name, arguments)
        return
    from ensemblenet.cli.parsers import PARSERS, read

    if name in PARSERS:
        read(name, arguments)


def _in_shell(message: str) -> str:
    """A message with options of the command line where it names those of Python."""
    for spelled, option in _SPELLED:
        message = message.replace(spelled, option)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemblenet",
        description="Turn any network into a smaller and better multi-headed one.",
        epilog="commands:\n"
        + "\n".join(f"  {name:12}{summary}" for name, summary in COMMANDS.items())
        + "\n\n`ensemblenet COMMAND --help` says what a command needs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ensemblenet {version('ensemblenet')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser
