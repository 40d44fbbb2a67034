"""`fit` on image folders: resume after a kill, averaged weights, mixing, losses, errors in one line, full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import run_apart
from lightning.pytorch import Callback
from made_images import make_folders
from timm.loss import BinaryCrossEntropy
from torch import nn

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.data.image_sets import ImageSet
from ensemblenet.errors import TrainingError
from ensemblenet.heads import Choice, FusedEnsembleNet
from ensemblenet.models import create
from ensemblenet.storage.restore import restore
from ensemblenet.training.callbacks import time_left
from ensemblenet.training.checkpoints import AtomicCheckpointIO
from ensemblenet.training.fit import fit
from ensemblenet.training.mixing import Mixing, soft_targets
from ensemblenet.training.module import Classifier
from ensemblenet.training.optimization import Optimization, build_optimizer, layer_depths

OWN_CODE = """
import os
import signal
from pathlib import Path

from lightning.pytorch import Callback
from torch import nn


class KilledOnce(Callback):
    # in the second epoch of 4 batches; not again when the run goes on
    def on_train_batch_start(self, trainer, module, *rest):
        done = Path(__file__).with_name("was_killed")
        if trainer.global_step == 6 and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Small(nn.Module):
    def __init__(self, num_classes=3, dropout=0.0, norm=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))
"""


@pytest.fixture(autouse=True)
def own_code(tmp_path, monkeypatch, one_thread):
    (tmp_path / "own.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)


def make(folder, runs="runs", data=(), model=(), **settings):
    """Images, and the arguments of a run on them: 4 batches an epoch."""
    if not (folder / "images").exists():
        make_folders(folder / "images")
    settings = {
        "name": "tiny",
        "model": {
            "base": {"class_path": "own.Small", "init_args": {"dropout": 0.3}},
            "conversion": {"num_heads": 2, "budget": 1.0},
            "heads": "looped",
            **dict(model),
        },
        "data": {
            "class_path": "ensemblenet.data.ImageData",
            "init_args": {"image_size": 16, "batch_size": 6, "num_workers": 0, "folder": "nowhere", **dict(data)},
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
        **settings,
    }
    path = folder / f"{runs}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return ["--config", str(path), "--runs", str(folder / runs), "--data", str(folder / "images")]


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def logged(folder, column):
    lines = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index(column)
    return [float(line.split(",")[place]) for line in lines[1:] if line.split(",")[place]]


def test_a_run_killed_within_an_epoch_goes_on_to_the_same_weights(tmp_path):
    options = ["--model.mixing", "{mixup: 0.2, cutmix: 1.0}", "--ema", "0.9", "--trainer.max_epochs", "3"]
    whole = fit([*make(tmp_path, data={"num_workers": 2}), *options])

    arguments = [*make(tmp_path, "killed", data={"num_workers": 2}), *options, "--checkpoint_steps", "1"]
    killed = run_apart(tmp_path / "printed", main, ["fit", *arguments, "--trainer.callbacks", "own.KilledOnce"])
    assert killed.code == -signal.SIGKILL, killed.stderr
    [folder] = (tmp_path / "killed").iterdir()
    state = checkpoint(folder)
    assert state["global_step"] == 6
    assert state["ImageData"]["consumed"] == 2

    assert fit([*make(tmp_path, "killed", data={"num_workers": 0}), *options, "--resume", "auto"]) == folder
    ends = checkpoint(whole), checkpoint(folder)
    assert ends[0]["global_step"] == ends[1]["global_step"] == 12
    for kind in ("state_dict", "current_model_state"):
        for name, tensor in ends[0][kind].items():
            assert torch.equal(tensor, ends[1][kind][name]), name
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (whole, folder)]
    assert rows[0] == rows[1]


class Remember(Callback):
    """The weights after each step."""

    seen: list

    def __init__(self):
        type(self).seen = []

    def on_train_batch_end(self, trainer, module, *rest):
        self.seen.append({name: tensor.clone() for name, tensor in module.network.state_dict().items()})


def test_averaged_weights_are_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemblenet.training.settings.LearningRateMonitor", lambda _: Remember())
    folder = fit([*make(tmp_path), "--ema", "0.6"])
    average = dict(Remember.seen[0])
    for step, weights in enumerate(Remember.seen[1:], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in weights.items():
            average[name] = decay * average[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    stored = restore(folder, trust=True).network.state_dict()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, average[name])
    assert any(not torch.equal(tensor, Remember.seen[-1][name]) for name, tensor in stored.items())
    assert len(Remember.seen) == 8


def trained(tmp_path, runs, *more, **options):
    folder = fit([*make(tmp_path, runs, **options), *more])
    return restore(folder, trust=True).network.state_dict(), folder


PLAIN = {"base": {"class_path": "own.Small", "init_args": {"dropout": 0.0, "norm": False}}}


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    large, folder = trained(tmp_path, "large", data={"batch_size": 12}, model=PLAIN)
    small, other = trained(tmp_path, "small", "--trainer.accumulate_grad_batches", "2", model=PLAIN)
    for name, tensor in large.items():
        torch.testing.assert_close(tensor, small[name], rtol=1e-4, atol=1e-5)
    assert checkpoint(folder)["global_step"] == checkpoint(other)["global_step"] == 4


def test_channels_last_trains_to_the_same_weights(tmp_path):
    plain, _ = trained(tmp_path, "plain", model=PLAIN)
    last, _ = trained(tmp_path, "last", "--model.channels_last", "true", model=PLAIN)
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, last[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_options_of_the_trainer(tmp_path, name):
    more = ["--trainer.gradient_clip_val", "0.1", "--trainer.precision", "bf16-mixed", "--model.optimization.optimizer"]
    _, folder = trained(tmp_path, "runs", *more, name, "--trainer.max_epochs", "1")
    [optimizer] = checkpoint(folder)["optimizer_states"]
    assert ("exp_avg_sq" in optimizer["state"][0]) == (name != "sgd")
    assert min(logged(folder, "speed/examples_per_second")) > 0
    assert 0.01 < logged(folder, "speed/memory_gb")[0] < 100


# -- losses and targets


def classifier(**options):
    module = Classifier(nn.Linear(4, 5), **options)
    module.num_classes = 5
    module.log = lambda *args, **kwargs: None
    return module


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_of_one_head_is_timms(smoothing):
    module = classifier(loss="binary_cross_entropy", label_smoothing=smoothing)
    x, y = torch.randn(7, 4), torch.randint(5, (7,))
    expected = BinaryCrossEntropy(smoothing=0.0)(module.network(x), soft_targets(y, 5, smoothing))
    torch.testing.assert_close(module.training_step((x, y), 0), expected)
    if smoothing == 0:
        torch.testing.assert_close(expected, BinaryCrossEntropy(smoothing=0.0)(module.network(x), y))


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_the_loss_of_mixed_images_is_the_mix_of_losses(options):
    module = classifier(mixing=Mixing(**options), label_smoothing=0.1)
    module.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    module.mix = module.mixing.mixer(5)
    torch.manual_seed(0)
    x, y = torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
    mixed, shares = module.mixing.mixer(5)(x.clone(), y)
    first = shares.gather(1, y[:, None]).squeeze(1)
    other = y.flip(0)
    share = first[y != other][0]  # one share for the whole batch
    assert torch.equal(shares.sum(1), torch.ones(6)) or shares.sum(1).allclose(torch.ones(6))
    z = module.network(mixed)
    losses = [nn.functional.cross_entropy(z, target, label_smoothing=0.1, reduction="none") for target in (y, other)]
    expected = (share * losses[0] + (1 - share) * losses[1]).mean()
    module.mix = lambda *_: (mixed, shares)
    torch.testing.assert_close(module.training_step((x, y), 0), expected)


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: Mixing(), "needs mixup or cutmix above 0"),
        (lambda: Mixing(mixup=1, switch=2), r"switch must be in \[0, 1\], got 2"),
        (lambda: classifier(task="multilabel", mixing=Mixing(mixup=1)), "takes neither mixing nor another loss"),
        (lambda: classifier(loss="binary_cross_entropy", conversion=conversion()), "needs conversion.combine 'logits'"),
        (lambda: Optimization("lam"), r"There is no optimizer 'lam'.* Did you mean .*lamb"),
        (lambda: Optimization("adamw", options={"a": 1}), "takes no options"),
        (lambda: Optimization(layer_decay=0), r"layer_decay must be in \(0, 1\]"),
        (lambda: build_optimizer(nn.Linear(2, 2), Optimization("lamb", options={"a": 1})), "lamb cannot be made with"),
    ],
)
def test_settings_that_make_no_sense(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


def conversion():
    from ensemblenet.training.module import Conversion

    return Conversion(combine="probabilities")


@pytest.mark.parametrize("converted", [False, True])
def test_lower_layers_learn_more_slowly(converted):
    base = create("test_vit", num_classes=3)
    depths = layer_depths(base, torch.randn(2, 3, 160, 160))
    network = ensemblenet.convert(base, torch.randn(2, 3, 160, 160), split_at="patch_embed") if converted else base
    optimizer = build_optimizer(network, Optimization(lr=1.0, layer_decay=0.5), depths)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    rate = {name: rates[parameter] for name, parameter in network.named_parameters()}
    first, last = ("trunk.", "heads.1.") if converted else ("", "")
    top = max(depths.values())
    assert rate[f"{first}patch_embed.proj.weight"] == 0.5**top
    assert rate[f"{last}blocks.0.norm1.weight"] == 0.5 ** (top - 1)
    assert rate[f"{last}head.weight"] == 1.0
    assert len(rates) == len(list(network.parameters()))


@pytest.mark.parametrize("heads", ["looped", "fused", "checkpointed"])
def test_a_resumed_run_goes_on_in_the_way_that_was_chosen(heads):
    network = ensemblenet.EnsembleNet(torch.nn.Linear(4, 4), [torch.nn.Linear(4, 3) for _ in range(2)])
    first, second = classifier(), classifier()
    first.network, first.choice = network, Choice(heads, "as asked")
    checkpoint = {}
    first.on_save_checkpoint(checkpoint)
    second.network = ensemblenet.fuse(network, torch.randn(2, 4))  # what this machine would have chosen
    second.on_load_checkpoint(checkpoint)
    assert isinstance(second.network, FusedEnsembleNet) == (heads == "fused")
    assert second.network.checkpoint_activations == (heads == "checkpointed")


@pytest.mark.parametrize("heads", ["auto", "looped", "fused", "compiled", "checkpointed"])
def test_synchronised_statistics_need_looped_heads(heads):
    module = classifier(heads=heads)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(_layer_sync=object()))
    if heads in ("auto", "looped"):
        assert module._allowed_heads() == "looped"
        return
    with pytest.raises(TrainingError, match=rf"trainer\.sync_batchnorm needs model\.heads looped, got {heads}"):
        module._allowed_heads()


def test_time_left():
    assert time_left(30.0, 30, 90) == "0:01:00"
    assert time_left(30.0, 90, 90) == "0:00:00"


# -- what users do wrong, and what goes wrong


def test_the_classes_of_data_and_network_must_be_as_many(tmp_path, capsys):
    assert main(["fit", *make(tmp_path), "--model.base.init_args.num_classes", "5"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "The data has 3 classes and the network 5 outputs: give the base num_classes=3, or where it was trained for "
        "others --num-classes 3, or the data as many classes as the network."
    )


def test_a_broken_image_ends_the_run_in_one_line(tmp_path, capsys):
    arguments = make(tmp_path, data={"num_workers": 1})
    (tmp_path / "images" / "train" / "owl" / "002.png").write_bytes(b"no image")
    assert main(["fit", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "owl/002.png cannot be decoded" in line
    folder = fit([*arguments, "--data.init_args.on_broken", "skip", "--trainer.max_epochs", "1"])
    assert (folder / "results.json").exists()


def fit_with_dying_workers(folder, arguments):
    """The workers that load data die once there is a checkpoint."""
    decode = ImageSet.image

    def image(self, index, at_least):
        if list(folder.glob("runs/*/checkpoints/last.ckpt")):
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, index, at_least)

    ImageSet.image = image
    return main(["fit", *arguments])


def test_a_worker_that_dies_ends_the_run(tmp_path):
    arguments = make(tmp_path, data={"num_workers": 2}, trainer={"max_epochs": 50, "accelerator": "cpu"})
    done = run_apart(tmp_path / "printed", fit_with_dying_workers, tmp_path, arguments)
    assert done.code == 2, done.stderr
    assert "A process that loads data died: DataLoader worker" in done.stderr


class FullDisk(AtomicCheckpointIO):
    """A disk that takes half of the second checkpoint."""

    saved = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        type(self).saved += 1
        if self.saved > 1:  # Python ignores the signal that goes with it
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) // 2, -1))
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("ensemblenet.training.settings.AtomicCheckpointIO", FullDisk)
    FullDisk.saved = 0
    arguments = make(tmp_path)
    try:
        with pytest.raises(TrainingError, match=r"checkpoint .*last\.ckpt cannot be written: ") as caught:
            fit(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    [folder] = (tmp_path / "runs").iterdir()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert checkpoint(folder)["global_step"] == 4
    assert caught.value.__notes__ == [f"Go on with `ensemblenet fit --resume {folder}`."]
    monkeypatch.syspath_prepend(tmp_path)
    assert fit([*arguments, "--resume", "auto"]) == folder
    whole = fit(make(tmp_path, "whole"))
    for name, tensor in checkpoint(whole)["state_dict"].items():
        assert torch.equal(tensor, checkpoint(folder)["state_dict"][name]), name


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_library(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    logger = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]

    def missing(*args, **kwargs):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(f"ensemblenet.training.loggers.{logger}", missing)
    with pytest.raises(TrainingError, match=rf"--log_to {name} needs its library: pip install {name}"):
        fit([*make(tmp_path), "--log_to", name])
