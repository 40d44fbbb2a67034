"""How a model was made from its base, as plain data: enough to build it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from torch import nn

from ensemblenet.conversion.initialise import Init
from ensemblenet.errors import LoadError
from ensemblenet.functional import Combine, Task

__all__ = ["BaseSource", "Recipe", "find_source"]

FORMAT = 1


@dataclass(frozen=True)
class BaseSource:
    """A base that a known factory makes: a timm model, or one of `ensemblenet.models`.

    Attributes:
        factory: "timm" or "ensemblenet".
        name: the model's name there.
        arguments: keyword arguments, plain numbers and lists.
    """

    factory: str
    name: str
    arguments: dict[str, Any]

    def build(self) -> nn.Module:
        """Make the base, with random weights.

        Raises:
            LoadError: the factory does not know it.
        """
        makers = {"timm": _build_timm, "ensemblenet": _build_own}
        if self.factory not in makers:
            raise LoadError(f"Unknown base factory {self.factory!r}: expected one of {sorted(makers)}.")
        try:
            return makers[self.factory](self.name, self.arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LoadError(f"The base {self.name!r} of {self.factory} cannot be built: {error}") from error


@dataclass(frozen=True)
class Recipe:
    """Plain data from which a base becomes the model again.

    Attributes:
        base: where the base comes from, or None if the user must bring it.
        input_shape: the shape of one example.
        input_dtype: its dtype, such as "float32".
        num_heads: K.
        split_at: the split point's name.
        width: the share of its channels that a head keeps.
        multiple: what large channel counts are rounded to.
        frozen: graph nodes that keep their sizes.
        init: how the weights began.
        seed: the source of chance.
        combine: how head outputs become one prediction.
        task: what the outputs mean.
        format: the version of this format.
    """

    base: BaseSource | None
    input_shape: tuple[int, ...]
    input_dtype: str
    num_heads: int
    split_at: str
    width: float
    multiple: int
    frozen: tuple[str, ...]
    init: Init
    seed: int
    combine: Combine
    task: Task
    format: int = FORMAT

    def with_heads(self, num_heads: int) -> Recipe:
        """The recipe of the same model with its first heads only."""
        return replace(self, num_heads=num_heads)

    def to_json(self) -> str:
        """The recipe as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe, believing nothing.

        Raises:
            LoadError: it is not a recipe, or one of a newer format.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise LoadError(f"The recipe is not JSON: {error}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise LoadError("The recipe is not one of ensemblenet's: it has no 'format'.")
        if data["format"] != FORMAT:
            raise LoadError(f"The recipe has format {data['format']!r}; this version reads format {FORMAT}.")
        _check_fields(cls, data, "recipe")
        if data["base"] is not None:
            _check_fields(BaseSource, data["base"], "recipe's base")
            data["base"] = BaseSource(**data["base"])
        for name, expected, is_valid in _checks(data):
            if not is_valid:
                raise LoadError(f"The recipe's {name} must be {expected}, got {data[name]!r}.")
        data["input_shape"], data["frozen"] = tuple(data["input_shape"]), tuple(data["frozen"])
        return cls(**data)


def _check_fields(kind: type, data: Any, what: str) -> None:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise LoadError(f"The {what} must have the fields {sorted(names)}, got {got}.")


def _checks(data: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Every field, what it must be, and whether it is."""
    shape, frozen, base = data["input_shape"], data["frozen"], data["base"]
    return [
        ("base", "a factory, a name and arguments", base is None or _is_plain(base)),
        (
            "input_shape",
            "a list of positive integers",
            isinstance(shape, list) and all(map(_is_count, shape)),
        ),
        (
            "input_dtype",
            "a dtype's name",
            data["input_dtype"] in ("float64", "float32", "float16", "bfloat16", "int64"),
        ),
        (
            "num_heads",
            "an integer from 1 to 1024",
            _is_count(data["num_heads"]) and data["num_heads"] <= 1024,
        ),
        ("split_at", "a name", isinstance(data["split_at"], str)),
        ("width", "a number in (0, 1]", isinstance(data["width"], (int, float)) and 0 < data["width"] <= 1),
        ("multiple", "a positive integer", _is_count(data["multiple"])),
        (
            "frozen",
            "a list of names",
            isinstance(frozen, list) and all(isinstance(name, str) for name in frozen),
        ),
        ("init", f"one of {get_args(Init)}", data["init"] in get_args(Init)),
        ("seed", "an integer", isinstance(data["seed"], int)),
        ("combine", f"one of {get_args(Combine)}", data["combine"] in get_args(Combine)),
        ("task", f"one of {get_args(Task)}", data["task"] in get_args(Task)),
    ]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_plain(base: BaseSource) -> bool:
    values = base.arguments.values() if isinstance(base.arguments, dict) else [None]
    numbers = [number for value in values for number in (value if isinstance(value, list) else [value])]
    strings = isinstance(base.factory, str) and isinstance(base.name, str)
    return strings and all(isinstance(number, (int, float, bool)) for number in numbers)


# -- known factories


def find_source(base: nn.Module, input_shape: tuple[int, ...]) -> BaseSource | None:
    """Where a base comes from, if a known factory makes one with the same layers; `input_shape` is of one example."""
    candidates: list[BaseSource] = []
    module = type(base).__module__
    if module.startswith("timm.") and getattr(base, "pretrained_cfg", None):
        name = str(base.pretrained_cfg["architecture"])  # pyright: ignore[reportIndexIssue, reportArgumentType]
        arguments: dict[str, Any] = {"num_classes": base.num_classes}
        if input_shape[0] != 3:
            arguments["in_chans"] = input_shape[0]
        candidates += [BaseSource("timm", name, arguments | more) for more in ({}, {"img_size": [*input_shape[1:]]})]
    elif module.startswith("ensemblenet.models.") and isinstance(getattr(base, "arguments", None), dict):
        candidates.append(BaseSource("ensemblenet", type(base).__name__, dict(base.arguments)))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return next((source for source in candidates if _makes(source, base)), None)


def _makes(source: BaseSource, base: nn.Module) -> bool:
    """Whether a source makes the same layers with the same shapes."""
    try:
        made = source.build()
    except LoadError:
        return False
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (made, base)]
    return shapes[0] == shapes[1] and repr(made) == repr(base)


def _build_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm  # only those who convert timm's models need it

    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model of that name.")
    allowed = {key: value for key, value in arguments.items() if key in ("num_classes", "in_chans", "img_size")}
    return timm.create_model(name, pretrained=False, **allowed)


def _build_own(name: str, arguments: dict[str, Any]) -> nn.Module:
    from ensemblenet import models

    if name not in models.__all__:
        raise ValueError(f"ensemblenet.models has {models.__all__}.")
    return getattr(models, name)(**arguments)
