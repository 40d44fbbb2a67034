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
        self._expected = self.marks()
        self.drew = False

    def marks(self) -> list[int]:
        """A number for each source, another one once it has been drawn from."""
        return [_mark(source) for source in self._sources]

    def state(self) -> list[Any]:
        """What every source would draw next."""
        return [_state(source) for source in self._sources]

    def restore(self, state: list[Any]) -> None:
        """Go back to a state."""
        for source, value in zip(self._sources, state, strict=True):
            _restore(source, value)

    def look(self) -> None:
        """Notice whether numbers were drawn since the last look."""
        now = self.marks()
        self.drew = self.drew or now != self._expected
        self._expected = now

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """Around code that may draw what it wants."""
        self.look()
        yield
        self._expected = self.marks()


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


def _mark(source: Any) -> int:
    state = _state(source)
    if source is random or isinstance(source, random.Random):
        return hash(state)
    return hash(state[1].tobytes() + state[2].to_bytes(4)) if isinstance(state, tuple) else hash(repr(state))


# whose lines are not the network's own
_OTHERS = (random.__file__, *(str(Path(file).parent) for file in (np.__file__, torch.__file__, __file__)))


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
    run: Callable[[], Any], chance: HostRandomness, is_kept: Callable[[], bool], where: Callable[[FrameType], str]
) -> str:
    """Run a network line by line; the module and the line that first draw a number.

    Args:
        run: runs it.
        chance: its sources.
        is_kept: whether the code that runs now belongs to a layer that is kept whole.
        where: says in words where a frame is.
    """
    last, found = [""], []
    marks = [chance.marks()]

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        if found or frame.f_code.co_filename.startswith(_OTHERS):
            return None
        now = chance.marks()
        if now != marks[0]:
            marks[0] = now
            if not is_kept():
                found.append(last[0])
        back = frame.f_back if event == "return" else frame
        if back is not None and not back.f_code.co_filename.startswith(_OTHERS):
            last[0] = where(back)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        run()
    finally:
        sys.settrace(before)
    return next(iter(found), "The base")
