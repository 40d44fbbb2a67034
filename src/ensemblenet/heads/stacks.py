"""The tensors of one name in K heads as one stacked tensor, without a copy.

The heads' own parameters and buffers stay what a model has: what is saved, optimised and reduced over processes. Their
memory is laid side by side, so the stack of them costs no copy: it sees every update of a part, and a part sees every
update of the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Stack"]


class Stack:
    """The K tensors `owner.name`, one of each head, as one tensor (K, *).

    Args:
        owners: the module of each head that has the tensor.
        name: what it is called there.
        lay: whether the parts may be laid side by side; not where heads share one tensor.
    """

    def __init__(self, owners: Sequence[nn.Module], name: str, lay: bool = True) -> None:
        self.owners = tuple(owners)
        self.name = name
        self.lay = lay
        self.joined: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        """The K tensors, as the heads have them now."""
        tables = [owner._parameters if self.name in owner._parameters else owner._buffers for owner in self.owners]
        return [table[self.name] for table in tables]  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def join(self) -> None:
        """Lay the parts side by side in memory, unless they lie so."""
        parts = self.parts
        if not self.lay or self._is_joined(parts):
            return
        first = parts[0]
        joined = torch.empty(
            (len(parts) * first.shape[0], *first.shape[1:]) if first.ndim else (len(parts),),
            dtype=first.dtype,
            device=first.device,
            memory_format=_memory_format(first),
        )
        joined = joined.view(len(parts), *first.shape)
        for part, place in zip(parts, joined, strict=True):
            place.copy_(part)
            part.data = _on_own_storage(place)
        self.joined = joined

    def value(self) -> Tensor:
        """The stack, through which gradients reach the parts."""
        parts = self.parts
        if not self.lay or self._are_lent(parts):
            return torch.stack(parts)
        needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if not torch.compiler.is_compiling():
            if not self._is_joined(parts):  # a part's memory was replaced behind the model's back
                self.join()
            assert self.joined is not None
            return _Join.apply(self.joined, *parts) if needs_grad else self.joined  # pyright: ignore
        if needs_grad:  # a compiler has no use for a view of memory that it cannot see is the parts'
            return torch.stack(parts)
        assert self.joined is not None
        return self.joined

    def _are_lent(self, parts: list[Tensor]) -> bool:
        """Whether `torch.func.functional_call` has replaced the parameters by other tensors."""
        return self.name in self.owners[0]._parameters and not isinstance(parts[0], nn.Parameter)

    def _is_joined(self, parts: list[Tensor]) -> bool:
        joined = self.joined
        if joined is None or joined.dtype != parts[0].dtype or joined.device != parts[0].device:
            return False
        start, step = joined.data_ptr(), joined.stride(0) * joined.element_size()
        return all(part.data_ptr() == start + k * step for k, part in enumerate(parts))


def _on_own_storage(view: Tensor) -> Tensor:
    """A view with its own storage, so that `torch.save` does not write the whole stack."""
    start, size = view.storage_offset() * view.element_size(), view.numel() * view.element_size()
    storage = view.untyped_storage()[start : start + size]
    return view.new_empty(0).set_(storage, 0, view.size(), view.stride())  # pyright: ignore[reportArgumentType]


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels last where the tensor is that and nothing else."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


class _Join(torch.autograd.Function):
    """The stack of K tensors that lie side by side in memory, with gradients to each, without a copy."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *parts: Tensor) -> Tensor:
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads[0].unbind(0)
