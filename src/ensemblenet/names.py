"""Names of classes, their arguments and networks, read from source: a wrong one is told before its library is imported.

Importing timm, torchvision or Lightning takes seconds; reading their source takes a fifth of one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ensemblenet.errors import ModelNameError, did_you_mean

__all__ = ["arguments_of", "check_class", "check_network", "no_such_network"]

_TIMM = r"^@register_model\n(?:@.*\n)*def (\w+)"
_TIMM_RENAMED = r"^register_model_deprecations\(__name__, \{(.*?)^\}\)"
_TORCHVISION = r"^@register_model\(\)\n(?:(?:@|    |\)).*\n)*def (\w+)"


_OWN = ("ensemblenet.data", "ensemblenet.models")
_FARTHEST = 8  # how many modules a name is followed through


def arguments_of(path: str) -> list[str] | None:
    """The arguments of a class or function, read from its source: nothing is imported, and nothing runs.

    Args:
        path: such as `lightning.pytorch.Trainer`.

    Returns:
        None where the source is not found, or does not say it: `**options` that go elsewhere than to a base class.

    Example:
        >>> arguments_of("ensemblenet.models.MNIST1DNet"), arguments_of("no.such.Thing")
        (['width', 'num_classes'], None)
    """
    found = _definition(path)
    if found is None:
        return None
    made, module = found
    if isinstance(made, ast.FunctionDef):
        return None if made.args.kwarg else _named(made)
    functions = {node.name: node for node in made.body if isinstance(node, ast.FunctionDef)}
    if "__new__" in functions:
        return None
    if (init := functions.get("__init__")) is not None:
        own = [name for name in _named(init) if name != "self"]
        if init.args.kwarg is None:
            return own
        reads = [node for node in ast.walk(init) if isinstance(node, ast.Name) and node.id == init.args.kwarg.arg]
        inherited = _inherited(made, module) if len(reads) == 1 and _passes_on(init) else None
        return None if inherited is None else [*own, *inherited]
    inherited = _inherited(made, module) if made.bases else []
    if inherited is None or made.keywords:
        return None
    if any("dataclass" in ast.unparse(decorator) for decorator in made.decorator_list):
        fields = [node.target for node in made.body if isinstance(node, ast.AnnAssign)]
        return [*inherited, *(field.id for field in fields if isinstance(field, ast.Name))]
    return None if made.decorator_list else inherited


def check_class(path: str, argument: str | None = None) -> None:
    """Refuse a class that its module has not, or an argument that it does not take; where in doubt, nothing is said.

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
    module, _, name = path.rpartition(".")
    source = _source(module)
    if source is None:
        return
    known = {bound for node in ast.walk(_parsed(source)) for bound in _bound(node)}
    if name not in known:
        if module in _OWN or not known & {"*", "__getattr__"}:
            raise ModelNameError(f"{module} has no {name}.{did_you_mean(name, sorted(known), 1)}")
        return
    taken = arguments_of(path)
    if argument is not None and taken is not None and argument not in taken:
        near = did_you_mean(argument, taken, 1) or f" It takes {', '.join(taken) or 'nothing'}."
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
    if not colon:
        timm = sys.modules.get("timm")
        if timm is not None and timm.is_model(name):  # one that was registered in this process, too
            return
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
    near = did_you_mean(name, known, 3)
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


def _definition(path: str, farthest: int = _FARTHEST) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
    """The class or function of a path, and the module that it stands in; None where that is not plain."""
    module, _, name = path.rpartition(".")
    source = _source(module)
    if source is None or farthest == 0:
        return None
    tree = _parsed(source)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (alias := _alias(node, name)):
            package = module.split(".") if source.name == "__init__.py" else module.split(".")[:-1]
            above = package[: len(package) + 1 - node.level] if node.level else []
            return _definition(".".join([*above, *filter(None, [node.module]), alias]), farthest - 1)
    return None


def _alias(node: ast.ImportFrom, name: str) -> str | None:
    """What an import takes under a name."""
    return next((alias.name for alias in node.names if name == (alias.asname or alias.name)), None)


def _bound(node: ast.AST) -> list[str]:
    """The names that a statement gives to something; `*` for names that it does not show."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return ["*"] if node.id in ("globals", "exec", "setattr") else []
    if isinstance(node, ast.Name):
        return [node.id]
    return [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []


def _named(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _passes_on(init: ast.FunctionDef) -> bool:
    """Whether it gives `**options` to the constructor of its base class."""
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)]
    return any(
        ast.unparse(call.func) == "super().__init__" and any(keyword.arg is None for keyword in call.keywords)
        for call in calls
    )


def _inherited(made: ast.ClassDef, module: str) -> list[str] | None:
    """The arguments of the one base class."""
    if len(made.bases) != 1:
        return None
    base = ast.unparse(made.bases[0])
    return arguments_of(f"{module}.{base}") if base.isidentifier() else None


def _source(module: str) -> Path | None:
    """The file of a module, which is not imported, and neither are the packages that it lies in."""
    package, *inner = module.split(".")
    if not package.isidentifier() or package == "__main__" or (spec := find_spec(package)) is None:
        return None
    if not spec.submodule_search_locations:
        places = [Path(spec.origin or "")] if not inner else []
    else:
        places = [
            file
            for place in spec.submodule_search_locations
            for file in (Path(place, *inner, "__init__.py"), Path(place, *inner).with_suffix(".py"))
        ]
    return next((file for file in places if file.suffix == ".py" and file.is_file()), None)


@cache
def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # whoever imports it says so
        return ast.Module([ast.ImportFrom(None, [ast.alias("*")], 0)], [])


def _package(name: str) -> list[str]:
    """The folder of a package; nothing where it is not installed."""
    found = find_spec(name)
    return list((found and found.submodule_search_locations) or [])[:1]
