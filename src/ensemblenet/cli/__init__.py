"""The command line: `main` finds the command, one file holds one command."""

from ensemblenet._moved import renamed
from ensemblenet.cli.main import main

__all__ = ["main"]

__getattr__ = renamed(__name__, {"positive_integer": "ensemblenet.cli.options.positive_integer"})
