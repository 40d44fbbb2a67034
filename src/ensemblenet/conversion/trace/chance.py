"""Random numbers: of Python and NumPy, which a graph cannot draw, and of all three, to be left as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CHANCE", "HostRandomness", "keeping_values", "place_of_draw"]

CHANCE = (
    "Draw tensors (torch.rand) and use them as tensors, such as a factor for each example; or set the rate to zero."
)


class HostRandomness:
    """The sources of random numbers that are not PyTorch's: the global ones, and those that modules own.

    Args:
        root: the network.

    Attributes:
        drew: whether the network has drawn a number outside of the layers that are kept whole.
    """

    def __init__(self, root: nn.Module) -> None:
        owned = [value for module in root.modules() for value in vars(module).values()]
        self._sources = [
            random, np.random, *(value for value in owned if isinstance(value, (random.Random, *_OF_NUMPY)))
        ]  # fmt: skip
        self._expected = self.state()
        self.drew = False

    def state(self) -> list[Any]:
        """What every source would draw next."""
        return [_state(source) for source in self._sources]

    def restore(self, state: list[Any]) -> None:
        """Go back to a state."""
        for source, value in zip(self._sources, state, strict=True):
            _restore(source, value)
        self._expected = state

    def look(self) -> None:
        """Notice whether numbers were drawn since the last look."""
        now = self.state()
        self.drew = self.drew or not _same(now, self._expected)
        self._expected = now

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """Around code that may draw what it wants."""
        self.look()
        yield
        self._expected = self.state()


_OF_NUMPY = (np.random.Generator, np.random.RandomState)


def _state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.get_state() if hasattr(source, "get_state") else source.getstate()


def _restore(source: Any, state: Any) -> None:
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif hasattr(source, "set_state"):
        source.set_state(state)
    else:
        source.setstate(state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return all(_same(value, b[key]) for key, value in a.items())
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


_OWN = (str(Path(random.__file__)), str(Path(np.__file__).parent))


@contextmanager
def keeping_values(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Restore the buffers' values and the random state, PyTorch's, Python's and NumPy's, after runs in any mode."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    chance = HostRandomness(module)
    state = chance.state()
    with torch.random.fork_rng(devices):
        yield
    chance.restore(state)
    with torch.no_grad():
        for buffer, value in before:  # into the old tensors: a new one in their place is a cache that the run filled
            buffer.copy_(value)


def place_of_draw(
    run: Callable[[], Any], chance: HostRandomness, is_kept: Callable[[], bool], label: Callable[[], str]
) -> str:
    """Run a network line by line; the module and the line that first draw a number.

    Args:
        run: runs it.
        chance: its sources.
        is_kept: whether the code that runs now belongs to a layer that is kept whole.
        label: the module that runs now.
    """
    last: list[tuple[str, int]] = [("", 0)]
    found: list[str] = []
    states = [chance.state()]

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if found or file.startswith(_OWN):
            return None if found else watch
        now = chance.state()
        if not _same(now, states[0]):
            states[0] = now
            if not is_kept():
                file, line = last[0]
                found.append(f"{label()} at {Path(file).name}:{line}")
        if event == "return" and frame.f_back is not None:
            frame = frame.f_back
        last[0] = frame.f_code.co_filename, frame.f_lineno
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        run()
    finally:
        sys.settrace(before)
    return next(iter(found), "The base")
