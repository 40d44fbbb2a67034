"""What a forward pass assigns to its modules' attributes: a graph assigns nothing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ensemblenet.conversion.trace.recorder import Recorder

__all__ = ["Assigned", "Attributes"]


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
        return f"{self.module}.{self.attribute}".strip(".")


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

    def restore(self, recorder: Recorder) -> None:
        """Put back what the run has replaced by a value of its own; a cache that no input fills stays."""
        for _, module, plain, buffers in self._before:
            for table, old in ((vars(module), plain), (module._buffers, buffers)):
                for key, value in list(table.items()):
                    if not isinstance(value, Tensor) or value is old.get(key):
                        continue
                    if not value.is_leaf or recorder.observer.comes_from_input(value):
                        if key in old:
                            table[key] = old[key]
                        else:
                            del table[key]
        for container, contents in self._inside:
            if any(
                _is_of_input(part, recorder)
                for part in (container.values() if isinstance(container, dict) else container)
            ):
                container.clear()
                container.update(contents) if isinstance(container, dict) else container.extend(contents)


def _is_of_input(value: object, recorder: Recorder) -> bool:
    return isinstance(value, Tensor) and recorder.observer.comes_from_input(value)
