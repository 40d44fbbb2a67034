"""What a finished run of a base says of its conversion: whether the base has capacity to spare."""

from __future__ import annotations

from typing import Any

from ensemblenet.conversion.capacity import Capacity, spare_capacity
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ConversionError
from ensemblenet.inputs import first_batches
from ensemblenet.storage.restore import Restored, data_module

__all__ = ["CAPACITY", "capacity_of"]

CAPACITY = "capacity.json"  # in the folder of a run that was told of its base's
_EXAMPLES = 10_000  # of each split; a mean loss needs no more


def capacity_of(restored: Restored) -> Capacity:
    """The losses of a run's base on training and validation examples of its own data.

    Args:
        restored: a finished run, see [`ensemblenet.storage.restore.restore`][].

    Raises:
        ConversionError: it trained a conversion.
    """
    if isinstance(restored.network, EnsembleNet):
        raise ConversionError(
            f"{restored.address or restored.folder} trained a conversion; spare capacity is a base's: give the run of "
            "one."
        )
    data: Any = data_module(restored)
    data.prepare_data()
    data.setup("fit")
    train, validation = (
        first_batches(loader, _EXAMPLES) for loader in (data.train_dataloader(), data.val_dataloader())
    )
    return spare_capacity(restored.network, train, validation, restored.task)
