"""Settings of `fit` and `compare` that are refused before their classes are imported, which takes seconds."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ensemblenet.cli.fit import written_out
from ensemblenet.cli.options import budget_share, check_place, check_there, underscored, with_config
from ensemblenet.errors import TrainingError
from ensemblenet.storage.runs import check_resumable

__all__ = ["check_settings"]

# What each part of the settings holds: what the command itself adds, and the arguments of a class in a file.
_OWN = {
    "fit": "model data trainer seed_everything name runs plan base_run checkpoint_steps ema log_to resume trust config "
    "optimizer lr_scheduler print_config print_shtab",
    "compare": "name runs resume trust workers engine address cpus_per_trial gpus_per_trial config print_config",
}
_CLASSES = {
    "fit": {
        "model": ("ensemblenet/training/module.py", "Classifier"),
        "model.conversion": ("ensemblenet/recipe.py", "Conversion"),
        "model.optimization": ("ensemblenet/training/optimization.py", "Optimization"),
        "trainer": ("lightning/pytorch/trainer/trainer.py", "Trainer"),
    },
    "compare": {
        "": ("ensemblenet/study/settings.py", "Study"),
        "tuning": ("ensemblenet/study/settings.py", "Tuning"),
    },
}
_COUNTS = ("data.init_args.batch_size", "trainer.max_epochs", "trainer.max_steps", "checkpoint_steps")
_NUMBERS = ("model.codistillation_weight", "model.optimization.lr", "model.optimization.weight_decay", "ema")
_OF_ANY_CLASS = {"help", "class_path", "init_args", "dict_kwargs"}  # as jsonargparse takes them


def check_settings(command: str, arguments: Sequence[str]) -> None:
    """Refuse settings that there are not, numbers that are none, and files and folders that are not there.

    Args:
        command: `fit` or `compare`.
        arguments: what follows it.

    Raises:
        TrainingError: no such setting, no number, no configuration, or nothing to resume.
        ConversionError: a conversion that cannot be.
        OSError: --runs cannot be made, or what is to be read is not there.

    Example:
        >>> check_settings("fit", ["--trainer.max_epoch", "3"])
        Traceback (most recent call last):
        ...
        ensemblenet.errors.TrainingError: There is no setting trainer.max_epoch. Did you mean trainer.max_epochs?
    """
    if any(argument.endswith(("-h", "help")) for argument in arguments):
        return
    written = written_out(arguments) if command == "fit" else [underscored(each) for each in with_config(arguments)]
    if not written:
        raise TrainingError("A configuration is needed: a YAML file, or a name in `ensemblenet configs list`.")
    given: dict[str, Any] = {}
    for key, value in _options(written):
        if key == "config" and value is not None and Path(value).suffix in (".yaml", ".yml", ".json"):
            settings = _read(Path(value))
            of = "fit" if isinstance(settings.get("model"), Mapping) else command
            given |= _checked(dict(_leaves(settings)), of, f"{value}: ")
        else:
            given |= _checked({key: value}, command)
    if (resume := given.get("resume")) not in (None, "auto"):
        check_resumable(Path(resume), *(["auto"] if command == "fit" else []))
    check_place(Path(given.get("runs") or "runs").absolute())
    for key in ("base_run", "data", "model.teacher"):
        if isinstance(path := given.get(key), str) and "/" in path and not path.startswith("{"):
            check_there(path)
    _check_values(given, "model.conversion." if command == "fit" else "")


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of options; nothing for null and for a name without a value."""
    before = "="
    for argument, following in pairwise([*arguments, "--"]):
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            value = text if equals else following
            yield key.rstrip("+"), None if value == "null" or (not equals and value.startswith("--")) else value
        elif "=" in before or not before.startswith("--") or before == "--trust":
            raise TrainingError(f"There is neither an option nor a configuration {argument}.")
        before = argument


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise TrainingError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise TrainingError(f"{file} must hold settings by name, such as `name: mine`.")
    return settings


def _leaves(settings: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in a configuration, by keys such as `trainer.max_epochs`."""
    for name, value in settings.items():
        key = f"{place}{name}"
        if isinstance(value, Mapping) and value and key in ("model", "trainer", *_CLASSES["fit"], "tuning"):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _checked(settings: dict[str, Any], command: str, where: str = "") -> dict[str, Any]:
    """The settings, of which there is each."""
    known = {place: _arguments_of(*source) for place, source in _CLASSES[command].items()}
    known[""] = [*known.get("", []), *_OWN[command].split()]
    for key in settings:
        place = ""
        for name in key.split("."):
            if place in known and name not in {*known[place], *_OF_ANY_CLASS}:
                every = [f"{part}.{inner}".lstrip(".") for part, names in known.items() for inner in names]
                same = [other for other in every if other.rpartition(".")[2] == name]
                near = same[:1] or difflib.get_close_matches(key, every, n=1)
                meant = f" Did you mean {near[0]}?" if near else f" `ensemblenet {command} --help` lists them."
                raise TrainingError(f"{where}There is no setting {key}.{meant}")
            place = f"{place}.{name}".lstrip(".")
    return settings


def _arguments_of(file: str, name: str) -> list[str]:
    """The arguments of a class, read from its source."""
    package, _, inner = file.partition("/")
    found = find_spec(package)
    assert found is not None
    source = Path(found.submodule_search_locations[0], inner).read_text(encoding="utf-8")  # type: ignore[index]
    [made] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    for node in made.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
    fields = [node.target for node in made.body if isinstance(node, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name)]


def _check_values(given: Mapping[str, Any], place: str) -> None:
    """Refuse numbers that are none, and conversions that cannot be: their settings stand at `place`."""
    for keys, kind, what in ((_COUNTS, int, "an integer"), (_NUMBERS, float, "a number")):
        for key in keys:
            if (value := given.get(key)) not in (None, "auto"):  # where a number may not be so, the parser says it
                try:
                    kind(value)
                except (TypeError, ValueError) as error:
                    raise TrainingError(f"{key} must be {what}, got {value!r}.") from error
    names = {name: f"{place}{name}" for name in _arguments_of(*_CLASSES["fit"]["model.conversion"])}
    found = {name: given[key] for name, key in names.items() if given.get(key) is not None}
    if not found:
        return
    from ensemblenet.recipe import Conversion  # imports PyTorch

    if isinstance(found.get("budget"), str):
        try:
            found["budget"] = budget_share(found["budget"])
        except argparse.ArgumentTypeError as error:
            raise TrainingError(f"--budget: {error}") from error
    Conversion(**{name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in found.items()})
