"""Which run goes on: one that was made with the same settings, and that no other process is writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ensemblenet.errors import BusyError
from ensemblenet.storage.bucket import address, is_address, pull
from ensemblenet.storage.lock import read_writer, sole_writer
from ensemblenet.storage.runs import CONFIG, RESULTS, unfinished_runs

__all__ = ["applied_settings", "changed_setting", "is_longer", "take_unfinished"]

# What decides the result of a run; all else, such as devices, precision, logs and callbacks, may change.
_FIXED = (
    "seed_everything",
    "plan",
    "model",
    "data",
    "ema",
    *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "limit_train_batches", "overfit_batches")),
    *(f"trainer.{name}" for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")),
)
_FREE = (
    "model.heads",
    "model.channels_last",
    *(f"data.init_args.{name}" for name in ("num_workers", "eval_batch_size", "cache")),
    *(f"data.init_args.{name}" for name in ("on_broken", "max_broken", "on_damage")),
)
_MAY_GROW = ("trainer.max_epochs", "trainer.max_steps")
_MAY_STEER = (
    "model.optimization.lr",
    "model.optimization.warmup",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
)
_MAY_MOVE = ("data.init_args.folder", "model.teacher")
_UNLIMITED = (None, -1)
_SHOWN = 3  # runs that one line names


def changed_setting(
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    fixed: Sequence[str] = _FIXED,
    *,
    named: bool = False,
    grows: bool = True,
) -> str | None:
    """The first setting that decides the result, is not what it was, and may not change.

    A run may be made longer. Data may move: a folder may be named otherwise, and anew where it is no longer there.

    Args:
        stored: a run's configuration, as plain data.
        now: the same of the command that would go on with it.
        fixed: the settings, or groups of them, that decide the result.
        named: whether the user names the run: then its data may lie elsewhere though its folder is still there, and the
            optimizer's course may change, as where a loss became non-finite.
        grows: whether it may be made longer.

    Returns:
        Its name with both values; None if there is no such setting.

    Example:
        >>> changed_setting({"seed_everything": 3, "name": "a"}, {"seed_everything": 4, "name": "b"})
        'seed_everything 3, not 4'
    """
    for name, old, new in _changes(stored, now):
        is_allowed = _is_allowed(name, old, new, named) and (grows or name not in _MAY_GROW)
        if _decides(name, fixed) and not is_allowed:
            return f"{name} {_in_words(old)}, not {_in_words(new)}"
    return None


def applied_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that decide the result and from now on are others, in words.

    Example:
        >>> applied_settings({"trainer": {"max_epochs": 5}}, {"trainer": {"max_epochs": 8, "devices": 2}})
        ['trainer.max_epochs is 8, and was 5']
    """
    return [
        f"{name} is {_in_words(new)}, and was {_in_words(old)}"
        for name, old, new in _changes(stored, now)
        if _decides(name, _FIXED)
    ]


def is_longer(stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run is to be longer than it was.

    Example:
        >>> is_longer({"trainer": {"max_epochs": 5}}, {"trainer": {"max_epochs": 8}})
        True
    """
    return any(name in _MAY_GROW for name, *_ in _changes(stored, now))


def _changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before, after = dict(_leaves(stored)), dict(_leaves(now))
    for name in before | after:
        if before.get(name) != after.get(name):
            yield name, before.get(name), after.get(name)


def _in_words(value: Any) -> str:
    """A value; a whole number in one way, which one file has as 1 and another as 1.0."""
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _decides(name: str, fixed: Sequence[str]) -> bool:
    return name not in _FREE and any(f"{name}.".startswith(f"{group}.") for group in fixed)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def _is_allowed(name: str, old: Any, new: Any, named: bool) -> bool:
    if name in _MAY_GROW:
        return new in _UNLIMITED or (old not in _UNLIMITED and new > old)
    if named and name == "model.optimization.weight_decay":
        return bool(old) and bool(new)  # without one, the optimizer has its parameters in other groups
    if named and name in _MAY_STEER:
        return True
    if name in _MAY_MOVE and isinstance(old, str) and isinstance(new, str):
        return named or (not is_address(old) and (not Path(old).exists() or Path(old).resolve() == Path(new).resolve()))
    return False


def take_unfinished(
    runs: str | Path, name: str, change: Callable[[Path, Mapping[str, Any]], str | None], held: ExitStack
) -> Path | None:
    """Become the writer of the newest unfinished run that fits, and say which ones were passed over.

    Args:
        runs: where run folders are; a folder, or a URL.
        name: begins the names of those that count.
        change: what a run's folder and configuration have that keeps it from going on, such as
            [`changed_setting`][ensemblenet.training.resume.changed_setting] says; None where nothing does.
        held: when it ends, other processes may write the folder.
    """
    passed: list[str] = []
    found = None
    for folder in unfinished_runs(runs, name):
        # Before it is locked: a process that only looks must not seem to write it to one whose run it is.
        if changed := change(folder, _stored(folder)):
            passed.append(f"{address(folder)}, made with {changed}")
            continue
        with ExitStack() as attempt:
            try:
                attempt.enter_context(sole_writer(folder))
            except BusyError:
                passed.append(f"{address(folder)}, being written by {read_writer(folder) or 'another process'}")
                continue
            pull(folder)
            if (folder / RESULTS).exists() or change(folder, _stored(folder)):  # another process had it until now
                continue
            held.enter_context(attempt.pop_all())
            found = folder
            break
    if passed:
        more = f"; and {len(passed) - _SHOWN} more" if len(passed) > _SHOWN else ""
        Console().print(f"Passed over: {'; '.join(passed[:_SHOWN])}{more}.", highlight=False, soft_wrap=True)
    return found


def _stored(folder: Path) -> Mapping[str, Any]:
    try:
        return yaml.safe_load((folder / CONFIG).read_text()) or {}
    except yaml.YAMLError:
        return {}
