"""How a conversion is asked for, and how a model was made from its base, as plain data."""

from __future__ import annotations

import json
import math
import reprlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from ensemblenet._moved import renamed
from ensemblenet.cost import Budget
from ensemblenet.errors import ConversionError, LoadError
from ensemblenet.functional import Combine, Task
from ensemblenet.inputs import DTYPES, Inputs, InputSpec
from ensemblenet.models.sources import BaseSource, is_plain

if TYPE_CHECKING:
    from ensemblenet.operations.axes import Axis

__all__ = ["Conversion", "Criterion", "Freeze", "HeadShape", "Importance", "Init", "Recipe", "Shape"]

__getattr__ = renamed(__name__, {"find_source": "ensemblenet.models.finding.find_source"})

Init = Literal["fresh", "inherit"]
Criterion = Literal["magnitude", "scale", "taylor", "loss", "random"]
# a function of a group of channels: of each parameter that has them, its name and its values, (channels, *), to a
# score for each channel
Importance = Criterion | Callable[[Sequence[tuple[str, Tensor]]], Tensor]
Shape = Literal["auto", "narrow", "short"]
Freeze = Literal["trunk"]
Blocks = Literal["fewer", "narrower"]
FORMAT = 5
_WIDEST = 4.0
_DEEPEST_TREE = 32


@dataclass(frozen=True)
class Conversion:
    """What is asked of a conversion; [`ensemblenet.convert`][] explains the settings.

    Args:
        seed: the seed of the heads' weights; None takes the run's own.

    Raises:
        ConversionError: a setting that cannot be.

    Example:
        >>> from dataclasses import replace
        >>> wanted = replace(Conversion(budget=0.9), num_heads=4)
        >>> wanted.num_heads, wanted.budget, wanted.split_at
        (4, 0.9, 'auto')
    """

    num_heads: int | Literal["auto"] = 2
    budget: float | Budget = 1.0
    split_at: str = "auto"
    seed: int | None = None
    init: Init = "fresh"
    combine: Combine = "logits"
    min_width: float | None = None
    output: str | int | Sequence[str | int] | None = None  # of what the base returns
    shape: Shape = "auto"
    width: float | None = None
    depth: float | None = None
    importance: Importance | None = None
    num_classes: int | None = None
    freeze: Freeze | None = None

    def __post_init__(self) -> None:
        if self.num_heads != "auto" and not _is_count(self.num_heads):
            raise ConversionError(f'num_heads must be an integer of at least 1, or "auto", got {self.num_heads!r}.')
        Budget.of(self.budget)
        if self.init not in get_args(Init):
            raise ConversionError(f"init must be one of {get_args(Init)}, got {self.init!r}.")
        if not (self.importance is None or callable(self.importance) or self.importance in get_args(Criterion)):
            raise ConversionError(
                f"importance must be one of {get_args(Criterion)} or a function, got {self.importance!r}."
            )
        if self.importance is not None and self.init != "inherit":
            raise ConversionError('importance says what heads inherit: pass init="inherit" too.')
        if not (self.num_classes is None or _is_count(self.num_classes)):
            raise ConversionError(f"num_classes must be an integer of at least 1, got {self.num_classes!r}.")
        if self.freeze not in (None, *get_args(Freeze)):
            raise ConversionError(f'freeze must be "trunk" or None, got {self.freeze!r}.')
        if self.freeze is not None and self.init != "inherit":
            raise ConversionError('freeze="trunk" is for a trunk that has learned: pass init="inherit" too.')
        for name, most, what in (("min_width", 1, "channels"), ("width", _WIDEST, "channels"), ("depth", 1, "blocks")):
            share = getattr(self, name)
            least = 0 if name != "width" else 1e-3
            if share is not None and not (_is_number(share) and least <= share <= most):
                raise ConversionError(
                    f"{name} must be a share of the base's {what}, {least:g} to {most:g}, got {share!r}."
                )
        self._check_shape()

    def _check_shape(self) -> None:
        if self.shape not in get_args(Shape):
            raise ConversionError(f"shape must be one of {get_args(Shape)}, got {self.shape!r}.")
        if self.width is not None and self.width > 1 and self.init == "inherit":
            raise ConversionError(f'Heads of width {self.width:g} have channels that no base has: pass init="fresh".')
        narrows = self.width is not None and self.width < 1
        shortens = self.depth is not None and self.depth < 1
        if (self.shape == "short" and narrows) or (self.shape == "narrow" and shortens):
            other = f"width={self.width:g}" if narrows else f"depth={self.depth:g}"
            raise ConversionError(f'shape="{self.shape}" and {other} exclude each other: leave out one of them.')


@dataclass(frozen=True)
class HeadShape:
    """The shape that every head was given.

    Attributes:
        width: the share of its channels that each layer keeps; above 1 where it has more than the base.
        multiple: large channel counts are rounded to it, smaller ones to smaller powers of two.
        pinned: names of graph nodes that keep the base's sizes, because they fail with smaller ones.
        blocks: whether blocks of channels (groups, attention heads) become fewer or narrower; few become narrower
            either way.
        depth: the share of the blocks that may be dropped which it keeps.
        dropped: the blocks that it is without: the names of the split points in front of and behind each.

    Example:
        >>> from ensemblenet.operations.axes import free
        >>> HeadShape(width=0.5).size(free(96)), HeadShape(width=0.5).size(free(20))
        (48, 10)
    """

    width: float
    multiple: int = 8
    pinned: tuple[str, ...] = ()
    blocks: Blocks = "fewer"
    depth: float = 1.0
    dropped: tuple[tuple[str, str], ...] = ()

    def size(self, axis: Axis) -> int:
        """The new size of a free axis of the base."""
        if self.width == 1 or axis.role == ("instead" if self.blocks == "fewer" else "count"):
            return axis.size
        step = max(self.multiple // axis.block, 1)
        if self.blocks == "narrower" and axis.role is not None:
            step = math.gcd(8, axis.size)  # the width of an attention head stays what kernels like
        while step > 1 and axis.size < 8 * step:
            step //= 2
        size = max(round(axis.size * self.width / step) * step, step)
        return min(size, axis.size) if self.width < 1 else max(size, axis.size)


# how attributes of version 0.1 are found now
_RENAMED = {
    "input_shape": "inputs.shape",
    "input_dtype": "inputs.dtype",
    "width": "head.width",
    "multiple": "head.multiple",
    "frozen": "head.pinned",
}


@dataclass(frozen=True)
class Recipe:
    """How a model was made from its base, as plain data: enough to make it again.

    Attributes:
        base: where the base comes from, or None if the user must bring it.
        inputs: the inputs that it was converted for.
        num_heads: K.
        split_at: the split point's name.
        head: the shape of every head.
        init: how the weights began.
        seed: the source of chance.
        combine: how head outputs become one prediction.
        task: what the outputs mean.
        output: which tensors of what the base returns the heads give.
        num_classes: of the classifier that took the place of the base's own, if one did.
        freeze: what of the model is not trained, if it is not all.
        format: the version of this format.

    Example:
        >>> import torch, ensemblenet
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> recipe = ensemblenet.convert(base, torch.randn(4, 8), split_at="input").recipe
        >>> recipe.split_at, recipe.head.width < 1, Recipe.from_json(recipe.to_json()) == recipe
        ('input', True, True)
    """

    base: BaseSource | None
    inputs: Inputs
    num_heads: int
    split_at: str
    head: HeadShape
    init: Init
    seed: int
    combine: Combine
    task: Task
    output: str | int | Sequence[str | int] | None = None
    num_classes: int | None = None
    freeze: Freeze | None = None
    format: int = FORMAT

    def __getattr__(self, name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"'Recipe' object has no attribute {name!r}")
        warnings.warn(f"Recipe.{name} is now Recipe.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        return attrgetter(_RENAMED[name])(self)

    def with_heads(self, num_heads: int) -> Recipe:
        """The recipe of the same model with its first heads only."""
        return replace(self, num_heads=num_heads)

    def with_classes(self, num_classes: int) -> Recipe:
        """The recipe of the same model with classifiers of so many classes."""
        base = self.base and replace(self.base, arguments=self.base.arguments | {"num_classes": num_classes})
        return replace(self, base=base, num_classes=num_classes)

    def to_json(self) -> str:
        """The recipe as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe of this format or of an older one; every field is checked.

        Raises:
            LoadError: it is not a recipe, or one of a newer format.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"The recipe is not JSON: {error}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise LoadError("The recipe is not one of ensemblenet's: it has no 'format'.")
        if data["format"] not in range(1, FORMAT + 1):
            raise LoadError(
                f"The recipe has format {reprlib.repr(data['format'])}; this version reads formats up to {FORMAT}: "
                "update ensemblenet."
            )
        if data["format"] == 1:
            data = _from_format_1(data)
        if data["format"] == 2:
            data = _from_format_2(data)
        if data["format"] == 3:
            data = _from_format_3(data)
        if data["format"] == 4:
            data = {**data, "num_classes": None, "freeze": None, "format": FORMAT}
        _check_fields(cls, data, "recipe")
        for name, kind in (("base", BaseSource), ("inputs", Inputs), ("head", HeadShape)):
            if name != "base" or data[name] is not None:
                _check_fields(kind, data[name], f"recipe's {name}")
        if not isinstance(data["inputs"]["tensors"], list):
            raise LoadError("The recipe's inputs must hold a list of tensors.")
        for spec in data["inputs"]["tensors"]:
            _check_fields(InputSpec, spec, "recipe's input")
        for name, expected, value, is_valid in _checks(data):
            if not is_valid:
                raise LoadError(f"The recipe's {name} must be {expected}, got {reprlib.repr(value)}.")
        data["base"] = data["base"] and BaseSource(**data["base"])
        specs = [InputSpec(**{k: _tuples(v) for k, v in spec.items()}) for spec in data["inputs"]["tensors"]]
        data["inputs"] = Inputs(tuple(specs), data["inputs"]["tree"])
        data["output"] = _tuples(data["output"])
        dropped = tuple(map(tuple, data["head"]["dropped"]))
        data["head"] = HeadShape(**{**data["head"], "pinned": tuple(data["head"]["pinned"]), "dropped": dropped})
        return cls(**data)


def _from_format_1(data: dict[str, Any]) -> dict[str, Any]:
    """Format 1 had the fields of inputs and head side by side, and called pinned nodes frozen."""
    old = {"input_shape", "input_dtype", "width", "multiple", "frozen"}
    if missing := old - data.keys():
        raise LoadError(f"The recipe has format 1 but no {sorted(missing)}.")
    new = {key: value for key, value in data.items() if key not in old}
    return new | {
        "inputs": {"shape": data["input_shape"], "dtype": data["input_dtype"]},
        "head": {"width": data["width"], "multiple": data["multiple"], "pinned": data["frozen"]},
        "format": 2,
    }


def _from_format_2(data: dict[str, Any]) -> dict[str, Any]:
    """Format 2 knew one input and one output, and fixed no sizes."""
    for name in ("inputs", "head"):
        if not isinstance(data.get(name), dict):
            raise LoadError(f"The recipe's {name} must have fields by name, got {reprlib.repr(data.get(name))}.")
    _check_fields(InputSpec, {"is_batched": True, "fixed": [], **data["inputs"]}, "recipe's inputs")
    tensor = {**data["inputs"], "is_batched": True, "fixed": []}
    inputs, head = {"tensors": [tensor], "tree": 0}, {"blocks": "fewer", **data["head"]}
    return {**data, "inputs": inputs, "head": head, "output": None, "format": 3}


def _from_format_3(data: dict[str, Any]) -> dict[str, Any]:
    """Format 3 dropped no blocks."""
    if not isinstance(data.get("head"), dict):
        raise LoadError("The recipe has format 3 but no 'head'.")
    return {**data, "head": {"depth": 1.0, "dropped": [], **data["head"]}, "format": 4}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_fields(kind: type, data: Any, what: str) -> None:
    names = {member.name for member in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        got = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise LoadError(f"The {what} must have the fields {sorted(names)}, got {got}.")


def _checks(data: dict[str, Any]) -> list[tuple[str, str, Any, bool]]:
    """Each field: its name, what it must be, its value, and whether that is valid."""
    base, inputs, head, output = data["base"], data["inputs"], data["head"], data["output"]
    width, pinned, classes = head["width"], head["pinned"], data["num_classes"]
    found = [
        ("base", "a factory, a name and plain arguments", base, base is None or is_plain(base)),
        ("tree of inputs", "lists and dictionaries of the tensors' numbers", inputs["tree"], _is_tree(inputs)),
        ("output", "a name, a position or a list of them", output, _is_output(output)),
        ("width", f"a number in (0, {_WIDEST:g}]", width, _is_number(width) and 0 < width <= _WIDEST),
        ("depth", "a number in [0, 1]", head["depth"], _is_number(head["depth"]) and 0 <= head["depth"] <= 1),
        ("dropped", "a list of pairs of names", head["dropped"], _is_pairs(head["dropped"])),
        ("multiple", "a positive integer", head["multiple"], _is_count(head["multiple"])),
        ("blocks", f"one of {get_args(Blocks)}", head["blocks"], head["blocks"] in get_args(Blocks)),
        ("pinned", "a list of names", pinned, _is_list(pinned) and all(isinstance(name, str) for name in pinned)),
        ("split_at", "a name", data["split_at"], isinstance(data["split_at"], str)),
        ("seed", "an integer of 64 bits", data["seed"], _is_seed(data["seed"])),
        ("num_classes", "a positive integer or null", classes, classes is None or _is_count(classes)),
        ("freeze", '"trunk" or null', data["freeze"], data["freeze"] in (None, *get_args(Freeze))),
    ]
    for spec in inputs["tensors"]:
        shape, fixed = spec["shape"], spec["fixed"]
        found += [
            ("shape of inputs", "a list of positive integers", shape, _is_list(shape) and all(map(_is_count, shape))),
            ("dtype of inputs", "a dtype's name", spec["dtype"], spec["dtype"] in DTYPES),
            ("is_batched of inputs", "true or false", spec["is_batched"], isinstance(spec["is_batched"], bool)),
            ("fixed of inputs", "a list of dimensions", fixed, _are_dims(fixed, shape)),
        ]
    heads = data["num_heads"]
    found.append(("num_heads", "an integer from 1 to 1024", heads, _is_count(heads) and heads <= 1024))
    for name, choices in (("init", get_args(Init)), ("combine", get_args(Combine)), ("task", get_args(Task))):
        found.append((name, f"one of {choices}", data[name], data[name] in choices))
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_pairs(value: Any) -> bool:
    return _is_list(value) and all(_is_list(pair) and list(map(type, pair)) == [str, str] for pair in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_index(value: Any) -> bool:
    return value == 0 or _is_count(value)


def _are_dims(value: Any, shape: Any) -> bool:
    """Of a tensor whose examples have this shape."""
    return _is_list(value) and _is_list(shape) and all(_is_index(dim) and dim <= len(shape) for dim in value)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _is_output(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return value is None or all(isinstance(one, str) or _is_index(one) for one in values)


def _is_tree(inputs: dict[str, Any]) -> bool:
    """Whether every tensor stands in the tree once, in order."""
    found: list[Any] = []

    def visit(part: Any, depth: int) -> None:
        if isinstance(part, (list, dict)) and depth < _DEEPEST_TREE:
            for value in part.values() if isinstance(part, dict) else part:
                visit(value, depth + 1)
        else:
            found.append(part)

    visit(inputs["tree"], 0)
    return bool(found) and found == list(range(len(inputs["tensors"])))
