"""Networks and data modules as plain data: a `class_path` with `init_args`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ensemblenet.errors import EnsembleNetError, LoadError

__all__ = ["instantiate", "with_defaults"]


def instantiate(kind: type[Any], spec: Mapping[str, Any]) -> Any:
    """Make what a `class_path` with `init_args` describes.

    Args:
        kind: what it must be an instance of.
        spec: plain data with the two keys.

    Raises:
        LoadError: there is no such class, or it does not take these arguments; user errors of its own pass.

    Example:
        >>> from torch import nn
        >>> instantiate(nn.Module, {"class_path": "torch.nn.ReLU", "init_args": {"inplace": True}})
        ReLU(inplace=True)
    """
    parser = _parser(kind)
    try:
        return parser.instantiate(parser.parse_object({"made": dict(spec)}))["made"]
    except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, EnsembleNetError):
            raise
        raise _refused(spec, error) from error


def with_defaults(kind: type[Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same description with the arguments that it leaves to their defaults.

    What was stored before a class got another argument is then the same as what is read today.

    Raises:
        LoadError: there is no such class, or it does not take these arguments.

    Example:
        >>> from torch import nn
        >>> with_defaults(nn.Module, {"class_path": "torch.nn.ReLU"})
        {'class_path': 'torch.nn.ReLU', 'init_args': {'inplace': False}}
    """
    parser = _parser(kind)
    try:
        return parser.parse_object({"made": dict(spec)}).as_dict()["made"]
    except (ArgumentError, ValueError) as error:
        raise _refused(spec, error) from error


def _parser(kind: type[Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made", required=True)
    return parser


def _refused(spec: Mapping[str, Any], error: Exception) -> LoadError:
    """The error in one line, without the other types that jsonargparse tried."""
    text = " ".join(str(error).split())
    reason = re.search(
        r"Problem with given class_path '[^']*': (.+?)(?= - Expected a <class| Given value type|$)", text
    )
    return LoadError(f"{spec.get('class_path')} cannot be made: {reason[1] if reason else text}")
