"""What a conversion refuses, because a graph cannot say it, and the ways out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ensemblenet.conversion.trace.graph import BY_HAND
from ensemblenet.errors import ConversionError

__all__ = [
    "KEEP_WHOLE",
    "copy_base",
    "refuse_assigned_buffer",
    "refuse_backward_hooks",
    "refuse_dynamic_shape",
    "refuse_function",
    "refuse_packed",
    "refuse_parameter_hooks",
    "refuse_scripted_weights",
    "refuse_uncomputed",
]

KEEP_WHOLE = (
    "A layer that does it can be kept whole: decorate `class Whole(ensemblenet.operations.Operation): ...` with "
    "`@ensemblenet.operations.register(<the layer's class>)`."
)

_PACKING = {"_pack_padded_sequence", "_pad_packed_sequence"}


def refuse_parameter_hooks(base: nn.Module) -> None:
    """Refuse hooks of parameters: a copy of the parameter has none."""
    for name, parameter in base.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ConversionError(
                f"The parameter {name!r} has a hook on its gradient, which new parameters would not have: remove it "
                f"before the conversion, and give the model's own parameters theirs."
            )


def refuse_backward_hooks(module: nn.Module, where: str) -> None:
    """Refuse backward hooks of a module that is opened: its graph has no place for them."""
    if module._backward_hooks or module._backward_pre_hooks:
        raise ConversionError(f"{where} has a backward hook, which a graph has no place for: remove it. {KEEP_WHOLE}")


def refuse_scripted_weights(module: nn.Module, where: str) -> None:
    """Refuse a scripted module with tensors: new ones cannot take their place."""
    if next(module.parameters(), next(module.buffers(), None)) is not None:
        raise ConversionError(f"{where} is a scripted module with weights; put the module that it came from there.")


def refuse_function(func: Any, name: str, where: Callable[[], str]) -> None:
    """Refuse functions that act on the backward pass, or whose results have no fixed shape."""
    if name in ("register_hook", "register_post_accumulate_grad_hook"):
        raise ConversionError(
            f"{where()} puts a hook on a tensor's gradient (register_hook), which a graph has no place for: write it "
            f"as a torch.autograd.Function. {KEEP_WHOLE}"
        )
    if name == "backward" or func is torch.autograd.grad:
        raise ConversionError(f"{where()} takes gradients inside of the forward pass. {KEEP_WHOLE} {BY_HAND}")
    if name in _PACKING:
        _refuse_packing(where())


def refuse_packed(args: Any, where: Callable[[], str]) -> None:
    """Refuse packed sequences between layers."""
    if any(isinstance(arg, PackedSequence) for arg in args):
        _refuse_packing(where())


def _refuse_packing(where: str) -> None:
    raise ConversionError(
        f"{where} packs sequences (PackedSequence), so shapes depend on the input's values. Put packing, the recurrent "
        f"layer and unpacking into one layer that is kept whole, or do not pack. {KEEP_WHOLE}"
    )


def refuse_dynamic_shape(where: str, operator: str) -> None:
    """Refuse an operator whose result has as many entries as the input's values say."""
    raise ConversionError(
        f"{where} makes a tensor whose shape depends on the input's values ({operator}); write it densely, for "
        f"instance by torch.where with three arguments or by a mask that multiplies. {KEEP_WHOLE}"
    )


def refuse_assigned_buffer(root: nn.Module, owner: str, attribute: str) -> None:
    """Refuse a module that assigns a new tensor to its buffer and is too much to be kept whole."""
    module = root.get_submodule(owner)
    if module is root or any(module.children()):
        raise ConversionError(
            f"{owner or type(module).__name__} assigns a new tensor to its buffer {attribute!r} in forward; update the "
            f"buffer in place (copy_, mul_, add_), or do it in a layer of its own without layers inside. {KEEP_WHOLE}"
        )


def refuse_uncomputed(root: nn.Module, computed: dict[int, str]) -> None:
    """Refuse tensors with a gradient's history that the forward pass does not compute anew: no copy has them."""
    held = {id(value) for module in root.modules() for value in vars(module).values()}
    for name in (name for key, name in computed.items() if key in held):
        raise ConversionError(
            f"{name} of {type(root).__name__} is a tensor that was computed from others, which no copy can be, and "
            "forward does not compute it anew: set it to None before the conversion, or make it a parameter or a "
            "buffer."
        )


def copy_base(base: nn.Module) -> tuple[nn.Module, dict[int, str]]:
    """A private copy of the base.

    Returns:
        The copy; and for tensors in it that stand for computed ones, which no copy keeps, the ids and the attributes.

    Raises:
        ConversionError: it cannot be copied; the message says which attribute cannot.
    """
    memo: dict[int, Any] = {}
    computed: dict[int, str] = {}
    for name, module in base.named_modules():
        for key, value in vars(module).items():
            plain = key not in ("_modules", "_parameters", "_buffers")
            for tensor in tree_leaves(value) if plain else ():
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
                    computed[id(memo[id(tensor)])] = f"{name}.{key}".strip(".")
    storages = Counter(buffer.untyped_storage().data_ptr() for buffer in base.buffers())
    for buffer in base.buffers():  # a part of another memory, such as torch.hann_window: safetensors cannot save it
        storage = buffer.untyped_storage()
        if storages[storage.data_ptr()] == 1 and storage.nbytes() != buffer.nbytes:
            memo.setdefault(id(buffer), buffer.detach().clone(memory_format=torch.contiguous_format))
    try:
        return copy.deepcopy(base, memo), computed
    except Exception as error:
        raise ConversionError(
            f"The base cannot be copied{_culprit(base)}: {type(error).__name__}: {str(error).splitlines()[0]}. Give "
            f"the module a __deepcopy__, or make the attribute where it is used. {BY_HAND}"
        ) from error


def _culprit(base: nn.Module) -> str:
    """Which attribute of which module cannot be copied, in words."""
    for name, module in base.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters"):
                continue
            try:
                copy.deepcopy(value, {id(module): module, id(base): base})
            except Exception:
                return f", because of {f'{name}.{key}'.strip('.')} ({type(value).__name__})"
    return ""
