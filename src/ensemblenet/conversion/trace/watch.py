"""What a recording has to see beyond torch functions, and what must look otherwise while it runs."""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import autocast
from torch.autograd.function import Function, _SingleLevelFunction
from torch.utils.checkpoint import CheckpointFunction

from ensemblenet.operations.contexts import Autocast, Context, InContext, in_context
from ensemblenet.work import without_fast_path

if TYPE_CHECKING:
    from ensemblenet.conversion.trace.recorder import Recorder

__all__ = ["Contexts", "keep_contexts", "watching"]


class Contexts:
    """The contexts that the network has entered by itself: those around its run are the caller's."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.gradients = True
        self.autocasts: list[autocast] = []

    def now(self) -> Context:
        """What surrounds the next operation."""
        innermost = {entered.device: entered for entered in self.autocasts}
        autocasts = tuple(
            # who names the device's type takes it from a tensor, and the model may move to another device
            Autocast(
                None if name == self.device_type else name, entered.fast_dtype, entered._enabled, entered._cache_enabled
            )
            for name, entered in innermost.items()
        )
        return Context(self.gradients and not torch.is_inference_mode_enabled(), autocasts)


def keep_contexts(module: nn.Module, graph: fx.Graph) -> fx.Node | None:
    """Make every operation bring its contexts along.

    Returns:
        A node whose layer is called in different contexts, which cannot be said, or None.
    """
    calls: dict[Any, set[Context]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and "context" in node.meta:
            calls.setdefault(node.target, set()).add(node.meta["context"])
    for node in graph.nodes:
        context = node.meta.get("context", Context())
        if node.op == "call_module":
            if len(calls.get(node.target, ())) > 1:
                return node
        elif context != Context():
            target = node.target
            node.op = "call_function"
            node.target = target.within(context) if isinstance(target, InContext) else InContext(target, context)
    for name, (context,) in calls.items():
        if context != Context():
            in_context(module.get_submodule(name), context)
    return None


@contextmanager
def watching(recorder: Recorder) -> Iterator[None]:
    """Tell a recorder of what torch functions do not show, and put all back afterwards."""
    # it notes Python's own functions when PyTorch first needs it: not those that stand in for them here
    importlib.import_module("torch._dynamo")
    with ExitStack() as stack:
        stack.enter_context(without_fast_path())
        for owner, name, value in _replacements(recorder):
            stack.enter_context(patch.object(owner, name, value))
        for kind, forward in [(kind, kind.forward) for kind in _subclasses(Function)]:
            instead = staticmethod(_function_forward(recorder, kind, forward))
            stack.enter_context(patch.object(kind, "forward", instead))
        yield


def _replacements(recorder: Recorder) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What takes the place of which attribute."""
    enter, leave, length = autocast.__enter__, autocast.__exit__, builtins.len
    is_tracing: Callable[[], bool] = getattr(torch.jit, "is_tracing")  # noqa: B009 (a name that is not exported)
    is_autocast, call_scripted = torch.is_autocast_enabled, torch._C.ScriptFunction.__call__

    def entered(self: autocast) -> Any:
        recorder.contexts.autocasts.append(self)
        return enter(self)

    def left(self: autocast, *args: Any) -> Any:
        recorder.contexts.autocasts.pop()
        return leave(self, *args)

    def size_of(value: Any) -> int:  # the built-in one makes a plain number of any integer
        return recorder.length(value) if isinstance(value, Tensor) and value.ndim else length(value)

    def tracing() -> bool:
        # Transformers reads its masks' values unless a tracer is at work; to all others, the networks' own files
        # among them, this is an ordinary run.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_shared_code = caller.startswith("transformers.") and not caller.startswith("transformers.models.")
        return is_shared_code or is_tracing()

    def autocasts(*args: Any) -> bool:
        # Transformers' `maybe_autocast` turns off what it finds on; a model may meet it on in another run.
        return sys._getframe(1).f_code.co_name == "maybe_autocast" or is_autocast(*args)

    def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = InContext(self, Context(), self.name)
        return recorder.whole(function, args, kwargs, lambda: call_scripted(self, *args, **kwargs))

    return [
        (autocast, "__enter__", entered),
        (autocast, "__exit__", left),
        (builtins, "len", size_of),
        (torch.jit, "is_tracing", tracing),
        (torch, "is_autocast_enabled", autocasts),
        (torch._C.ScriptFunction, "__call__", scripted),
    ]


def _subclasses(kind: type) -> set[Any]:
    children = kind.__subclasses__()
    return set(children).union(*map(_subclasses, children))


def _function_forward(recorder: Recorder, kind: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of an `autograd.Function` during a recording: one node, because a graph of what it does would
    have another backward pass."""
    has_context = kind.setup_context is _SingleLevelFunction.setup_context

    @functools.wraps(forward)  # `apply` reads its signature
    def call(*args: Any) -> Any:
        if recorder.paused or torch.is_grad_enabled():  # called by another layer's code, or not by `apply`
            return forward(*args)
        context, inputs = args[: int(has_context)], args[int(has_context) :]
        if issubclass(
            kind, CheckpointFunction
        ):  # the function that it checkpoints, then what else it takes, then inputs
            recorder.notes.append("The base recomputes activations in its backward pass, the model does not.")
            gradients = recorder.contexts.gradients
            with torch.set_grad_enabled(gradients):
                out = inputs[0](*inputs[2:])
            recorder.contexts.gradients = gradients
            return out
        function = InContext(kind.apply, Context(), f"{kind.__name__}.apply")
        return recorder.whole(function, inputs, {}, lambda: forward(*context, *inputs))

    return call
