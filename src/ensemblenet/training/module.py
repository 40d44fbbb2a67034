"""A base, or its conversion, as a LightningModule that trains it as a classifier or a tagger."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ensemblenet.conversion.capacity import Capacity
from ensemblenet.conversion.convert import convert_as
from ensemblenet.conversion.trace import pick
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import TrainingError, first_line
from ensemblenet.functional import ClassifierTask, divergence, no_logits
from ensemblenet.heads import Choice, HeadsMode, choose, current_mode, fuse, unfuse
from ensemblenet.inputs import Tree, call, inputs_and_targets, one_example, tensors_in, to_device
from ensemblenet.losses import CoDistillationLoss
from ensemblenet.metrics import HeadMetrics
from ensemblenet.metrics.scores import TASKS
from ensemblenet.metrics.tagging import TaggingMetrics, mask_unknown
from ensemblenet.recipe import Conversion
from ensemblenet.training.inheriting import calibration_batches, scores_in_words
from ensemblenet.training.mixing import Mix, Mixing, soft_targets
from ensemblenet.training.optimization import (
    Optimization,
    build_optimizer,
    build_schedule,
    check_optimizers,
    layer_depths,
)
from ensemblenet.training.sharding import FSDP2, FullyShardedStrategy
from ensemblenet.training.teacher import Teacher

__all__ = ["Classifier", "Conversion", "check_num_classes", "head_outputs", "plan_in_words", "seen_outputs"]

_METRICS = {"multiclass": HeadMetrics, "multilabel": TaggingMetrics}
Loss = Literal["cross_entropy", "binary_cross_entropy"]
_WEIGHT, _WEIGHT_WITHOUT_CAPACITY = 2.0, 1.0  # the lambda of "auto": docs/procedure.md, "Which shape of heads"


# what PyTorch says of inputs that a layer was not made for
_OF_SHAPES = re.compile(r"cannot be multiplied|\bchannels?\b|\bsizes?\b|\bshapes?\b|\dD\b|dimension")


class Classifier(LightningModule):
    """Trains a network, or the multi-headed model that it converts to, as a classifier.

    The base goes the same way as a model of one head: for it, co-distillation is plain cross-entropy. It logs
    `train/loss`, `train/divergence` (in nats, see [`ensemblenet.functional.divergence`][]) and, with the prefix
    `val/` and `test/`, what [`ensemblenet.metrics.HeadMetrics`][] lists, or for task "multilabel"
    [`ensemblenet.metrics.tagging.TaggingMetrics`][].

    Args:
        base: a network from a batch of inputs to logits (N, C); it is converted for the shape of the first
            training batch. A batch is a pair of inputs and targets; inputs are a tensor, or a tuple or a dictionary
            of tensors as the base takes them. Or it is a dictionary of named inputs with the targets as "labels".
        conversion: how to convert the base; None trains the base itself.
        codistillation_weight: lambda of [`ensemblenet.CoDistillationLoss`][]; "auto" is 2, or 1 where `capacity` shows
            that the base has none to spare.
        label_smoothing: in [0, 1); 1 would leave nothing of the labels.
        optimization: optimizer and learning rate.
        task: "multiclass" for targets (N,) of class indices, "multilabel" for targets (N, C) of 1 where a label
            is, 0 where none is, and -1 where it is not known.
        heads: how the heads of a converted model run, see [`ensemblenet.heads.choose`][]: "auto" measures it on the
            first batch and says what it chose, and a resumed run keeps to that. Looped and fused heads round
            differently and draw other numbers for dropout, and it is measured which convolutions of fused heads run
            grouped: for runs that must be the same to the last bit take "looped", or Lightning's `deterministic`.
        loss: for task "multiclass": "binary_cross_entropy" takes each class for a label of its own, and the mean over
            classes, as Wightman et al. 2021 (arXiv 2110.00476) do. Its logits give the same best classes, but as
            probabilities, which NLL, ECE and Brier score judge, they are not calibrated.
        mixing: mixup and CutMix of training batches, for task "multiclass".
        channels_last: store images and weights of convolutions with channels last, which GPUs prefer.
        teacher: the folder of a finished run, or a saved directory, whose network teaches every head, see
            [`ensemblenet.CoDistillationLoss`][]; None takes the base before its conversion, if `teacher_weight` is
            given. It costs a forward pass for each batch, or one for each example where the data is not augmented.
        teacher_weight: the weight of the teacher's term; None takes 1 where a teacher is named, else 0: no teacher.
        teacher_temperature: of the teacher's distillation.

    Attributes:
        capacity: what a run of the base showed; the conversion splits late where there is none to spare.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(
        self,
        base: nn.Module,
        conversion: Conversion | None = None,
        codistillation_weight: float | Literal["auto"] = "auto",
        label_smoothing: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  frozen
        task: ClassifierTask = "multiclass",
        heads: HeadsMode = "auto",
        loss: Loss = "cross_entropy",
        mixing: Mixing | None = None,
        channels_last: bool = False,
        teacher: str | None = None,
        teacher_weight: float | None = None,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        _check(task, loss, mixing, conversion, label_smoothing)
        if teacher_weight is None:
            teacher_weight = 0.0 if teacher is None else 1.0
        _check_teacher(teacher, teacher_weight, teacher_temperature, conversion)
        self.network = base
        self.task: ClassifierTask = task
        self.heads: HeadsMode = current_mode(heads)
        self.conversion = conversion
        self.optimization = optimization
        self.mixing = mixing
        self.channels_last = channels_last
        self.binary = task == "multiclass" and loss == "binary_cross_entropy"
        self.label_smoothing = label_smoothing
        self.criterion = CoDistillationLoss(
            _WEIGHT if codistillation_weight == "auto" else codistillation_weight,
            "multilabel" if self.binary else task,
            combine=conversion.combine if conversion else base.combine if isinstance(base, EnsembleNet) else "logits",
            label_smoothing=0.0 if self.binary else label_smoothing,
            teacher_weight=teacher_weight,
            temperature=teacher_temperature,
        )
        self.inherited_scores: str | None = None  # before any training, in words
        self.teacher_folder = teacher
        self.trusts_teacher = False
        self.teacher: Teacher | None = None  # from setup on
        self.depths: Mapping[str, int] | None = None  # likewise
        self.capacity: Capacity | None = None
        self._chooses_weight = codistillation_weight == "auto"
        self.mix: Mix | None = None
        self._schedule: LRScheduler | None = None
        self._planned: list[tuple[float, float]] = []  # learning rate and weight decay of each group
        self._meant: set[str] = set()
        self._bad_outputs: Tensor | int = 0
        self.metrics = nn.ModuleDict()

    @property
    def num_heads(self) -> int:
        """K; 1 for the base itself."""
        return self.network.num_heads if isinstance(self.network, EnsembleNet) else 1

    def setup(self, stage: str) -> None:
        """Convert the base, once, for the inputs that the data module yields."""
        if len(self.metrics):
            return
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise TrainingError("Every parameter of the base is frozen (requires_grad is False): nothing would train.")
        inputs, targets = inputs_and_targets(next(iter(self.trainer.datamodule.train_dataloader())))  # pyright: ignore
        self._check_batch(inputs, targets)
        inputs = self._laid_out(inputs)
        self.network = self.network.to(memory_format=self._memory_format)
        self._check_outputs(one_example(inputs))
        if self.optimization.layer_decay < 1:
            output = None if self.conversion is None else self.conversion.output
            self.depths = layer_depths(self.network, inputs, output)
        if self.criterion.teacher_weight:
            self.teacher = self._find_teacher()
        if self.conversion is not None:
            if self._chooses_weight and self.capacity is not None and not self.capacity.is_spare:
                self.criterion.weight = _WEIGHT_WITHOUT_CAPACITY
            self.network = self._with_chosen_heads(self._converted(self.conversion, inputs, targets), inputs)
        self.example_inputs = one_example(inputs)
        with torch.no_grad():
            num_classes = head_outputs(self.network.eval(), self.example_inputs).shape[2]
        self.network.train()
        self._meant = _non_finite(self.network)
        check_num_classes(num_classes, self.trainer.datamodule, targets, self.task)  # pyright: ignore
        self.num_classes = num_classes
        self.mix = None if self.mixing is None else self.mixing.mixer(num_classes)
        if self.teacher is not None:
            self.teacher.network = self.teacher.network.to(memory_format=self._memory_format)
            mixes = self.mix is not None
            self.teacher.prepare(self.example_inputs, self.network, num_classes, mixes, self._laid_out, self.trainer)
        for split in ("val", "test"):
            self.metrics[split] = _METRICS[self.task](
                num_classes, self.num_heads, combine=self.criterion.combine, prefix=f"{split}/"
            )

    def _converted(self, conversion: Conversion, inputs: Tree, targets: Tensor) -> EnsembleNet:
        """The base, converted; where it was trained, by some batches of the data, unless a checkpoint is to follow."""
        if conversion.init != "inherit" or self.trainer.ckpt_path is not None:
            return convert_as(conversion, self.network, inputs, self.task, self.capacity)
        device, here = self.trainer.strategy.root_device, tensors_in(inputs)[0].device
        base = self.network.to(device).eval()
        with torch.no_grad():
            classes = head_outputs(base, to_device(one_example(inputs), device)).shape[2]
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        check_num_classes(conversion.num_classes or classes, data, targets, self.task)
        batches = calibration_batches(data.train_dataloader())
        if self.trainer.world_size > 1:  # each process has other batches
            batches = self.trainer.strategy.broadcast(batches)
        laid_out = [(self._laid_out(x), y) for x, y in map(inputs_and_targets, batches)]
        model = convert_as(conversion, base, to_device(inputs, device), self.task, self.capacity, laid_out)
        if conversion.num_classes is None and self.trainer.limit_val_batches:
            ndim = tensors_in(inputs)[0].ndim
            self.inherited_scores = scores_in_words(
                {"base": base, "heads": model},
                data.val_dataloader(),
                lambda network, x: seen_outputs(network, self._laid_out(to_device(x, device)), ndim, self.task),
                lambda heads: _METRICS[self.task](classes, heads, combine=self.criterion.combine),
                TASKS[self.task].main,
            )
        base.to(here)  # in evaluation mode, as it may be the teacher from now on
        return model

    def _find_teacher(self) -> Teacher:
        """The network of the folder, or the base."""
        if self.teacher_folder is None:
            return Teacher.base(self.network, self.conversion.output if self.conversion else None)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        return Teacher.named(self.teacher_folder, self.task, data, self.trusts_teacher)

    def _check_batch(self, inputs: Tree, targets: Tensor) -> None:
        """Refuse settings that do not go with such a batch."""
        ndim = inputs.ndim if isinstance(inputs, Tensor) else 0
        for setting, wanted, fits in (
            ("channels_last", "images (N, C, H, W)", not self.channels_last or ndim == 4),
            ("mixing", "images or videos", self.mixing is None or ndim >= 4),
            ("task multilabel", "targets (N, C)", self.task != "multilabel" or targets.ndim == 2),
        ):
            if not fits:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))
                given = f"inputs {shapes} and targets {tuple(targets.shape)}"
                raise TrainingError(f"model.{setting} needs {wanted}; the data gives {given}.")

    def _check_outputs(self, example: Tree) -> None:
        """Refuse a network that does not take the data, or does not give logits."""
        try:
            with torch.enable_grad():
                outputs = head_outputs(self.network.eval(), example)
        except RuntimeError as error:
            if not _OF_SHAPES.search(str(error)):
                raise
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(example))
            raise TrainingError(f"The base does not take the data's inputs, {shapes}: {first_line(error)}.") from error
        self.network.train()
        if outputs.ndim < 3:
            raise TrainingError(
                "The base gives one number an example, (N,); fit trains classifiers and taggers, which give (N, C). "
                "Regression needs a loop in Python, with outputs (K, N, 1): docs/guide.md shows one."
            )
        if said := no_logits(outputs[0], self.task):
            raise TrainingError(said)

    def _with_chosen_heads(self, network: EnsembleNet, inputs: Tree) -> EnsembleNet:
        """The network with its heads run as asked, or as is faster on the device that will train it."""
        device = self.trainer.strategy.root_device
        with self.trainer.precision_plugin.forward_context():  # what is faster depends on the precision
            network, choice = choose(network.to(device).train(), to_device(inputs, device), self._allowed_heads())
        if self.heads == "auto" and self.trainer.world_size > 1:  # each process measured for itself
            choice = self.trainer.strategy.broadcast(choice)
            network = _with_heads(network, choice)
        rank_zero_info(f"The heads run {choice.heads}: {choice.reason}.")
        self.choice = choice
        return network.to(tensors_in(inputs)[0].device)

    def _allowed_heads(self) -> HeadsMode:
        """Fused heads do not pass through the layers that Lightning exchanges, nor through those that are sharded."""
        strategy = self._trainer and self._trainer.strategy  # a checkpoint can also be read without a trainer
        if isinstance(strategy, FullyShardedStrategy):
            setting = f"trainer.strategy {FSDP2}"
        elif getattr(strategy, "_layer_sync", None) is not None:
            setting = "trainer.sync_batchnorm"
        else:
            return self.heads
        if self.heads in ("fused", "compiled", "checkpointed"):
            raise TrainingError(f"{setting} needs model.heads looped, got {self.heads}.")
        return "looped"

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.preserve_format

    def _laid_out(self, x: Tree) -> Tree:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to keep broken weights, and note how the heads run."""
        self._check_finite()
        if isinstance(self.network, EnsembleNet):
            checkpoint["heads"] = [self.choice.heads, *self.choice.separate]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Run the heads as before, down to each convolution, unless the user names another way."""
        if "heads" not in checkpoint or not isinstance(self.network, EnsembleNet):
            return
        heads, *separate = checkpoint["heads"]
        if self._allowed_heads() not in ("auto", heads):
            return
        self.choice = Choice(current_mode(heads), "as before", separate=tuple(separate))
        self.network = _with_heads(self.network, self.choice)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives."""
        return self.network(*args, **kwargs)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of a batch.

        Raises:
            TrainingError: the loss is not finite.
        """
        x, y = inputs_and_targets(batch)
        if self.mix is not None:
            x, y = self.mix(x, y)
        if self.binary:
            y = soft_targets(y, self.num_classes, self.label_smoothing)
        x = self._laid_out(x)
        outputs = head_outputs(self.network, x)
        taught = None if self.teacher is None else self.teacher(batch, x)
        if self.task == "multilabel":
            taught = None if taught is None else mask_unknown(taught, y)[0]
            outputs, y = mask_unknown(outputs, y)
        loss = self.criterion(outputs, y, taught) / (self.num_classes if self.binary else 1)
        if not loss.isfinite():
            raise TrainingError(f"The loss became {loss.item()} {self._where(batch_index)}")
        self.log("train/loss", loss, on_step=True, prog_bar=True, sync_dist=True)
        apart = divergence(outputs.detach(), self.criterion.task, combine=self.criterion.combine)
        self.log("train/divergence", apart, on_step=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Refuse to end an epoch with broken or replaced weights."""
        self._check_training()
        self._check_finite()

    def _check_finite(self) -> None:
        """Weights, and buffers such as a normalisation's statistics, that became infinite or NaN end the run.

        What was so from the beginning, such as a mask, is meant to be.
        """
        if broken := sorted(_non_finite(self.network) - self._meant):
            raise TrainingError(f"The weights or statistics {broken[0]} became non-finite {self._where()}")

    def _where(self, batch_index: int | None = None) -> str:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        when = f"epoch {self.current_epoch}" + ("" if batch_index is None else f", batch {batch_index}")
        places = [getattr(writer, "dirpath", None) for writer in self.trainer.checkpoint_callbacks]
        saved = any(next(Path(place).glob("*.ckpt"), None) for place in places if place is not None)
        kept = "The last good checkpoint is kept." if saved else "There is no checkpoint yet."
        return (
            f"at step {self.global_step} ({when}) with learning rate {lr:.3g}. {kept} Lower "
            "--model.optimization.lr, warm up for longer (--model.optimization.warmup), clip gradients "
            "(--trainer.gradient_clip_val), or look at the data of the steps before."
        )

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Any) -> None:
        x, y = inputs_and_targets(batch)
        outputs = seen_outputs(self.network, self._laid_out(x), tensors_in(self.example_inputs)[0].ndim, self.task)
        self._bad_outputs = self._bad_outputs + (~outputs.isfinite()).flatten(2).any(2).any(0).sum()
        self.metrics[split].update(outputs, y)  # pyright: ignore[reportCallIssue]

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
        if unknown := [name for name, value in values.items() if not math.isfinite(value)]:
            rank_zero_warn(
                f"{', '.join(unknown)} are unknown: the outputs for {int(self._bad_outputs)} examples are not finite. "
                "Look at these examples, or at the statistics of the network's normalisation."
            )
        self._bad_outputs = 0
        shown = f"{split}/{TASKS[self.task].main}"
        self.log(shown, values.pop(shown), prog_bar=True)
        self.log_dict(values)

    def configure_optimizers(self) -> Any:
        """The optimizer with its schedule, one step of it a batch.

        Raises:
            TrainingError: the optimizer cannot be made, or a run without an end.
        """
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:
            raise TrainingError(
                "The learning rate's course needs a run with an end: give --trainer.max_epochs, or for data of unknown "
                "length --trainer.max_steps."
            )
        if (self.trainer.min_steps or 0) > steps:
            raise TrainingError(
                f"trainer.min_steps {self.trainer.min_steps} is more than the {steps} steps of the run."
            )
        try:
            optimizer = build_optimizer(self.network, self.optimization, self.depths)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        if self.trainer.gradient_clip_val:  # fused optimizers would undo a loss scale only after the clipping
            setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010  of PyTorch, and no part of its types
        self._planned = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        self._schedule = build_schedule(optimizer, int(steps), self.optimization)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Refuse to train a network that is not what the optimizer holds; callbacks have had their turn.

        A resumed run then goes on with the learning rates and the weight decay of today: its checkpoint had others.
        """
        self._check_training()
        schedule, in_copies = self._schedule, isinstance(self.trainer.strategy, DeepSpeedStrategy)
        if isinstance(schedule, LambdaLR) and not in_copies:
            schedule.base_lrs = [lr for lr, _ in self._planned]
            for group, factor, (lr, decay) in zip(
                schedule.optimizer.param_groups, schedule.lr_lambdas, self._planned, strict=True
            ):
                group |= {"initial_lr": lr, "lr": lr * factor(schedule.last_epoch), "weight_decay": decay}

    def on_train_epoch_start(self) -> None:
        """Look again."""
        self._check_training()

    def _check_training(self) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return  # its optimizer holds flat copies, which it makes itself
        check_optimizers(self.network, self.trainer.optimizers, self.parameters())
        if self._schedule is None:
            return  # a subclass has its own way
        made = self._schedule.optimizer
        scheduled = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if (
            self.trainer.optimizers != [made]
            or scheduled != [self._schedule]
            or len(made.param_groups) != len(self._schedule.base_lrs)
        ):
            raise TrainingError(
                "A callback replaced the optimizer, its groups or its schedule, of which a resumed run would know "
                "nothing: use --model.optimization instead."
            )


def head_outputs(network: nn.Module, x: Tree) -> Tensor:
    """The logits of every head, (K, N, C), in either mode; a plain network counts as one head.

    Raises:
        TrainingError: heads give several outputs.
    """
    if not isinstance(network, EnsembleNet):
        return pick(call(network, x), None)[0].unsqueeze(0)
    outputs = call(network, x, per_head=True)
    if isinstance(outputs, tuple):
        raise TrainingError(
            f"The heads give {len(outputs)} outputs, and this trains one: convert with output= the one to be learned, "
            "or write a loop of your own that adds up their losses."
        )
    return outputs


def check_num_classes(num_classes: int, data: Any, targets: Tensor, task: ClassifierTask) -> None:
    """Refuse a network whose outputs are not the classes of the data, where the data says what they are.

    Args:
        num_classes: outputs of the network.
        data: the data module.
        targets: of a batch.
        task: of the network.

    Raises:
        TrainingError: they differ.

    Example:
        >>> check_num_classes(3, None, torch.zeros(2, 3), "multilabel")
    """
    description = getattr(data, "description", None)
    names = description().get("classes") if description else None
    classes = targets.shape[1] if task == "multilabel" else names and len(names)
    if classes is not None and classes != num_classes:
        raise TrainingError(
            f"The data has {classes} classes and the network {num_classes} outputs: give the base "
            f"num_classes={classes}, or where it was trained for others --num-classes {classes}, or the data as many "
            "classes as the network."
        )


def _non_finite(network: nn.Module) -> set[str]:
    """The names of the weights and buffers that hold NaN or infinity."""
    tensors = network.state_dict()
    floats = {name: value for name, value in tensors.items() if value.is_floating_point() or value.is_complex()}
    return {name for name, value in floats.items() if not value.isfinite().all()}


def plan_in_words(model: EnsembleNet) -> str:
    """Where a conversion is split, the shape of its heads, and the shares of the base that it costs."""
    assert model.recipe is not None
    assert model.cost is not None
    assert model.base_cost is not None
    head, shares = model.recipe.head, model.cost.shares_of(model.base_cost)
    frozen = f" {_saved_in_words(model)}" if model.trunk_is_frozen else ""
    return (
        f"Split at {model.recipe.split_at!r}: {model.num_heads} heads of width {head.width:.3g} and depth "
        f"{head.depth:.3g}, with {shares.parameters:.2f} of the base's parameters, {shares.macs:.2f} of its MACs, "
        f"{shares.activations:.2f} of its activations and {shares.time:.2f} of its time.{frozen}"
    )


def _saved_in_words(model: EnsembleNet) -> str:
    """What a frozen trunk saves in training, by its share of the model's costs."""
    assert model.cost is not None
    assert model.trunk_cost is not None
    trained = sum(own.numel() for own in model.parameters() if own.requires_grad)
    macs = model.trunk_cost.macs / model.cost.macs
    activations = model.trunk_cost.activations / model.cost.activations
    return (
        f"The trunk is frozen: {trained:,} of {model.cost.parameters:,} parameters are trained, which saves about "
        f"{macs:.0%} of the backward pass's MACs and {activations:.0%} of the activations that are kept for it."
    )


def _check(
    task: ClassifierTask, loss: Loss, mixing: Mixing | None, conversion: Conversion | None, label_smoothing: float
) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
    if task == "multilabel" and (mixing is not None or loss != "cross_entropy"):
        raise ValueError("task 'multilabel' takes neither mixing nor another loss than its own.")
    if loss == "binary_cross_entropy" and conversion is not None and conversion.combine != "logits":
        raise ValueError("loss 'binary_cross_entropy' needs conversion.combine 'logits'.")


def _check_teacher(teacher: str | None, weight: float, temperature: float, conversion: Conversion | None) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"teacher_weight must be a finite number of at least 0, got {weight}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"teacher_temperature must be a finite number above 0, got {temperature}.")
    if teacher is not None and not weight:
        raise ValueError(f"teacher_weight is 0, so the teacher {teacher} would be ignored: leave one of the two out.")
    if teacher is None and weight and conversion is None:
        raise ValueError("teacher_weight needs teacher, the folder of a finished run: a base does not teach itself.")


def _with_heads(network: EnsembleNet, choice: Choice) -> EnsembleNet:
    """The network with its heads run as was chosen."""
    if choice.heads in ("looped", "checkpointed"):
        network = unfuse(network)
        network.checkpoint_activations = choice.heads == "checkpointed"
        return network
    fused = fuse(network)
    fused.separate(choice.separate, training=True)
    if choice.heads == "compiled":
        fused.compile()
    return fused


def seen_outputs(network: nn.Module, x: Tree, ndim: int, task: ClassifierTask = "multiclass") -> Tensor:
    """The logits of every head, also where a batch holds several views of each example.

    Each head's probabilities are averaged over the views, as is usual for videos (Simonyan and Zisserman 2014, arXiv
    1406.2199); for labels of their own, its logits.

    Args:
        network: a base or a multi-headed model.
        x: inputs, (N, *), or V views of each, (N, V, *); several tensors are always one view.
        ndim: dimensions of a batch without views.
        task: what the outputs mean.

    Returns:
        (K, N, C).

    Example:
        >>> views = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])  # 1 example, 2 views
        >>> seen_outputs(nn.Identity(), views, ndim=2).softmax(-1)
        tensor([[[0.3096, 0.6904]]])
    """
    if not isinstance(x, Tensor) or x.ndim == ndim:
        return head_outputs(network, x)
    outputs = torch.stack([head_outputs(network, view) for view in x.unbind(1)]).float()
    if task == "multilabel":
        return outputs.mean(0)
    return outputs.log_softmax(-1).logsumexp(0) - math.log(len(outputs))
