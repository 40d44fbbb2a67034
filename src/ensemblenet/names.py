"""Names of classes, their arguments and networks, read from source: a wrong one is told before its library is imported.

Importing timm, torchvision or Lightning takes seconds; reading their source takes a fifth of one.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ensemblenet.errors import ModelNameError

__all__ = ["arguments_of", "check_class", "check_network", "no_such_network"]

_TIMM = r"^@register_model\n(?:@.*\n)*def (\w+)"
_TIMM_RENAMED = r"^register_model_deprecations\(__name__, \{(.*?)^\}\)"
_TORCHVISION = r"^@register_model\(\)\n(?:(?:@|    |\)).*\n)*def (\w+)"


def arguments_of(file: str, name: str) -> list[str] | None:
    """The arguments of a class or function.

    Args:
        file: its place in a package, such as `lightning/pytorch/trainer/trainer.py`.
        name: what it is called there.

    Returns:
        None where it takes any, `**options`.

    Example:
        >>> arguments_of("ensemblenet/models/mnist1d.py", "MNIST1DNet")
        ['width', 'num_classes']
    """
    made = next(node for node in _parsed(file).body if getattr(node, "name", None) == name)
    body = made.body if isinstance(made, ast.ClassDef) else []
    functions = [node for node in [made, *body] if isinstance(node, ast.FunctionDef)]
    for node in functions:
        if node is made or node.name == "__init__":
            names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            return None if node.args.kwarg else [argument for argument in names if argument != "self"]
    fields = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name)]


def check_class(path: str, argument: str | None = None) -> None:
    """Refuse a class that this package has not, or an argument that it does not take; nothing is said of other classes.

    Args:
        path: of the class, such as `ensemblenet.data.MNIST1D`.
        argument: its name.

    Raises:
        ModelNameError: there is no such class, or no such argument.

    Example:
        >>> check_class("ensemblenet.data.MNIST1D", "num_trian")
        Traceback (most recent call last):
        ...
        ensemblenet.errors.ModelNameError: ensemblenet.data.MNIST1D takes no num_trian. Did you mean num_train?
    """
    room, _, name = path.rpartition(".")
    if room not in ("ensemblenet.data", "ensemblenet.models"):
        return
    homes = {
        alias.name: f"{node.module.replace('.', '/')}.py"
        for node in ast.walk(_parsed(f"{room.replace('.', '/')}/__init__.py"))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(room)
        for alias in node.names
    }
    if name not in homes:
        raise ModelNameError(f"{room} has no {name}.{_suggest(name, list(homes), 1)}")
    taken = arguments_of(homes[name], name)
    if argument is not None and taken is not None and argument not in taken:
        near = _suggest(argument, taken, 1) or f" It takes {', '.join(taken)}."
        raise ModelNameError(f"{path} takes no {argument}.{near}")


def check_network(name: str) -> None:
    """Refuse a name that neither timm nor torchvision knows; nothing is said of other networks.

    Raises:
        ModelNameError: there is no such network.

    Example:
        >>> check_network("resnet18"), check_network("resnet50.a1_in1k"), check_network("my.module:network")
        (None, None, None)
    """
    source, colon, rest = name.partition(":")
    timm = sys.modules.get("timm")
    if not colon and timm is not None and timm.is_model(name):  # one that was registered in this process, too
        return
    if not colon:
        known = _registered("timm", ("models/*.py",), _TIMM, _TIMM_RENAMED)
        source, rest = "timm", name
    elif source == "torchvision":
        known = _registered("torchvision", ("models/*.py", "models/video/*.py"), _TORCHVISION)
    else:
        return
    if known and rest.partition(".")[0] not in known:
        raise no_such_network(source, rest, known)


def no_such_network(library: str, name: str, known: Sequence[str]) -> ModelNameError:
    """The error that says so, with the names that are closest."""
    near = _suggest(name, known, 3)
    if library == "torchvision":
        return ModelNameError(f"torchvision has no classification model {name!r}.{near}")
    others = "Other networks are named torchvision:NAME, transformers:NAME or module.path:callable."
    return ModelNameError(f"timm has no model {name!r}.{near} {others}")


@cache
def _registered(library: str, files: tuple[str, ...], pattern: str, renamed: str | None = None) -> list[str]:
    """The names of a library's networks; none where it is not installed."""
    texts = [
        path.read_text(encoding="utf-8")
        for place in _package(library)
        for each in files
        for path in Path(place).glob(each)
    ]
    names = [name for text in texts for name in re.findall(pattern, text, re.MULTILINE)]
    blocks = re.findall(renamed, "\n".join(texts), re.MULTILINE | re.DOTALL) if renamed else []
    return sorted({*names, *(name for block in blocks for name in re.findall(r"['\"](\w+)['\"] *:", block))})


def _suggest(name: str, known: Sequence[str], most: int) -> str:
    near = difflib.get_close_matches(name, known, n=most)
    return f" Did you mean {', '.join(near)}?" if near else ""


def _parsed(file: str) -> ast.Module:
    package, _, inner = file.partition("/")
    return ast.parse(Path(*_package(package), inner).read_text(encoding="utf-8"))


def _package(name: str) -> list[str]:
    """The folder of a package; nothing where it is not installed."""
    found = find_spec(name)
    return list((found and found.submodule_search_locations) or [])[:1]
