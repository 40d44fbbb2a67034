"""Settings of `fit` and `compare` that are refused before their classes are imported, which takes seconds."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ensemblenet.cli.fit import SHORT_NAMES, written_out
from ensemblenet.cli.options import budget_share, check_place, check_there, device_name, underscored, with_config
from ensemblenet.errors import ModelNameError, TrainingError
from ensemblenet.names import arguments_of, check_class, check_network
from ensemblenet.storage.bucket import run_folder, runs_folder
from ensemblenet.storage.runs import CONFIG, check_resumable

__all__ = ["check_settings", "study_arguments"]

# What each part of the settings holds: what the command itself adds, and the arguments of a class in a file.
_OWN = {
    "fit": "model data trainer seed_everything name runs plan base_run checkpoint_steps ema log_to resume trust config "
    "engine address optimizer lr_scheduler print_config print_shtab",
    "compare": "name runs resume trust workers engine address cpus_per_trial gpus_per_trial config print_config",
}
_CLASSES = {
    "fit": {
        "model": "ensemblenet.training.module.Classifier",
        "model.conversion": "ensemblenet.recipe.Conversion",
        "model.optimization": "ensemblenet.training.optimization.Optimization",
        "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    },
    "compare": {
        "": "ensemblenet.study.settings.Study",
        "tuning": "ensemblenet.study.settings.Tuning",
    },
}
_OF_STUDIES = {  # names that `fit` has
    "weights": "base.init_args.weights",
    "batch_size": "data.init_args.batch_size",
    "teacher_temperature": "temperature",
}
_SHORT_NAMES = {"fit": [underscored(f"--{name}")[2:] for name in SHORT_NAMES], "compare": list(_OF_STUDIES)}
_COUNTS = ("data.init_args.batch_size", "trainer.max_epochs", "trainer.max_steps", "checkpoint_steps")
_NUMBERS = ("model.codistillation_weight", "model.optimization.lr", "model.optimization.weight_decay", "ema")
_OF_ANY_CLASS = {"help", "class_path", "init_args", "dict_kwargs"}  # as jsonargparse takes them
_BY_NAME = {"data": "ensemblenet.data", "model.base": "ensemblenet.models", "base": "ensemblenet.models"}
# settings that name a class, and where classes of short names are
_OF_CLASSES = _BY_NAME | {
    f"trainer.{name}": f"lightning.pytorch.{name.removesuffix('s')}s"
    for name in ("callbacks", "logger", "strategy", "profiler", "plugins")
}
_PARTS = {"model", "tuning", *_CLASSES["fit"], *_BY_NAME, *(f"{place}.init_args" for place in _BY_NAME)}


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
    written = written_out(arguments) if command == "fit" else study_arguments(arguments)
    if not written:
        raise TrainingError("A configuration is needed: a YAML file, or a name in `ensemblenet configs list`.")
    given = _classes_of_resumed(written)
    for key, value in _options(written):
        if key == "config" and value is not None and Path(value).suffix in (".yaml", ".yml", ".json"):
            settings = _read(Path(value))
            of = "fit" if isinstance(settings.get("model"), Mapping) else command
            found, where = _checked(dict(_leaves(settings)), of, f"{value}: "), f"{value}: "
        else:
            found, where = _checked({key: value}, command), ""
        given |= _check_classes(given, found, where)
    if (resume := given.get("resume")) not in (None, "auto"):
        check_resumable(run_folder(resume), *(["auto"] if command == "fit" else []))
    check_place(runs_folder(given.get("runs") or "runs").absolute())
    for key in ("base_run", "data", "model.teacher"):
        if isinstance(path := given.get(key), str) and "/" in path and not path.startswith("{"):
            check_there(path)
    for base in ("base", "model.base"):
        weights = given.get(f"{base}.init_args.weights")
        named = given.get(f"{base}.class_path") == "ensemblenet.models.create"
        if named and isinstance(weights, str) and "/" in weights:
            check_there(weights)
    _check_values(given, command)


def _classes_of_resumed(arguments: Sequence[str]) -> dict[str, Any]:
    """Which classes the run has that goes on."""
    resume = dict(_options(arguments)).get("resume")
    if resume in (None, "auto") or not (file := run_folder(resume) / CONFIG).is_file():
        return {}
    return {key: value for key, value in _leaves(_read(file)) if key.endswith(".class_path")}


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
        raise TrainingError(f"{file} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise TrainingError(f"{file} must hold settings by name, such as `name: mine`.")
    return settings


def _leaves(settings: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in a configuration, by keys such as `trainer.max_epochs`."""
    for name, value in settings.items():
        key = f"{place}{name}"
        if isinstance(value, Mapping) and value and key in _PARTS:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _checked(settings: dict[str, Any], command: str, where: str = "") -> dict[str, Any]:
    """The settings, of which there is each."""
    known = {place: arguments_of(source) or [] for place, source in _CLASSES[command].items()}
    known[""] = [*known.get("", []), *_OWN[command].split()]
    for key in settings:
        place = ""
        for name in key.split("."):
            if place in known and name not in {*known[place], *_OF_ANY_CLASS}:
                every = [f"{part}.{inner}".lstrip(".") for part, names in known.items() for inner in names]
                same = [other for other in every if other.rpartition(".")[2] == name]
                short = [] if where else _SHORT_NAMES[command]
                near = same[:1] or difflib.get_close_matches(key, [*short, *every], n=1)
                meant = f" Did you mean {near[0]}?" if near else f" `ensemblenet {command} --help` lists them."
                raise TrainingError(f"{where}There is no setting {key}.{meant}")
            place = f"{place}.{name}".lstrip(".")
    return settings


def _check_classes(given: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Refuse classes and networks that there are not, and arguments that a class does not take.

    Args:
        given: the settings before these.
        settings: by keys such as `data.init_args.folder`.
        where: the file that they stand in, for messages.

    Returns:
        The settings, with the class that the name of one stands for.
    """
    settings = dict(settings)
    for place, room in _OF_CLASSES.items():
        if isinstance(name := settings.get(place), str) and re.fullmatch(r"([\w.]+\.)?[A-Z]\w*", name):
            settings[f"{place}.class_path"] = name
        if (name := settings.get(f"{place}.class_path")) is not None:
            settings[f"{place}.class_path"] = _whole(str(name), room)
    now = {**given, **settings}
    for key, value in settings.items():
        place = next((place for place in _OF_CLASSES if key.startswith(f"{place}.")), "")
        name = key.removeprefix(f"{place}.").removeprefix("init_args.").partition(".")[0]
        kind = str(now.get(f"{place}.class_path", ""))
        try:
            if place:
                check_class(kind, None if name in _OF_ANY_CLASS else name)
            if (kind, name) == ("ensemblenet.models.create", "name") and isinstance(value, str):
                check_network(value)
            for path, argument in _named_classes(value, _OF_CLASSES.get(key, "")):
                check_class(path, argument)
        except ModelNameError as error:
            raise ModelNameError(f"{where}{key}: {error}") from error
    return settings


def _whole(name: str, room: str) -> str:
    """The path of a class whose name may be short; one that is not known by it stays short."""
    return name if "." in name or arguments_of(f"{room}.{name}") is None else f"{room}.{name}"


def _named_classes(value: Any, room: str) -> Iterator[tuple[str, str | None]]:
    """The classes that a setting describes by class_path and init_args, alone and with each of their arguments."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:  # the parser says so
            return
    if isinstance(value, list):
        for item in value:
            yield from _named_classes(item, room)
    if not isinstance(value, Mapping):
        return
    if isinstance(name := value.get("class_path"), str):
        path = _whole(name, room)
        arguments = value.get("init_args")
        yield path, None
        yield from ((path, str(name)) for name in (arguments if isinstance(arguments, Mapping) else ()))
    for item in value.values():
        if not isinstance(item, str):
            yield from _named_classes(item, "")


def study_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of `compare` with `--config` before a file, underscores in names, and short names written out.

    Example:
        >>> study_arguments(["--num-classes", "3", "--weights=a.pth"])
        ['--num_classes', '3', '--base.init_args.weights=a.pth']
    """
    written = []
    for argument in map(underscored, with_config(arguments)):
        name, equals, value = argument.partition("=")
        key = _OF_STUDIES.get(name[2:]) if name.startswith("--") else None
        written.append(f"--{key}{equals}{value}" if key else argument)
    return written


def _check_values(given: Mapping[str, Any], command: str) -> None:
    """Refuse numbers and devices that are none, and conversions that cannot be."""
    if command == "compare" and isinstance(given.get("device"), str):
        try:
            device_name(given["device"])
        except argparse.ArgumentTypeError as error:
            raise TrainingError(f"--device: {error}") from error
    for keys, kind, what in ((_COUNTS, int, "an integer"), (_NUMBERS, float, "a number")):
        for key in keys:
            if (value := given.get(key)) not in (None, "auto"):  # where a number may not be so, the parser says it
                try:
                    kind(value)
                except (TypeError, ValueError, OverflowError) as error:
                    raise TrainingError(f"{key} must be {what}, got {value!r}.") from error
    of_fit = {f"model.conversion.{name}": name for name in arguments_of(_CLASSES["fit"]["model.conversion"]) or []}
    own = {name: name for name in of_fit.values()} if command == "compare" else {}
    found = {name: given[key] for key, name in (of_fit | own).items() if given.get(key) is not None}
    if not found or given.get("resume") is not None:  # what goes on has stored settings as well
        return
    if command == "compare" and {f"{base}.init_args.weights" for base in ("base", "model.base")} & given.keys():
        found = {"init": "inherit", **found}  # as a study does
    from ensemblenet.recipe import Conversion  # imports PyTorch

    if isinstance(found.get("budget"), str):
        try:
            found["budget"] = budget_share(found["budget"])
        except argparse.ArgumentTypeError as error:
            raise TrainingError(f"--budget: {error}") from error
    Conversion(**{name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in found.items()})
