"""Find the tensors to be learned in what a network returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ensemblenet.conversion.trace.graph import BY_HAND
from ensemblenet.errors import ConversionError

__all__ = ["Output", "describe", "pick"]

Output = str | int | Sequence[str | int] | None


def pick(returned: Any, output: Output) -> list[Tensor]:
    """The tensors that `output` names.

    Args:
        returned: a tensor, or a mapping, a tuple or an object of tensors.
        output: a key, an attribute or a position, or several of them; None takes the only tensor, or the one that is
            called "logits".

    Raises:
        ConversionError: there is none of that name, or None does not say which.

    Example:
        >>> import torch
        >>> returned = {"logits": torch.zeros(2, 3), "features": torch.zeros(2, 8)}
        >>> pick(returned, None)[0].shape, [part.shape for part in pick(returned, ["logits", "features"])]
        (torch.Size([2, 3]), [torch.Size([2, 3]), torch.Size([2, 8])])
    """
    names = [output] if output is None or isinstance(output, (str, int)) else list(output)
    if not names:
        raise ConversionError("output names no tensor; pass a key, an attribute or a position, or None.")
    return [_one(returned, name) for name in names]


def _one(returned: Any, name: str | int | None) -> Tensor:
    if name is None and isinstance(returned, Tensor):
        return returned
    parts = _parts(returned)
    if name is None:
        tensors = [part for part in parts.values() if isinstance(part, Tensor)]
        found = parts.get("logits", tensors[0] if len(tensors) == 1 else None)
    else:
        found = parts.get(name, list(parts.values())[name] if isinstance(name, int) and name < len(parts) else None)
    if isinstance(found, Tensor):
        return found
    if name is None and not any(isinstance(part, Tensor) for part in parts.values()):
        raise ConversionError(f"The base must return a tensor of shape (N, ...), got {describe(returned)}. {BY_HAND}")
    which = "name the tensor that is to be learned" if name is None else f"there is no tensor {name!r} in it"
    raise ConversionError(f"The base returns {describe(returned)}; {which}: output= takes one of {list(parts)}.")


def _parts(returned: Any) -> dict[Any, Any]:
    """The parts of a value by their names, or by their positions where they have none."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, (tuple, list)):
        return dict(zip(getattr(returned, "_fields", range(len(returned))), returned, strict=True))
    return vars(returned) if hasattr(returned, "__dict__") and not isinstance(returned, Tensor) else {}


def describe(value: Any) -> str:
    """What a network returned, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    names = list(_parts(value))
    if all(isinstance(name, int) for name in names):
        return f"{type(value).__name__} of {len(names)}" if names else type(value).__name__
    return f"{type(value).__name__} of {', '.join(map(str, names))}"
