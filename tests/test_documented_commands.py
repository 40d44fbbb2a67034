"""The commands parse every command that README and docs show; those of the guide run, see test_guide.py."""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from ensemblenet.cli.compare import read_study
from ensemblenet.cli.completion import parser_of
from ensemblenet.cli.fit import taken_engine, written_out
from ensemblenet.cli.options import CommandParser
from ensemblenet.errors import EnsembleNetError
from ensemblenet.training.settings import FitCLI, complete_arguments

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
# What stands for something of the reader's, where a parser wants more than any text.
EXAMPLES = {
    "S": "1",
    "FORMAT": "onnx",
    "FILE": "mnist1d/ensemblenet",
    "NAME": "mnist1d/base",
    "...": "imagenette/ensemblenet",
}
RESUMED = {"fit": "mnist1d/base", "compare": "compare/mnist1d"}  # what the folder of a run holds


def commands(text: str) -> list[str]:
    """The commands of a page: lines of its blocks, and what stands between backticks with an argument."""
    text = text.replace("\\\n", " ")  # a command that goes on in the next line
    blocks = re.findall(r"^```(?:sh|console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    start = r"(?:[A-Z_]+=\S+ |torchrun [^\n]*?-m )*ensemblenet (?=[a-z]+(?: |$))"
    lines = [line for block in blocks for line in re.findall(rf"^{start}((?:'[^']*'|[^'\n])+)", block, re.MULTILINE)]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*lines, *re.findall(r"`ensemblenet ([a-z]+ [^`]+)`", prose)]


def words(command: str) -> list[str]:
    """A command's words without what may be left out, with examples in the places of the reader's own."""
    return [EXAMPLES.get(word, word) for word in shlex.split(re.sub(r" \[--[^]]*\]", "", command), comments=True)]


class Parsed(FitCLI):
    """`fit` up to the point where it makes what was asked for."""

    def instantiate_classes(self) -> None:
        self.model = SimpleNamespace()  # type: ignore[assignment]


@cache
def parser(name: str) -> CommandParser:
    return parser_of(name)  # type: ignore[return-value]


def complaint(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command's own parser says against a command."""
    name, *arguments = words(command)
    if "--resume" in arguments:
        at = arguments.index("--resume")
        arguments[at : at + 2] = ["--config", RESUMED[name]]
    try:
        if name == "fit":
            Parsed(complete_arguments(written_out(taken_engine(arguments)[1])), ExitStack())
        elif name == "compare":
            read_study(arguments)
        else:
            parser(name).parse_with_data(arguments)
    except EnsembleNetError as error:
        return str(error)
    except SystemExit as ended:
        return capsys.readouterr().err if ended.code else ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_are_parsed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page.read_text()):
        assert not complaint(command, capsys), command


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fit mnist1d/base --epoch 3", "epoch"),
        ("fit mnist1d/bass", "did you mean mnist1d/base?"),
        ("compare compare/mnist1d --methods '[basis]'", "basis"),
        ("export RUN --output x --frmt onnx", "--frmt"),
        ("completion csh", "csh"),
    ],
)
def test_a_wrong_command_is_found(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands(f"`ensemblenet {command}`\n```\nOMP_NUM_THREADS=1 ensemblenet {command}\n```") == [command] * 2
    assert said in complaint(command, capsys)
