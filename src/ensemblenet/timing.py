"""How long a model takes: seconds, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ensemblenet.inputs import Tree, call, tensors_in

__all__ = ["cuda_devices", "measure", "step"]


def step(model: nn.Module, x: Tree) -> Callable[[], None]:
    """One training step without its optimizer, or one prediction, as the model's mode says.

    Args:
        model: in training mode, or in evaluation mode.
        x: inputs, (N, *), or a tuple or a dictionary of tensors.

    Returns:
        A function that takes the step, in the precision of an enclosing autocast; the random state stays as it was.

    Example:
        >>> step(nn.Linear(8, 4).eval(), torch.randn(2, 8))()
    """

    def run() -> None:
        torch.clear_autocast_cache()  # one autocast around many steps casts the weights once, one for each step anew
        with torch.random.fork_rng(cuda_devices(x)), torch.set_grad_enabled(model.training):
            outputs = tensors_in(call(model, x))
        if model.training:
            model.zero_grad(set_to_none=True)
            torch.stack([output.float().square().mean() for output in outputs]).sum().backward()

    return run


def measure(steps: Mapping[Any, Callable[[], object]], repeats: int = 5, at_least: float = 0.0) -> dict[Any, float]:
    """The median seconds of each step, taken in turns so that a change in the machine's load meets all of them.

    Args:
        steps: by name.
        repeats: turns, behind one that warms up.
        at_least: more turns are taken until this many seconds are up, or ten times as many turns.

    Returns:
        The median seconds, by name.

    Example:
        >>> seconds = measure({"base": step(nn.Linear(8, 4), torch.randn(2, 8))}, repeats=3)
        >>> 0 < seconds["base"] < 1
        True
    """
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + at_least
    for turn in range(10 * repeats + 1):
        if turn > repeats and time.perf_counter() > end:
            break
        for name, run in steps.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cuda_devices(x: Tree) -> list[torch.device]:
    """The CUDA device of the inputs, if any; its random state must be restored beside the CPU's.

    Example:
        >>> cuda_devices(torch.zeros(2, 3))
        []
    """
    device = tensors_in(x)[0].device
    return [device] if device.type == "cuda" else []
