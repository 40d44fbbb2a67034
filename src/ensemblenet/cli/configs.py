"""The command `configs`: the configurations that come along."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ensemblenet.cli.options import command_parser, config_file
from ensemblenet.cli.options import configs as shipped
from ensemblenet.storage.atomic import atomic_path

__all__ = ["configs"]


def configs(arguments: Sequence[str]) -> None:
    """List, print or copy configurations of `fit` and `compare`.

    Args:
        arguments: command-line arguments.

    Raises:
        TrainingError: no configuration has that name.
        FileExistsError: the copy would replace a file.
    """
    parser = command_parser(
        "configs",
        "The configurations that come along. `fit` and those under compare/ of `compare` take their names in place of "
        "a file: `ensemblenet fit mnist1d/ensemblenet`.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="their names, and what each is")
    for action, summary in (("show", "print one"), ("copy", "copy one, to change it")):
        chosen = actions.add_parser(action, help=summary)
        chosen.add_argument("name", metavar="NAME", type=config_file, help="such as mnist1d/ensemblenet")
    chosen.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path(), help="(default: this one)")
    options = parser.parse_args(arguments)
    if options.action == "list":
        for name, file in shipped().items():
            about = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            print(f"{name:32}{about}")
    elif options.action == "show":
        print(options.name.read_text(encoding="utf-8"), end="")
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        copy = options.folder / options.name.name
        if os.path.lexists(copy):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(copy))
        with atomic_path(copy) as unfinished:
            unfinished.write_bytes(options.name.read_bytes())
        print(copy)
