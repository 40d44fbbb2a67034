"""A trained network that teaches a run of `fit`, once for each example or for every batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from ensemblenet.conversion.trace import Output, pick
from ensemblenet.conversion.trained import looks_trained
from ensemblenet.cost import measure_cost
from ensemblenet.data import DataModule
from ensemblenet.errors import TrainingError, first_line
from ensemblenet.inputs import Tree, call, tensors_in, to_device
from ensemblenet.storage.restore import compare_classes, restore

__all__ = ["Teacher"]

_MOST_BYTES = 2**30  # of logits that are kept in memory


class Teacher:
    """A trained network, in evaluation mode and without gradients.

    It is no part of the module that it teaches: not trained, averaged, saved or counted with it.

    Args:
        network: of which outputs are logits, (N, C).
        name: what messages call it.
        output: which of its outputs are the logits, where it has several.

    Attributes:
        note: a line that says what it costs.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 3), "the base")
        >>> logits = teacher((torch.zeros(2, 4), torch.zeros(2)), torch.zeros(2, 4))
        >>> logits.shape, logits.requires_grad
        (torch.Size([2, 3]), False)
    """

    def __init__(self, network: nn.Module, name: str, output: Output = None) -> None:
        self.network = network.eval()
        self.name = name
        self.output = output
        self.is_stored = False
        self.note = ""

    @classmethod
    def named(cls, folder: str, task: str, data: LightningDataModule, trust: bool = False) -> Teacher:
        """What a finished run trained, or a saved directory holds.

        Args:
            folder: a run's, a saved directory, or its address on the hub.
            task: that it must have been trained for.
            data: set up; it must have the classes that the network was trained on.
            trust: whether to run what the folder names of its author's own code.

        Raises:
            TrainingError: it was trained for another task.
            LoadError: the folder has no model, or one that is not known.
            ClassesError: its classes are not those of the data.
        """
        restored = restore(folder, trust=trust)
        if restored.task != task:
            raise TrainingError(
                f"The teacher {folder} was trained for the task {restored.task}, and this run is {task}."
            )
        compare_classes(restored.classes, data)
        return cls(restored.network, str(folder))

    @classmethod
    def base(cls, base: nn.Module, output: Output = None) -> Teacher:
        """The base that is converted.

        Raises:
            TrainingError: it looks as if it were not trained.
        """
        if not looks_trained(base):
            raise TrainingError(
                "teacher_weight needs a trained teacher, and the base's weights look freshly drawn: give --teacher "
                "the folder of a finished run of the base, or the base its trained weights."
            )
        return cls(base, "the base", output)

    def __deepcopy__(self, memo: Any) -> Teacher:
        """A copy of the module that it teaches, such as an average, has the same teacher."""
        return self

    def __call__(self, batch: Any, x: Tree) -> Tensor:
        """The logits for a batch, (N, C): those that were stored, or what the network makes of its inputs x."""
        return batch[2] if self.is_stored else self.logits(x)

    @torch.no_grad()
    def logits(self, x: Tree) -> Tensor:
        """What the network gives, (N, C)."""
        return pick(call(self.network, x), self.output)[0]

    def prepare(
        self,
        example: Tree,
        student: nn.Module,
        num_classes: int,
        mixes: bool,
        lay_out: Callable[[Tree], Tree],
        trainer: Trainer,
    ) -> None:
        """Move it to where the student trains; where training repeats its inputs, run it now, once for each example.

        Args:
            example: one example of the data.
            student: what it teaches, whose cost stands beside its own in `note`.
            num_classes: of the student.
            mixes: whether batches are mixed, so that no inputs come twice.
            lay_out: puts inputs into the layout that the student takes.
            trainer: of the run; its data module may keep the logits.

        Raises:
            TrainingError: it does not take the inputs, or has other classes.
        """
        try:
            shape = tuple(self.logits(example).shape)
        except Exception as error:  # whatever a network makes of inputs that are none
            shapes = ", ".join(str(tuple(tensor.shape[1:])) for tensor in tensors_in(example))
            raise TrainingError(
                f"The teacher {self.name} does not take inputs of shape {shapes}: {first_line(error)}"
            ) from error
        if shape[1:] != (num_classes,):
            raise TrainingError(
                f"The teacher {self.name} gives outputs of shape {shape} and the network (1, {num_classes}): a teacher "
                "has the classes of the network that it teaches."
            )
        own, students = measure_cost(self.network, example).macs, measure_cost(student, example).macs
        self.network = trainer.precision_plugin.convert_module(self.network.to(trainer.strategy.root_device))
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        reason = _why_not_stored(data, num_classes, mixes, trainer)
        if reason is None:
            self._store(data, lay_out, trainer)
            return
        self.note = (
            f"The teacher is {self.name}. It runs for every batch, {reason}: {own:,.0f} MACs an example, where a "
            f"training step of the network has about {3 * students:,.0f}."
        )

    def _store(self, data: DataModule, lay_out: Callable[[Tree], Tree], trainer: Trainer) -> None:
        """Have the data's training batches hold the logits; each process works out its share."""
        began, plugin, device = time.perf_counter(), trainer.precision_plugin, trainer.strategy.root_device
        logits = torch.empty(0)
        for x, _, places in data.training_in_order(trainer.global_rank, trainer.world_size):
            with plugin.forward_context():
                found = self.logits(plugin.convert_input(lay_out(to_device(x, device))))
            if not len(logits):
                logits = found.new_zeros(len(data.examples("train")), found.shape[1])
            logits[places] = found
        logits = trainer.strategy.reduce(logits, reduce_op="sum").cpu()  # zeros where others have theirs
        data.put_beside(logits)
        self.is_stored = True
        self.note = (
            f"The teacher is {self.name}. It ran once for each of {len(logits):,} training examples, in "
            f"{time.perf_counter() - began:.1f} s: its logits are kept in memory, {logits.nbytes / 1e6:.1f} MB."
        )


def _why_not_stored(data: LightningDataModule, num_classes: int, mixes: bool, trainer: Trainer) -> str | None:
    """Why logits are worked out for each batch anew; None where they need not be."""
    if mixes:
        return "as mixing changes its inputs"
    if not isinstance(data, DataModule) or not data.repeats_training:
        return "as the data is augmented, or does not say that it is not"
    if trainer.max_epochs == 1:
        return "as each example comes once"
    if (gigabytes := 4 * num_classes * len(data.examples("train")) / _MOST_BYTES) > 1:
        return f"as {gigabytes:.1f} GB of logits would be too much to keep"
    return None
