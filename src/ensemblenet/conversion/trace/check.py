"""Check a graph against the network that it was traced from: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ensemblenet.conversion.trace.attributes import keeping_state
from ensemblenet.conversion.trace.graph import BY_HAND, Trace
from ensemblenet.conversion.trace.outputs import Output, pick
from ensemblenet.conversion.trace.refusals import KEEP_WHOLE, copy_base
from ensemblenet.ensemble import as_tuple
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import call

__all__ = ["check_training"]

_WHY = (
    "something acts there that a graph cannot say, such as a train() method of its own, or what acts in the backward "
    "pass alone."
)


def check_training(traced: Trace, base: nn.Module, output: Output = None) -> None:
    """Run one training step of the base and one of its graph, with the same random numbers, and compare them.

    A base that returns something else in training mode, or cannot be trained, has nothing to compare.

    Args:
        traced: the traced network, in any mode; its buffers and the random state are left as they were.
        base: what it was traced from; a copy of it runs.
        output: which of the tensors that the base returns are its outputs.

    Raises:
        ConversionError: their outputs, or the gradients of a parameter, differ; the message names the first one.
    """
    graph = fx.GraphModule(traced.module, traced.graph)
    twin = copy_base(base)[0]
    x = traced.inputs.build(traced.tensors)
    try:
        expected = _training_step(twin, traced.tensors[0], lambda: pick(call(twin, x), output))
    except Exception:  # its own training says so more clearly
        return
    modes = {module: module.training for module in graph.modules()}
    got = _training_step(graph, traced.tensors[0], lambda: list(as_tuple(graph(*traced.arguments))))
    for module, training in modes.items():
        module.training = training
    if not all(map(_agree, expected.outputs, got.outputs)):
        raise ConversionError(
            f"In training mode the base gives other outputs than its graph: {_WHY} {KEEP_WHOLE} {BY_HAND}"
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, *others in names.values():  # the graph may know a tied parameter by another of its names
        found = next((got.gradients[known] for known in (name, *others) if known in got.gradients), None)
        if not _agree(expected.gradients[name], found):
            raise ConversionError(
                f"In training, the gradient of {name!r} differs between the base and its graph: {_WHY} {KEEP_WHOLE} "
                f"{BY_HAND}"
            )


class _SameDraws(TorchDispatchMode):
    """Every random operator draws from the same seed, so that one more draw elsewhere is no difference."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(0)
        return func(*args, **(kwargs or {}))


class _Step(NamedTuple):
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def _training_step(module: nn.Module, x: Tensor, run: Callable[[], list[Tensor]]) -> _Step:
    """The outputs and the gradients of all parameters, for a fixed random projection of the outputs."""
    module.train()
    with torch.enable_grad(), keeping_state(module, x), _SameDraws():
        outputs = run()
        generator = torch.Generator().manual_seed(0)
        loss = [
            (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum().abs()  # abs: it may be complex
            for tensor in outputs
            if tensor.requires_grad
        ]
        if loss:
            torch.stack(loss).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters(remove_duplicate=False)}
    module.zero_grad(set_to_none=True)
    return _Step([tensor.detach() for tensor in outputs], gradients)


def _agree(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors, each possibly missing, are the same up to rounding."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    tolerance = 1e-3 if torch.finfo(a.dtype).eps < 1e-5 else 5e-2
    scale = a.abs().nan_to_num(0, 0, 0).max().item() if a.numel() else 0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
