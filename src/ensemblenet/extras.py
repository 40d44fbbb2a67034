"""What parts of the package need beyond its core: the extras that pyproject.toml declares."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

from ensemblenet.errors import MissingExtraError

__all__ = ["require"]


def require(extra: str, library: str | None = None) -> None:
    """Check that the libraries of an extra are installed; a room calls it before it imports them.

    Args:
        extra: its name in pyproject.toml, such as "train".
        library: the one that is needed now; None checks all of the extra.

    Raises:
        MissingExtraError: one is not; the message is the command that installs it.

    Example:
        >>> require("train")
    """
    for name in [library] if library else _libraries(extra):
        try:
            version(name)
        except PackageNotFoundError as error:
            raise MissingExtraError(f"{name} is not installed: pip install 'ensemblenet[{extra}]'") from error


def _libraries(extra: str) -> list[str]:
    """The libraries of an extra; the build has replaced the extras that it names by what they hold."""
    try:
        declared = requires("ensemblenet") or []
    except PackageNotFoundError:  # read from a folder: nothing was declared
        return []
    return [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in declared if re.search(rf"extra == .{extra}\W", text)]
