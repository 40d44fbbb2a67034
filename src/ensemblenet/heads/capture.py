"""Predict on a GPU without waiting for the processor: a CUDA graph, in which heads run side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.errors import FusionError
from ensemblenet.functional import combine_heads
from ensemblenet.heads.fused import FusedEnsembleNet

__all__ = ["capture"]


def capture(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Record a prediction as a CUDA graph, which a GPU repeats without being told each operation again.

    Heads that are not fused run on streams of their own, so that several narrow ones fill a GPU that one does not.
    The graph reads the parameters where they are: it sees updates in place, but none that replaces them, such as
    `model.to(...)`. It keeps the precision of an autocast around this call.

    Args:
        model: a network in evaluation mode, on a CUDA device.
        x: inputs, (N, *), on the same device; the graph is made for their shape, type and memory format.

    Returns:
        From such inputs to the outputs, which stay until the next call.

    Raises:
        FusionError: the inputs are not on a CUDA device or, later, of another shape; or the model is in training mode.

    Example:
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(4)]).eval()
        >>> x = torch.randn(5, 8)
        >>> if torch.cuda.is_available():
        ...     predict = capture(model.cuda(), x.cuda())
        ...     torch.testing.assert_close(predict(x.cuda()), model(x.cuda()))
    """
    if model.training or not x.is_cuda:
        state = "training mode" if model.training else f"inputs on {x.device}"
        raise FusionError(f"capture() needs a model in evaluation mode and inputs on a CUDA device; got {state}.")
    inputs = x.clone()  # at the place that the graph reads; in the memory format of x
    run = _side_by_side(model) if isinstance(model, EnsembleNet) and not isinstance(model, FusedEnsembleNet) else model
    precision = torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
    )
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
    aside.wait_stream(torch.cuda.current_stream(x.device))
    with torch.no_grad(), precision:
        with torch.cuda.stream(aside):  # libraries set themselves up in their first runs, which no graph may hold
            for _ in range(2):
                run(inputs)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        with torch.cuda.graph(graph):
            out = run(inputs)

    def predict(x: Tensor) -> Tensor:
        if x.shape != inputs.shape:
            raise FusionError(
                f"The graph was captured for inputs of shape {tuple(inputs.shape)}, got {tuple(x.shape)}; capture one "
                "for each shape, or call the model itself."
            )
        inputs.copy_(x)
        graph.replay()
        return out

    return predict


def _side_by_side(model: EnsembleNet) -> Callable[[Tensor], Tensor]:
    """The prediction of a model, each head on a stream of its own."""

    def run(x: Tensor) -> Tensor:
        given, here, outputs = as_tuple(model.trunk(x)), torch.cuda.current_stream(x.device), []
        streams = [torch.cuda.Stream(x.device) for _ in model.heads]
        for head, stream in zip(model.heads, streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                outputs.append(head(*given))
        for stream in streams:
            here.wait_stream(stream)
        return combine_heads(torch.stack(outputs), model.combine, model.task)

    return run
