"""A base, or its conversion, as a LightningModule that trains it as a classifier or a tagger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ensemblenet import convert
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import TrainingError
from ensemblenet.functional import Combine, agreement
from ensemblenet.heads import Choice, FusedEnsembleNet, HeadsMode, choose, fuse, unfuse
from ensemblenet.losses import CoDistillationLoss
from ensemblenet.metrics import HeadMetrics
from ensemblenet.tagging_metrics import TaggingMetrics, mask_unknown
from ensemblenet.training.optimization import Optimization, build_optimizer, build_schedule

__all__ = ["Classifier", "Conversion", "head_outputs"]

Batch = tuple[Tensor, Tensor]
ClassifierTask = Literal["multiclass", "multilabel"]


@dataclass(frozen=True)
class Conversion:
    """What [`ensemblenet.convert`][] is called with; it explains the settings.

    Args:
        seed: the seed of the heads' weights; None takes the run's own.
    """

    num_heads: int = 2
    budget: float = 1.0
    split_at: str = "auto"
    seed: int | None = None
    init: Literal["fresh", "inherit"] = "fresh"
    combine: Combine = "logits"

    def apply(self, base: nn.Module, example_inputs: Tensor, task: ClassifierTask = "multiclass") -> EnsembleNet:
        """Convert a base for inputs like these, of shape (N, *)."""
        settings: dict[str, Any] = asdict(self)
        if self.seed is None:
            settings["seed"] = torch.initial_seed() % 2**32
        return convert(base, example_inputs, task=task, **settings)


class Classifier(LightningModule):
    """Trains a network, or the multi-headed model that it converts to, as a classifier.

    The base goes the same way as a model of one head: for it, co-distillation is plain cross-entropy. It logs
    `train/loss`, `train/agreement` (in nats, see [`ensemblenet.functional.agreement`][]) and, with the prefix
    `val/` and `test/`, what [`ensemblenet.metrics.HeadMetrics`][] lists, or for task "multilabel"
    [`ensemblenet.tagging_metrics.TaggingMetrics`][].

    Args:
        base: a network from a batch of inputs to logits (N, C); it is converted for the shape of the first
            training batch.
        conversion: how to convert the base; None trains the base itself.
        codistillation_weight: lambda of [`ensemblenet.CoDistillationLoss`][].
        label_smoothing: in [0, 1].
        optimization: optimizer and learning rate.
        task: "multiclass" for targets (N,) of class indices, "multilabel" for targets (N, C) of 1 where a label
            is, 0 where none is, and -1 where it is not known.
        heads: how the heads of a converted model run, see [`ensemblenet.heads.choose`][]: "auto" measures it on the
            first batch and says what it chose, and a resumed run keeps to that. Looped and fused heads round
            differently and draw other numbers for dropout: name one for runs that must be the same to the last bit.
    """

    def __init__(
        self,
        base: nn.Module,
        conversion: Conversion | None = None,
        codistillation_weight: float = 2.0,
        label_smoothing: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  frozen
        task: ClassifierTask = "multiclass",
        heads: HeadsMode = "auto",
    ) -> None:
        super().__init__()
        self.network = base
        self.task: ClassifierTask = task
        self.heads: HeadsMode = heads
        self.conversion = conversion
        self.optimization = optimization
        self.criterion = CoDistillationLoss(
            codistillation_weight,
            task,
            combine=conversion.combine if conversion else "logits",
            label_smoothing=label_smoothing,
        )
        self.metrics = nn.ModuleDict()

    @property
    def num_heads(self) -> int:
        """K; 1 for the base itself."""
        return self.network.num_heads if isinstance(self.network, EnsembleNet) else 1

    def setup(self, stage: str) -> None:
        """Convert the base, once, for the inputs that the data module yields."""
        if len(self.metrics):
            return
        inputs, _ = _first_batch(self.trainer.datamodule.train_dataloader())  # pyright: ignore
        if self.conversion is not None:
            self.network = self._with_chosen_heads(self.conversion.apply(self.network, inputs, self.task), inputs)
        self.example_inputs = inputs[:1]
        with torch.no_grad():
            num_classes = self.network.eval()(inputs[:1]).shape[1]
        self.network.train()
        metrics = {"multiclass": HeadMetrics, "multilabel": TaggingMetrics}[self.task]
        for split in ("val", "test"):
            self.metrics[split] = metrics(
                num_classes, self.num_heads, combine=self.criterion.combine, prefix=f"{split}/"
            )

    def _with_chosen_heads(self, network: EnsembleNet, inputs: Tensor) -> EnsembleNet:
        """The network with its heads run as asked, or as is faster on the device that will train it."""
        device = self.trainer.strategy.root_device
        network, choice = choose(network.to(device).train(), inputs.to(device), self.heads)
        rank_zero_info(f"The heads run {choice.heads}: {choice.reason}.")
        self.choice = choice
        return network.to(inputs.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how the heads run."""
        if isinstance(self.network, EnsembleNet):
            checkpoint["heads"] = [self.choice.heads, *self.choice.separate]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Run the heads as before, unless the user names another way."""
        if self.heads != "auto" or "heads" not in checkpoint or not isinstance(self.network, EnsembleNet):
            return
        heads, *separate = checkpoint["heads"]
        self.choice = Choice(heads, "as before", separate=tuple(separate))
        self.network = unfuse(self.network) if heads == "looped" else fuse(self.network)
        if isinstance(self.network, FusedEnsembleNet):
            self.network.separate(separate, training=True)

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives."""
        return self.network(x)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of a batch.

        Raises:
            TrainingError: the loss is not finite.
        """
        x, y = batch
        outputs = head_outputs(self.network, x)
        if self.task == "multilabel":
            outputs, y = mask_unknown(outputs, y)
        loss = self.criterion(outputs, y)
        if not loss.isfinite():
            raise TrainingError(f"The loss became {loss.item()} {self._where(batch_index)}")
        self.log("train/loss", loss, on_step=True, prog_bar=True)
        apart = agreement(outputs.detach(), self.task, combine=self.criterion.combine)
        self.log("train/agreement", apart, on_step=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Refuse to end an epoch with broken weights, before a checkpoint keeps them."""
        for name, parameter in self.network.named_parameters():
            if not parameter.isfinite().all():
                last = self.trainer.num_training_batches - 1  # pyright: ignore[reportOperatorIssue]
                raise TrainingError(f"The weights {name} became non-finite {self._where(int(last))}")

    def _where(self, batch_index: int) -> str:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        return (
            f"at step {self.global_step} (epoch {self.current_epoch}, batch {batch_index}) with learning "
            f"rate {lr:.3g}. The last good checkpoint is kept. Lower the learning rate, warm up for longer, or "
            "look at that batch."
        )

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        x, y = batch
        self.metrics[split].update(head_outputs(self.network, x), y)  # pyright: ignore[reportCallIssue]

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        metrics: Any = self.metrics[split]
        values = metrics.compute()
        metrics.reset()
        shown = f"{split}/{'accuracy' if self.task == 'multiclass' else 'gap'}"
        self.log(shown, values.pop(shown), prog_bar=True)
        self.log_dict(values)

    def configure_optimizers(self) -> Any:
        """The optimizer with its schedule, one step of it a batch."""
        optimizer = build_optimizer(self.network, self.optimization)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, steps, self.optimization)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def head_outputs(network: nn.Module, x: Tensor) -> Tensor:
    """The logits of every head, (K, N, C), in either mode; a plain network counts as one head."""
    return network(x, per_head=True) if isinstance(network, EnsembleNet) else network(x).unsqueeze(0)


def _first_batch(loader: Iterable[Batch]) -> Batch:
    return next(iter(loader))
