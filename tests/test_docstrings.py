"""Every public class and function shows an example that runs; pytest runs them all as doctests."""

from __future__ import annotations

from importlib import import_module
from inspect import isclass, isfunction
from types import ModuleType

import pytest

MODULES = (
    "ensemblenet",
    *(f"ensemblenet.{name}" for name in ("cost", "data", "functional", "heads", "inputs", "losses", "metrics")),
    *(f"ensemblenet.{name}" for name in ("models", "operations", "recipe", "testing", "timing")),
)


def without_example(module: ModuleType) -> list[str]:
    """The public classes and functions of a module whose own docstring shows no example; errors need none."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not (isclass(value) or isfunction(value)) or (isclass(value) and issubclass(value, Exception)):
            continue
        _, _, example = (value.__doc__ or "").partition("Example:")
        if ">>>" not in example:
            found.append(f"{module.__name__}.{name}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_has_an_example(name: str) -> None:
    assert not without_example(import_module(name))


def test_what_has_none_is_found() -> None:
    module = ModuleType("made")

    class Parent:
        """Has one.

        Example:
            >>> 1
            1
        """

    class Child(Parent):
        pass

    def told() -> None:
        """Example: only in words."""

    class OwnError(Exception):
        pass

    vars(module).update(Parent=Parent, Child=Child, told=told, OwnError=OwnError, NUMBER=3)
    module.__all__ = ["Child", "NUMBER", "OwnError", "Parent", "told"]  # type: ignore[attr-defined]
    assert without_example(module) == ["made.Child", "made.told"]
