"""The command `completion`: what the shell needs to complete commands and options."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from unittest.mock import patch

import shtab

from ensemblenet.cli.main import COMMANDS
from ensemblenet.cli.options import command_parser

__all__ = ["completion", "parser_of"]

_PATHS = {"FILE": shtab.FILE, "PATH": shtab.FILE, "MODEL": shtab.FILE, "FOLDER": shtab.DIRECTORY}  # by metavar


def completion(arguments: Sequence[str]) -> None:
    """Print a script for a shell.

    Args:
        arguments: command-line arguments.
    """
    parser = command_parser(
        "completion",
        "A script by which your shell completes commands and options. For bash, keep it by "
        "`ensemblenet completion bash > ~/.local/share/bash-completion/completions/ensemblenet`; other shells have "
        "other places.",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = parser.parse_args(arguments).shell
    whole = ArgumentParser(prog="ensemblenet", description="Turn any network into a multi-headed one.")
    commands = whole.add_subparsers()
    for name, summary in COMMANDS.items():
        found = parser if name == "completion" else parser_of(name)
        commands.add_parser(name, help=summary, parents=[found], add_help=False, conflict_handler="resolve")
    print(shtab.complete(whole, shell))


def parser_of(command: str) -> ArgumentParser:
    """The parser that a command makes and, asked for help, ends at; what its arguments are says how they complete."""
    run = getattr(importlib.import_module(f"ensemblenet.cli.{command}"), command)
    with patch.object(ArgumentParser, "print_help", autospec=True) as asked, suppress(SystemExit):
        run(["--help"])
    parser: ArgumentParser = asked.call_args.args[0]
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in _PATHS:
            action.complete = _PATHS[action.metavar]  # pyright: ignore[reportAttributeAccessIssue]  shtab reads it
    return parser
