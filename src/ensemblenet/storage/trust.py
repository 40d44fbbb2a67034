"""What a stored configuration may name.

What the user types or passes as `--config` is code by the user's own will. The `config.yaml` of a saved folder comes
from anyone, and what it names would be imported and called. So a text in it must stand at a key that is known to hold
one, and say what is known there; all else must be numbers, flags or nothing.
"""

from __future__ import annotations

import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from ensemblenet import data, models
from ensemblenet._moved import MOVED
from ensemblenet.errors import LoadError, TrainingError
from ensemblenet.models.sources import TIMM_WORDS, is_known
from ensemblenet.storage.atomic import read_text
from ensemblenet.storage.bucket import run_folder
from ensemblenet.storage.runs import CONFIG, check_resumable

__all__ = ["config_option", "read_config", "resumed"]

_LONGEST = 80
_MOST_SETTINGS = 10_000  # aliases of YAML let a small file stand for more than memory holds


def read_config(file: Path, trust: bool = False) -> dict[str, Any]:
    """Read the configuration that lies in the folder of a run or of a study.

    Args:
        file: YAML.
        trust: whether it may name what it likes.

    Raises:
        LoadError: it is damaged, or names what is not known; which key, and what to do.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "config.yaml")
        >>> _ = file.write_text("{model: {base: {class_path: os.system}}}")
        >>> read_config(file)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ensemblenet.errors.LoadError: ...: 'model.base.class_path' is 'os.system', which is not known: ...
        >>> read_config(file, trust=True)
        {'model': {'base': {'class_path': 'os.system'}}}
    """
    try:
        config = yaml.safe_load(read_text(file))
        leaves = list(islice(_leaves(config, ""), _MOST_SETTINGS))
    except LoadError:
        raise
    except Exception as error:  # whatever a damaged text makes of the parser
        raise LoadError(f"{file} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or len(leaves) == _MOST_SETTINGS:
        raise LoadError(f"{file} must hold settings by name, at most {_MOST_SETTINGS:,}.")
    stranger = next((leaf for leaf in leaves if not _is_allowed(*leaf)), None)
    if stranger is not None and not trust:
        key, value = (repr(part)[:_LONGEST] for part in stranger)
        raise LoadError(
            f"{file}: {key} is {value}, which is not known: a stored configuration may only name networks of timm, "
            "torchvision and ensemblenet.models, and data modules of ensemblenet.data. If you trust whoever wrote it, "
            "add --trust (in Python: trust=True)."
        )
    return config


def config_option(file: Path, trust: bool = False) -> list[str]:
    """What [`read_config`][ensemblenet.storage.trust.read_config] gives, as an option of a command.

    It holds the text: beside a file, jsonargparse would look for further files that values of the settings name.
    """
    return ["--config", yaml.safe_dump(read_config(file, trust), sort_keys=False)]


def resumed(arguments: Sequence[str], *other: str) -> list[str]:
    """The arguments, behind the configuration of the run or study that `--resume FOLDER` names.

    Args:
        arguments: of a command; with `--trust` among them, that configuration may name what it likes.
        other: what `--resume` takes that is no folder.

    Raises:
        TrainingError: `--resume` names no such folder.
        LoadError: what [`read_config`][ensemblenet.storage.trust.read_config] raises.

    Example:
        >>> resumed(["--seed", "3", "--trust", "--resume=auto"], "auto")
        ['--seed', '3', '--resume', 'auto']
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--resume")
    finder.add_argument("--trust", action="store_true")
    try:
        found, others = finder.parse_known_args(arguments)
    except ArgumentError as error:
        raise TrainingError(str(error)) from error
    if found.resume is None:
        return others
    complete = [*others, "--resume", found.resume]
    if found.resume in other:
        return complete
    folder = run_folder(found.resume)
    check_resumable(folder, *other)
    return [*config_option(folder / CONFIG, found.trust), *complete]


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All that is neither a mapping nor a list, and where it stands, such as `trainer.callbacks[].class_path`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, f"{key}[]")
    else:
        yield key, value


# -- what is known


def _is_number(value: Any) -> bool:
    """Also a flag, nothing, and 1e-3, which PyYAML takes for a text."""
    if isinstance(value, str):
        return re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value) is not None
    return value is None or isinstance(value, (int, float))


def _text(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _word(*words: str) -> Callable[[Any], bool]:
    """For settings that may be objects as well: jsonargparse reads those from a file of that name, if there is one."""
    return lambda value: value in words and not Path(value).exists()


def _class_paths(package: ModuleType) -> set[str]:
    """By which class paths the public names of a package go, and went in earlier versions."""
    paths = {f"{package.__name__}.{name}" for name in package.__all__}
    for name in package.__all__:
        try:
            home = getattr(package, name).__module__
        except ImportError:  # a format whose libraries are not installed cannot be made anyway
            continue
        paths |= {f"{place}.{name}" for place in (home, *(old for old, new in MOVED.items() if new == home))}
    return paths


_ANY_TEXT = _text("(?s:.*)")
_SIMPLE_TEXT = _text(r"[\w.+-]*")
_PLACE = _text(r"((file|https?|hf|s3|gc?s|abfss?|az|hdfs)://)?(?!.*(::|://)).*")  # fsspec chains file systems by ::

_BASE, _DATA = r"(model\.)?base\.", r"data\."
_OF_CONVERSION = r"split_at|init|combine|shape|num_heads|importance|freeze|output(\[\])?"

_KNOWN: list[tuple[str, Callable[[Any], bool]]] = [
    (_BASE + "class_path", _class_paths(models).__contains__),
    (_BASE + r"init_args\.name", is_known),
    (_BASE + r"init_args\.weights", _ANY_TEXT),  # tensors are all that is read
    (_BASE + rf"init_args\.options\.({'|'.join(TIMM_WORDS)})", _SIMPLE_TEXT),
    (_DATA + "class_path", _class_paths(data).__contains__),
    (_DATA + r"init_args\.augmentation\.\w+", _SIMPLE_TEXT),
    (_DATA + r"init_args\.reader\.(input_key|target_key)", _SIMPLE_TEXT),
    (_DATA + r"init_args\.(folder|(train|val|test)(\[\])?|dataset)", _PLACE),
    (_DATA + r"init_args\.(level|short|decoder|interpolation|on_broken|on_damage)", _SIMPLE_TEXT),
    (r"name|runs|resume|plan|base_run|log_to|task|device|precision", _ANY_TEXT),
    (rf"(model\.conversion\.)?({_OF_CONVERSION})", _ANY_TEXT),
    (r"methods\[\](\.(method|name|split_at|init))?", _ANY_TEXT),
    (r"optimizer", _word("adamw", "sgd")),
    (r"model\.(task|heads|loss|teacher|optimization\.optimizer)", _ANY_TEXT),
    (r"model\.codistillation_weight", _word("auto")),
    (r"trainer\.(precision|max_time|val_check_interval)", _ANY_TEXT),
    (r"trainer\.devices", _text(r"auto|[-\d, ]+")),
    (r"trainer\.(gradient_clip_algorithm|deterministic|default_root_dir)", _ANY_TEXT),
    (r"trainer\.accelerator", _word("auto", "cpu", "gpu", "cuda", "mps", "tpu")),
    (r"trainer\.strategy", _word("auto", "ddp", "fsdp2", "ddp_find_unused_parameters_true")),
    (r"trainer\.profiler", _word("simple", "advanced", "pytorch")),
]
_TEXT_ALONE = rf"({_BASE}|{_DATA})(?!init_args\.)|{_DATA}init_args\.reader\."  # flags of a reader may let code in


def _is_allowed(key: str, value: Any) -> bool:
    if _is_number(value) and not re.match(_TEXT_ALONE, key):
        return True
    return next((is_known_there(value) for place, is_known_there in _KNOWN if re.fullmatch(place, key)), False)
