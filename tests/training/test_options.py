"""No option of `fit` is taken and then ignored, and none leaves the network untrained in silence."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import weights
from torch import nn

from ensemblenet.cli.main import main
from ensemblenet.errors import TrainingError
from ensemblenet.training.fit import fit
from ensemblenet.training.optimization import check_optimizers

OWN_CODE = """
import copy

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ensemblenet.data import MNIST1D
from ensemblenet.models import MNIST1DNet


class Stop(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise InterruptedError("killed")


class NewWeights(Callback):
    def __init__(self, hook: str):
        setattr(self, hook, self.replace)

    def replace(self, trainer, module, *rest):
        if trainer.optimizers:
            module.network = copy.deepcopy(module.network)


class LateNewWeights(NewWeights):
    def __init__(self):
        pass

    def on_train_batch_start(self, trainer, module, *rest):
        if trainer.current_epoch == trainer.max_epochs - 1:
            self.replace(trainer, module)


class NewOptimizer(Callback):
    def on_train_start(self, trainer, module):
        trainer.optimizers = [SGD(module.parameters())]


class NewSchedule(Callback):
    def on_train_start(self, trainer, module):
        trainer.lr_scheduler_configs[0].scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizers[0])


class NewGroup(Callback):
    def setup(self, trainer, module, stage):
        module.network.heads[0].classifier.requires_grad_(False)

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            unfrozen = module.network.heads[0].classifier.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": list(unfrozen.parameters())})


class Unfreezes(NewGroup):
    def on_train_epoch_start(self, trainer, module):
        module.network.heads[0].classifier.requires_grad_(True)


class FreezesTrunk(Callback):
    def setup(self, trainer, module, stage):
        module.network.trunk.requires_grad_(False)


class OnDevice(Callback):
    def __init__(self, device: torch.device = torch.device("cpu")):
        assert isinstance(device, torch.device)

    def on_train_start(self, trainer, module):
        pass


class Finetuning(BaseFinetuning):
    pass


class Frozen(MNIST1DNet):
    def __init__(self):
        super().__init__(width=8)
        self.requires_grad_(False)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(40), 0


class Plain(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(60, 40), torch.arange(60) % 10), 20)

    val_dataloader = test_dataloader = train_dataloader


class Stream(MNIST1D):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=20)


def nothing(*rest):
    pass


def examples(batch):
    return len(batch[0])
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a tiny run in a folder that also holds the user's own module; run folders go to `runs` in it."""
    (tmp_path / "own.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {
        "name": "tiny",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": {"num_heads": 2, "split_at": "conv1"},
            "heads": "looped",
        },
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"num_train": 60, "num_val": 20, "num_test": 50, "batch_size": 20},
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", "tiny.yaml"]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `fit` ends with."""
    capsys.readouterr()
    assert main(["fit", *arguments]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Warning: ")]
    return line


def no_run_began() -> bool:
    return not Path("runs").exists()


@pytest.mark.parametrize(
    ("more", "instead"),
    [
        (["--optimizer", "Adam"], "use --model.optimization.optimizer adam."),
        (["--optimizer=torch.optim.SGD", "--optimizer.lr", "0.1"], "optimizer sgd --model.optimization.lr 0.1."),
        (["--optimizer.init_args.weight_decay=0.2"], "use --model.optimization.weight_decay 0.2."),
        (["--optimizer", "Lamb", "--optimizer.eps", "1"], "lamb --model.optimization.options '{\"eps\": 1}'."),
        (["--optimizer", "LBFGS"], "There is no optimizer 'lbfgs'"),
        (["--optimizer.x", "["], "`optimizer` is no setting of fit"),
        (["--optim", "Adam"], "There is no setting optim. Did you mean optimizer?"),
        (["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "3"], "use --model.optimization.lr LR --model."),
        (["--lr_scheduler=OneCycleLR", "--lr_scheduler.pct_start=0.3"], "use --model.optimization.warmup 0.3."),
    ],
)
def test_an_optimizer_of_lightnings_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], more: list[str], instead: str
) -> None:
    assert instead in refusal([*arguments, *more], capsys)
    assert no_run_began()


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("optimizer: Adam", "use --model.optimization.optimizer adam."),
        (
            "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1, betas: [0.8, 0.9]}}",
            "use --model.optimization.optimizer adamw --model.optimization.lr 0.1.",
        ),
        ("lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}", "warmup SHARE"),
    ],
)
def test_so_it_is_in_a_file(arguments: list[str], capsys: pytest.CaptureFixture[str], text: str, instead: str) -> None:
    Path("more.yaml").write_text(text)
    assert instead in refusal([*arguments, "--config", "more.yaml"], capsys)
    assert no_run_began()


def test_help_does_not_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    printed = capsys.readouterr().out
    assert "--model.optimization.optimizer" in printed
    assert "--optimizer" not in printed
    assert "--lr_scheduler" not in printed


def test_runs_whose_configuration_leaves_them_out_go_on(arguments: list[str]) -> None:
    folder = fit([*arguments, "--trainer.max_epochs", "1"])
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert "optimizer" not in stored
    (folder / "config.yaml").write_text(yaml.safe_dump(stored | {"optimizer": None, "lr_scheduler": None}))
    (folder / "results.json").unlink()

    assert fit(["--resume", str(folder), "--trainer.max_epochs", "2"]) == folder
    assert main(["test", str(folder)]) == 0


def test_every_trainable_parameter_is_in_an_optimizer_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    tied = Tied()
    extra = nn.Parameter(torch.zeros(7))
    check_optimizers(tied, [sgd(*tied.parameters())])
    check_optimizers(tied, [sgd(*tied.first.parameters()), sgd(tied.second.bias)])
    check_optimizers(tied, [sgd(*tied.parameters(), extra)], [extra])
    doubled = sgd(tied.first.weight, tied.first.bias)
    doubled.param_groups.append({"params": [tied.second.bias, tied.first.bias]})
    for optimizers, message in (
        ([], "first.weight is trainable, but in no optimizer"),
        ([sgd(*tied.first.parameters())], "second.bias is trainable, but in no optimizer"),
        ([sgd(*Tied().parameters())], "first.weight is trainable, but in no optimizer"),
        ([sgd(*tied.parameters()), sgd(tied.first.bias)], "first.bias is in the optimizers 2 times"),
        ([doubled], "first.bias is in the optimizers 2 times"),
        ([sgd(*tied.parameters(), extra)], r"holds a parameter \(7,\) that is not the network's"),
    ):
        with pytest.raises(TrainingError, match=message):
            check_optimizers(tied, optimizers)
    tied.second.bias.requires_grad_(False)
    check_optimizers(tied, [sgd(*tied.first.parameters())])


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (["own.NewWeights", "on_fit_start"], "trunk.conv1.0.weight is trainable, but in no optimizer"),
        (["own.NewWeights", "on_train_epoch_start"], "trunk.conv1.0.weight is trainable, but in no optimizer"),
        (["own.LateNewWeights"], "trunk.conv1.0.weight is trainable, but in no optimizer"),
        (["own.NewOptimizer"], "use --model.optimization"),
        (["own.NewSchedule"], "use --model.optimization"),
        (["own.NewGroup"], "use --model.optimization"),
        (["own.Unfreezes"], "heads.0.classifier.weight is trainable, but in no optimizer"),
    ],
)
def test_what_would_stay_untrained_stops_the_run(
    arguments: list[str], capsys: pytest.CaptureFixture[str], callback: list[str], message: str
) -> None:
    hook = [f"--trainer.callbacks.hook={name}" for name in callback[1:]]
    assert message in refusal([*arguments, "--trainer.callbacks+", callback[0], *hook], capsys)


def test_callbacks_are_set_up_with_the_converted_network(arguments: list[str]) -> None:
    before = weights(fit([*arguments, "--trainer.max_epochs", "1"]))
    folder = fit([*arguments, "--trainer.callbacks+", "own.FreezesTrunk"])
    untrained = weights(fit([*arguments, "--trainer.max_epochs", "1", "--trainer.callbacks+", "own.FreezesTrunk"]))
    name = "network.trunk.conv1.0.weight"
    assert torch.equal(weights(folder)[name], untrained[name])
    assert not torch.equal(weights(folder)[name], before[name])
    name = "network.heads.0.conv2.0.weight"
    assert not torch.equal(weights(folder)[name], untrained[name])


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (["StochasticWeightAveraging", "swa_lrs=0.1"], "use --ema 0.999"),
        (["WeightAveraging"], "use --ema 0.999"),
        (["EMAWeightAveraging"], "use --ema 0.999"),
        (["BatchSizeFinder"], "use --data.init_args.batch_size"),
        (["LearningRateFinder"], "use --model.optimization.lr"),
        (["GradientAccumulationScheduler", "scheduling={0: 2}"], "use --trainer.accumulate_grad_batches"),
        (["BackboneFinetuning"], "--model.optimization.layer_decay"),
        (["own.Finetuning"], "--model.optimization.layer_decay"),
        (["ModelPruning", "pruning_fn=l1_unstructured"], "prune the trained model"),
        (["OnExceptionCheckpoint", "dirpath=kept"], "use --checkpoint_steps"),
        (["SpikeDetection"], "cannot be resumed"),
        (["BasePredictionWriter"], "use `ensemblenet predict`"),
        (["Callback"], "nothing to do in training or testing"),
        (["Checkpoint"], "nothing to do in training or testing"),
        (["LambdaCallback"], "nothing to do in training or testing"),
        (["ThroughputMonitor"], "arguments are required: batch_size_fn"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_callbacks_that_a_run_cannot_honour(
    arguments: list[str], capsys: pytest.CaptureFixture[str], callback: list[str], instead: str
) -> None:
    name, *options = callback
    given = [f"--trainer.callbacks.{option}" for option in options]
    assert instead in refusal([*arguments, "--trainer.callbacks+", name, *given], capsys)
    assert no_run_began()


WORKING = """
trainer:
  enable_progress_bar: true
  reload_dataloaders_every_n_epochs: 1
  profiler: simple
  callbacks:
    - class_path: own.OnDevice
    - class_path: ModelCheckpoint
    - class_path: ModelCheckpoint
      init_args: {monitor: val/accuracy, mode: max, save_top_k: 2}
    - class_path: EarlyStopping
      init_args: {monitor: val/accuracy, mode: max, patience: 9}
    - class_path: TQDMProgressBar
    - class_path: Timer
      init_args: {duration: "01:00:00:00"}
    - class_path: DeviceStatsMonitor
      init_args: {cpu_stats: true}
    - class_path: LearningRateMonitor
    - class_path: ModelSummary
    - class_path: ThroughputMonitor
      init_args: {batch_size_fn: own.examples}
    - class_path: LambdaCallback
      init_args: {on_train_batch_end: own.nothing}
"""


def test_the_others_change_nothing_and_resume(arguments: list[str], caplog: pytest.LogCaptureFixture) -> None:
    alone = fit(arguments)
    Path("more.yaml").write_text(WORKING)
    logging.getLogger("lightning.pytorch.callbacks.model_summary").addHandler(caplog.handler)
    with pytest.raises(InterruptedError):
        fit([*arguments, "--config", "more.yaml", "--name", "killed", "--trainer.callbacks+", "own.Stop"])
    assert "Trainable params" in caplog.text
    [folder] = Path("runs").glob("killed*")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["trainer"]["callbacks"].pop()["class_path"] == "own.Stop"
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    fit(["--resume", str(folder), "--trust"])

    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    assert "run_training_epoch" in (folder / "fit-profile.txt").read_text()


def test_a_score_is_watched_by_its_old_name(arguments: list[str]) -> None:
    given = ["--trainer.callbacks.monitor", "val/agreement", "--trainer.callbacks.filename", "{val/agreement:.3f}"]
    with pytest.warns(DeprecationWarning, match="monitor val/agreement is now val/divergence"):
        folder = fit([*arguments, "--trainer.callbacks+", "ModelCheckpoint", *given])
    [best] = [path for path in folder.rglob("*.ckpt") if path.stem not in ("last", "previous")]
    assert float(re.findall(r"divergence=([\d.]+)\.ckpt", str(best))[0]) > 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("trainer.limit_train_batches", "0", "use --trainer.max_epochs 0"),
        ("trainer.limit_test_batches", "0", "a run ends with its test"),
        ("trainer.limit_predict_batches", "3", "use `ensemblenet predict`"),
        ("trainer.val_check_interval", "0", "use --trainer.limit_val_batches 0"),
        ("trainer.val_check_interval", "50", "less than or equal to the number of the training batches (3)"),
        ("trainer.check_val_every_n_epoch", "0", "at least 1, got 0"),
        ("trainer.accumulate_grad_batches", "0", "at least 1, got 0"),
        ("trainer.gradient_clip_val", "-1", "at least 0, got -1"),
        ("trainer.gradient_clip_algorithm", "value", "give --trainer.gradient_clip_val too"),
        ("trainer.enable_checkpointing", "false", "A run keeps its last checkpoint"),
        ("trainer.logger", "false", "A run keeps its logs"),
        ("trainer.barebones", "true", "--trainer.profiler"),
        ("trainer.default_root_dir", "elsewhere", "use --runs"),
        ("trainer.model_registry", "name", "push_to_hub"),
        ("trainer.plugins", "AsyncCheckpointIO", "its checkpoints in its own way"),
        ("trainer.min_epochs", "9", "min_epochs 9 is more than trainer.max_epochs 2"),
        ("trainer.min_steps", "200", "min_steps 200 is more than the 6 steps of the run"),
        ("trainer.max_epochs", "-1", "needs a run with an end"),
        ("trainer.max_time", "00:00:00:00", "ended before its first step"),
        ("trainer.precision", "transformer-engine", "transformer_engine"),
        ("trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: nonsense}}", "`nonsense` which is not"),
        ("checkpoint_steps", "0", "checkpoint_steps must be at least 1"),
        ("model.base", "own.Frozen", "Every parameter of the base is frozen"),
        ("model.label_smoothing", "1", r"label_smoothing must be in [0, 1)"),
        ("model.task", "multilabel", "needs targets (N, C)"),
        ("model.channels_last", "true", "needs images (N, C, H, W)"),
        ("model.mixing", "{mixup: 0.2}", "needs images or videos"),
        ("model.optimization.optimizer", "adahessian", "needs second derivatives"),
        ("model.optimization", "{optimizer: lamb, options: {a: 1}}", "lamb cannot be made with {'a': 1}"),
        ("data", "own.Stream", "for data of unknown length --trainer.max_steps"),
    ],
)
def test_options_that_train_nothing_or_would_be_ignored(
    arguments: list[str], capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert message in refusal([*arguments, f"--{option}", value], capsys)


def test_max_time_and_a_timer_are_one_too_many(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    timer = ["--trainer.callbacks", "{class_path: Timer, init_args: {duration: '01:00:00:00'}}"]
    message = refusal([*arguments, *timer, "--trainer.max_time", "01:00:00:00"], capsys)
    assert "max_time would be ignored beside the callback Timer" in message


def test_an_untrained_network_where_it_is_asked_for(arguments: list[str]) -> None:
    folder = fit([*arguments, "--trainer.max_epochs", "0"])
    assert json.loads((folder / "results.json").read_text())["rows"]
    assert not (folder / "checkpoints").exists()


def test_checkpoints_within_an_epoch_need_data_that_can_go_on_there(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(Path("tiny.yaml").read_text()) | {"data": {"class_path": "own.Plain"}}
    Path("plain.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "plain.yaml", "--checkpoint_steps", "2"]) == 2
    assert "needs data that can go on in the middle of an epoch" in capsys.readouterr().err
    assert fit([*arguments, "--checkpoint_steps", "2"])


def test_a_trial_keeps_no_results(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit([*arguments, "--trainer.fast_dev_run", "2"])
    assert "A trial of 2 batch(es): it keeps no results." in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "data.json", "environment.json"}


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_whole_runs_in_another_precision(arguments: list[str], precision: str) -> None:
    folder = fit([*arguments, "--trainer.precision", precision, "--trainer.log_every_n_steps", "0"])
    assert json.loads((folder / "results.json").read_text())["rows"]
