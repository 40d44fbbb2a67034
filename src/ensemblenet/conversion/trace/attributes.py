"""What a forward pass assigns to its modules' attributes: a graph assigns nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ensemblenet.conversion.trace.chance import keeping_values

if TYPE_CHECKING:
    from ensemblenet.conversion.trace.recorder import Recorder

__all__ = ["Assigned", "Attributes", "keeping_state"]


class Assigned(NamedTuple):
    """A tensor of the input that a forward pass has assigned to an opened module.

    Attributes:
        module: the module's name.
        attribute: its attribute.
        tensor: the value.
        is_buffer: whether it takes a buffer's place.
    """

    module: str
    attribute: str
    tensor: Tensor
    is_buffer: bool

    def __str__(self) -> str:
        return f"{self.module or 'self'}.{self.attribute}"


@contextmanager
def keeping_state(root: nn.Module, x: Tensor) -> Iterator[None]:
    """Put back what runs in any mode change: the random state, buffers, and all tensors that modules assign."""
    attributes = Attributes(root)
    try:
        with keeping_values(root, x):
            yield
    finally:
        attributes.restore()


class Attributes:
    """The tensors among a network's attributes, before a run.

    Args:
        root: the network.
    """

    def __init__(self, root: nn.Module) -> None:
        self._before = [
            (name, module, dict(vars(module)), dict(module._buffers)) for name, module in root.named_modules()
        ]
        self._inside = [
            (value, value.copy())
            for _, _, plain, _ in self._before
            for key, value in plain.items()
            if isinstance(value, (list, dict)) and not key.startswith("_")
        ]

    def assigned(self, recorder: Recorder) -> list[Assigned]:
        """What the run of a recorder has assigned from its input, outside of the layers that are kept whole."""
        return [
            Assigned(name, key, value, table is module._buffers)
            for name, module, plain, buffers in self._before
            if module not in recorder.whole_layers
            for table, old in ((vars(module), plain), (module._buffers, buffers))
            for key, value in table.items()
            if isinstance(value, Tensor) and value is not old.get(key) and recorder.observer.comes_from_input(value)
        ]

    def restore(self, recorder: Recorder | None = None) -> None:
        """Put back what has been replaced since.

        Args:
            recorder: of a run that may have filled caches: only what came from its input is put back, and what has a
                gradient's history, which no copy can have.
        """

        def is_new(value: object) -> bool:
            if not isinstance(value, Tensor):
                return False
            return recorder is None or not value.is_leaf or recorder.observer.comes_from_input(value)

        for _, module, plain, buffers in self._before:
            for table, old in ((vars(module), plain), (module._buffers, buffers)):
                for key in [key for key, value in table.items() if value is not old.get(key) and is_new(value)]:
                    if key in old:
                        table[key] = old[key]
                    else:
                        del table[key]
        for container, contents in self._inside:
            if isinstance(container, list) and any(map(is_new, container)):
                container[:] = contents
            elif isinstance(container, dict) and any(map(is_new, container.values())):
                container.clear()
                container.update(contents)
