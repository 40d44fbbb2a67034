"""What docs/runs.md promises: exit codes, folders, what a resumed run may change, and what a failure leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import nn

import ensemblenet
from ensemblenet.cli import failures
from ensemblenet.cli.compare import _parser as study_parser
from ensemblenet.cli.main import main
from ensemblenet.cli.settings import check_settings
from ensemblenet.deploy.export import export
from ensemblenet.errors import TrainingError
from ensemblenet.storage.lock import sole_writer
from ensemblenet.training.checkpoints import AtomicCheckpointIO
from ensemblenet.training.settings import FitCLI

OWN = """
import os
import signal

import torch
from lightning.pytorch import Callback
from torch import nn

from ensemblenet.data import MNIST1D


class Signals(Callback):
    def __init__(self, name: str, step: int):
        self.number, self.step = getattr(signal, name), step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Fails(Callback):
    def __init__(self, step: int, kind: str = "ValueError", hook: str = ""):
        self.step, self.kind, self.hook = step, kind, hook

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if not self.hook and trainer.global_step == self.step:
            raise getattr(__builtins__, self.kind, None) or __builtins__[self.kind]("a bug")


class Statistics(nn.Module):
    # 4 steps an epoch
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(40, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        return self.layers(x)


class Huge(MNIST1D):
    def __init__(self, where: str = "train", value: float = 1e30, **more):
        self.where, self.value = where, value
        super().__init__(**more)

    def open_split(self, split):
        examples = super().open_split(split)
        if split == self.where:
            examples.inputs = examples.inputs.clone()  # others share them
            examples.inputs[-1] = self.value
        return examples


class DyingExamples:
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        os._exit(1)


class Dying(MNIST1D):
    def __init__(self, **more):
        super().__init__(**more)
        self.num_workers = 1

    def open_split(self, split):
        examples = super().open_split(split)
        return DyingExamples(examples) if split == "test" else examples
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {
        "name": "tiny",
        "seed_everything": 3,
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "optimization": {"optimizer": "sgd", "lr": 0.1, "warmup": 0.0},
        },
        "data": {
            "class_path": "ensemblenet.data.MNIST1D",
            "init_args": {"num_train": 80, "num_val": 20, "num_test": 20, "batch_size": 20},
        },
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "tiny.yaml"


def fit(*arguments: str) -> int:
    return main(["fit", "--config", "tiny.yaml", *arguments])


def resume(folder: Path, *arguments: str) -> int:
    return main(["fit", "--resume", str(folder), "--trust", *arguments])


def runs() -> list[Path]:
    return sorted(Path("runs").glob("*"))


def callback(kind: str, **arguments: Any) -> list[str]:
    return ["--trainer.callbacks", json.dumps([{"class_path": f"own.{kind}", "init_args": arguments}])]


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


# -- exit codes, and what a run that ends early leaves


@pytest.mark.parametrize(
    ("name", "status", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")], ids=["int", "term"]
)
def test_a_signal_ends_a_run_in_one_line_that_says_how_to_go_on(
    config: Path, capsys: pytest.CaptureFixture[str], name: str, status: int, word: str
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert fit(*callback("Signals", name=name, step=5)) == status
    [folder] = runs()
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert line == f"ensemblenet fit: {word}. Go on with `ensemblenet fit --resume {folder}`."
    assert signal.getsignal(signal.SIGINT) == handler
    assert resume(folder, "--trainer.callbacks", "null") == 0
    assert (folder / "results.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        callback("Signals", name="SIGINT", step=0),
        ["--trainer.devices", "0"],
        ["--model.base", "torch.nn.Identity"],
        ["--data.init_args.batch_size", "81"],
        ["--trainer.max_time", "00:00:00:00"],
        ["--name", "mine/../../other"],
        ["--name", ""],
    ],
    ids=["interrupted", "trainer", "network", "data", "time", "outside", "nameless"],
)
def test_a_run_that_never_began_leaves_no_folder(config: Path, arguments: list[str]) -> None:
    assert fit(*arguments) in (2, 130)
    assert runs() == []
    assert list(Path().glob("other*")) == []


def test_a_bug_keeps_its_traceback_and_the_run_what_it_has(config: Path) -> None:
    with pytest.raises(ValueError, match="a bug") as caught:
        fit(*callback("Fails", step=5))
    [folder] = runs()
    assert saved(folder)["global_step"] == 4
    assert caught.value.__notes__ == [f"Go on with `ensemblenet fit --resume {folder}`."]


def test_a_process_that_loads_test_data_and_dies_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--data.class_path", "own.Dying", "--trainer.max_epochs", "1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ensemblenet fit: A process that loads data died: DataLoader worker")
    assert line.endswith(f"Go on with `ensemblenet fit --resume {runs()[0]}`.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "x:y", "--output", "file"], "file exists; --output needs a new folder."),
        (["test", "runs/x", "--output", "file/scores.json"], "/file: Not a directory"),
        (["report", "runs/x", "--output", "file"], "file exists; --output needs a new file."),
        (["fit", "--config", "missing.yaml"], "missing.yaml: No such file"),
        (["fit", "--config", "tiny.yaml", "--runs", "file"], "/file: Not a directory"),
        (["fit", "tiny.yaml", "--data", "no/such"], "no/such: No such file"),
        (["fit"], "A configuration is needed: a YAML file, or a name in"),
        (["compare", "tiny.yaml", "tiny"], "There is neither an option nor a configuration tiny."),
        (["fit", "list.yaml"], "list.yaml must hold settings by name"),
        (
            ["fit", "tiny.yaml", "--trainer.max_epoch", "3"],
            "no setting trainer.max_epoch. Did you mean trainer.max_epochs?",
        ),
        (["fit", "tiny.yaml", "--lrr", "3"], "no setting lrr. Did you mean lr?"),
        (
            ["fit", "misspelt.yaml"],
            "misspelt.yaml: There is no setting model.optimisation. Did you mean model.optimization?",
        ),
        (["fit", "tiny.yaml", "--epochs", "many"], "trainer.max_epochs must be an integer, got 'many'."),
        (["fit", "endless.yaml"], "trainer.max_epochs must be an integer, got inf."),
        (["fit", "tiny.yaml", "--ema", "much"], "ema must be a number, got 'much'."),
        (["fit", "tiny.yaml", "--model.conversion.width", "9"], "width must be a share of the base's channels"),
        (["fit", "tiny.yaml", "--resume", "nowhere"], "nowhere has no config.yaml"),
        (
            ["fit", "tiny.yaml", "--data.init_args.num_trian", "3"],
            "data.init_args.num_trian: ensemblenet.data.MNIST1D takes no num_trian. Did you mean num_train?",
        ),
        (
            ["fit", "argument.yaml"],
            "argument.yaml: model.base.init_args.widht: ensemblenet.models.MNIST1DNet takes no widht. Did you mean",
        ),
        (["fit", "tiny.yaml", "--model.base", "ensemblenet.models.MNIST2DNet"], "Did you mean MNIST1DNet?"),
        (["fit", "network.yaml"], "timm has no model 'resnett50'. Did you mean resnet50,"),
        (["fit", "--resume", "begun", "--data.init_args.num_trian", "3"], "Did you mean num_train?"),
        (["compare", "compare/mnist1d", "--data.init_args.num_tets", "3"], "Did you mean num_test?"),
        (["info", "resnett50"], "timm has no model 'resnett50'. Did you mean resnet50,"),
        (
            ["info", "torchvision:resnett50"],
            "torchvision has no classification model 'resnett50'. Did you mean resnet50,",
        ),
        (["convert", "resnet50", "--output", "new", "--weights", "no.pth"], "no.pth: No such file"),
        (["compare", "--runs=file/runs"], "/file: Not a directory"),
        (["compare", "tiny.yaml", "--seed", "3"], "no setting seed. Did you mean seeds?"),
        (["compare", "tiny.yaml", "--budget", "95"], "did you mean 0.95?"),
        (["demo", "--runs", "file"], "/file: Not a directory"),
        (["info", "no/such"], "no/such holds no saved model: there is no such folder."),
        (["benchmark", "closed"], "closed holds no saved model: recipe.json is missing."),
        (["convert", "x:y", "--output", "new", "--init", "cloned"], "init must be one of"),
        (["convert", "x:y", "--output", "new", "--init", "inherit", "--calibrate", "no.yaml"], "no.yaml: No such file"),
        (["test", "closed"], "closed holds no saved model"),
        (["report", "nowhere"], "nowhere holds no saved model"),
        (["export", "unfinished", "--output", "x.onnx"], "unfinished has no trained model yet"),
        (["predict", "runs/x", "--output", "x.xls"], "must end in .csv or .parquet, got x.xls."),
        (["predict", "runs/x", "--output", "x.csv", "--data", "no.jpg"], "no.jpg: No such file"),
        (["predict", "runs/x", "--output", "closed/x.csv"], "/closed: Permission denied"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plain_mistakes_are_told_before_anything_slow_is_imported(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    Path("file").touch()
    Path("closed").mkdir()
    Path("unfinished").mkdir()
    Path("unfinished", "config.yaml").touch()
    Path("list.yaml").write_text("[1, 2]")
    Path("misspelt.yaml").write_text("model: {optimisation: {lr: 1}}")
    base = {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"widht": 3}}
    Path("argument.yaml").write_text(yaml.safe_dump({"model": {"base": base}}))
    network = {"base": {"class_path": "ensemblenet.models.create", "init_args": {"name": "resnett50"}}}
    Path("network.yaml").write_text(yaml.safe_dump({"model": network}))
    Path("endless.yaml").write_text("trainer: {max_epochs: .inf}")
    Path("begun").mkdir()
    Path("begun", "config.yaml").write_text(config.read_text())
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # also for an administrator
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_no_setting_that_there_is_is_refused_early(config: Path) -> None:
    with ExitStack() as held:
        parsers = {"fit": FitCLI(["--config", "tiny.yaml"], held).parser, "compare": study_parser()}
    for command, parser in parsers.items():
        keys = list(parser.get_defaults().keys())
        assert len(keys) > 20
        for key in keys:
            check_settings(command, [f"--{key}=null"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a"), "a: No space left on device; free some space."),
        (OSError(28, "No space left on device"), "No space left on device; free some space."),
        (OSError("stream closed"), "stream closed"),
        (RuntimeError("Found no NVIDIA driver on your system."), "The device cannot be used: Found no NVIDIA driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), "The device cannot be used: Torch not compiled"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "Memory ran out: CUDA out of memory. Use smaller"),
        (RuntimeError("[../gloo/tcp/pair.cc:545] Read error: Connection reset by peer"), "Another process of the run"),
        (RuntimeError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined."), "Another process of"),
        (MemoryError(), "Memory ran out. Use smaller batches"),
        (
            PermissionError("Caught PermissionError in DataLoader worker process 0.\nOriginal Traceback:\n  x\nP: no"),
            "P: no",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (AssertionError(), None),
        (ValueError("out of memory"), None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_bug_is_explained(error: Exception, said: str | None) -> None:
    status, line = failures.explain(error)
    assert (status, line) == (1, None) if said is None else (status, line and line[: len(said)]) == (2, said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["benchmark", "ensemblenet.models:MNIST1DNet"], ["fit", "tiny.yaml"]):
        assert main([*command, "--device", "cuda"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "The device cannot be used" in line
    assert runs() == []


@pytest.mark.parametrize("command", ["info resnet18", "fit tiny.yaml", "compare compare/mnist1d"])
def test_a_device_of_no_such_name_is_refused_at_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        assert main([*command.split(), "--device", "gpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--device: must be cpu, cuda, cuda:1 or mps, got 'gpu'" in line


# -- what may change in a resumed run


def test_a_lower_learning_rate_is_applied_and_the_first_settings_are_kept(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*callback("Signals", name="SIGINT", step=5)) == 130
    [folder] = runs()
    first = (folder / "config.yaml").read_text()
    command = json.loads((folder / "environment.json").read_text())
    more = [
        "--model.optimization.lr",
        "0.001",
        "--trainer.callbacks",
        "null",
        "--model.optimization.weight_decay",
        "0.1",
    ]
    assert resume(folder, *more) == 0
    assert "From now on model.optimization.lr is 0.001, and was 0.1." in capsys.readouterr().out
    [decayed, plain] = saved(folder)["optimizer_states"][0]["param_groups"]
    assert decayed["initial_lr"] == plain["initial_lr"] == 0.001
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    rates = [
        float(line.split(",")[place])
        for file in sorted(folder.glob("csv/*/metrics.csv"))
        for header, *lines in [file.read_text().splitlines()]
        for place in [header.split(",").index("lr-SGD/pg1")]
        for line in lines
        if line.split(",")[place]
    ]
    planned = [(0.1, 0.001)[step > 3] * 0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates[:4] == pytest.approx(planned[:4])
    assert rates[-8:] == pytest.approx(planned[4:])  # step 4 was taken twice

    assert (folder / "config-1.yaml").read_text() == first
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["optimization"]["lr"] == 0.001
    now = json.loads((folder / "environment.json").read_text())
    assert {name: now[name] for name in command} == command
    assert len(now["resumed"]) == 1


@pytest.mark.parametrize(
    "change",
    [
        ["--seed_everything", "4"],
        ["--data.init_args.num_train", "60"],
        ["--ema", "0.9"],
        ["--trainer.max_epochs", "2"],
        ["--model.conversion.num_heads", "3"],
        ["--model.optimization.optimizer", "adamw"],
        ["--model.optimization.weight_decay", "0"],
    ],
    ids=" ".join,
)
def test_other_changes_are_refused_in_one_line_and_write_nothing(
    config: Path, capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    folder = Path("runs/tiny")
    if not folder.exists():
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(config.read_text())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert resume(folder, *change) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ensemblenet fit: {folder} was made with {change[0][2:]} ")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_is_written_to_a_configuration_before_its_run_is_locked_counts_and_is_not_trusted(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--epochs", "1") == 0
    [folder] = runs()
    stored = (folder / "config.yaml").read_text()
    for written, said in (
        (stored.replace("seed_everything: 3", "seed_everything: 4"), "was made with seed_everything 4, not 3."),
        (stored.replace("ensemblenet.models.MNIST1DNet", "own.Statistics"), "--trust"),
    ):
        (folder / "config.yaml").write_text(stored)

        def locked(path: Path, text: str = written) -> AbstractContextManager[None]:
            (path / "config.yaml").write_text(text)
            return sole_writer(path)

        monkeypatch.setattr("ensemblenet.training.settings.sole_writer", locked)
        assert main(["fit", "--resume", str(folder), "--epochs", "2"]) == 2
        assert said in capsys.readouterr().err


def test_a_finished_run_goes_on_for_more_epochs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs", "1") == 0
    [folder] = runs()
    first = (folder / "results.json").read_text()
    assert resume(folder) == 2
    assert "is finished: it has results.json. To train it for longer" in capsys.readouterr().err
    assert resume(folder, "--trainer.max_epochs", "2") == 0
    assert saved(folder)["global_step"] == 8
    assert (folder / "results-1.json").read_text() == first
    assert (folder / "results.json").exists()
    assert yaml.safe_load((folder / "config-1.yaml").read_text())["trainer"]["max_epochs"] == 1


# -- checkpoints


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*callback("Signals", name="SIGINT", step=9)) == 130
    [folder] = runs()
    last, before = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    assert [saved(folder, path.stem)["global_step"] for path in (last, before)] == [8, 4]
    (folder / "checkpoints" / ".last.ckpt.4711").write_bytes(b"what a kill left")
    config_before = (folder / "config.yaml").read_text()

    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # a flipped bit
    last.write_bytes(damaged)
    whole = before.read_bytes()
    before.write_bytes(whole[:-100])
    assert resume(folder, "--trainer.callbacks", "null") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "last.ckpt is damaged (wrong checksum of" in line
    assert "previous.ckpt is damaged (File is not a zip file)" in line
    assert "weights_only" not in line
    assert (folder / "config.yaml").read_text() == config_before

    before.write_bytes(whole)
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged .* the run goes on from previous\.ckpt"):
        assert resume(folder, "--trainer.callbacks", "null") == 0
    assert "It goes on in epoch 2, after 4 steps." in capsys.readouterr().out
    assert last.with_suffix(".damaged").read_bytes() == damaged
    assert not list(folder.rglob(".last*"))


@pytest.mark.parametrize("steps", [[], ["--checkpoint_steps", "1"]], ids=["epoch", "steps"])
def test_infinite_statistics_end_a_run_and_are_not_kept(
    config: Path, capsys: pytest.CaptureFixture[str], steps: list[str]
) -> None:
    data = ["--data.class_path", "own.Huge", "--model.base", "own.Statistics"]
    assert fit(*data, *steps) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "The weights or statistics " in line
    assert "running_var became non-finite at step" in line
    for folder in runs():  # the first batch may have held it
        for file in folder.rglob("*.ckpt"):
            state = torch.load(file, weights_only=True)["state_dict"]
            assert all(value.isfinite().all() for name, value in state.items() if name != "network.mask")


@pytest.mark.parametrize("split", ["val", "test"])
def test_nan_in_evaluation_data_does_not_keep_a_run_from_its_end(config: Path, split: str) -> None:
    data = ["--data.class_path", "own.Huge", "--data.init_args.where", split, "--data.init_args.value", ".nan"]
    with pytest.warns(UserWarning, match=rf"{split}/nll.* are unknown: the outputs for 1 examples are not finite"):
        assert fit(*data, "--trainer.max_epochs", "1") == 0
    [row] = json.loads((runs()[0] / "results.json").read_text())["rows"]
    assert (row["test"]["nll"] is None) == (split == "test")
    assert 0 <= row["error_mean"] <= 100


# -- files


def test_a_full_disk_names_the_file(config: Path, capsys: pytest.CaptureFixture[str], small_files: None) -> None:
    net = ["ensemblenet.models:MNIST1DNet", "--output", "model"]
    assert main(["convert", *net]) == 2
    assert capsys.readouterr().err == (
        "ensemblenet convert: model: File too large; a file of that size may not be written there.\n"
    )
    assert not [path for path in Path().iterdir() if "model" in path.name]


@pytest.mark.parametrize("form", ["torch", "onnx", "safetensors"])
def test_an_export_to_a_full_disk_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_files: None, form: str
) -> None:
    torch.manual_seed(0)
    model = ensemblenet.convert(nn.Sequential(nn.Linear(8, 99), nn.ReLU(), nn.Linear(99, 99)), torch.ones(2, 8))
    path = tmp_path / {"torch": "x.pt2", "onnx": "x.onnx", "safetensors": "x"}[form]
    with pytest.raises(OSError, match="File too large") as caught:
        export(model, path, form)  # pyright: ignore[reportArgumentType]
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_the_thread_that_writes_tensorboards_logs_leaves_its_error_to_the_main_one(
    tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: said.append(str(failed.exc_value)))
    with failures.said_once():
        writer = EventFileWriter(str(tmp_path))
        before = threading.enumerate()
        events = [event_pb2.Event(file_version="x" * 1000)] * 1000
        with pytest.raises(OSError, match="File too large"):
            list(map(writer.add_event, events))
        other = threading.Thread(target=Path("nowhere").read_text)
        other.start()
        for thread in (other, *(one for one in before if type(one).__module__.startswith("tensorboard."))):
            thread.join()
    assert said == ["[Errno 2] No such file or directory: 'nowhere'"]


def test_a_checkpoint_on_a_full_disk_promises_what_there_is(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    for is_first in (True, False):
        with pytest.raises(
            TrainingError, match=r"last\.ckpt cannot be written: .*[Ss]ee that there is space"
        ) as caught:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(10_000)}, path)
        assert ("The last good one is kept" in str(caught.value)) != is_first
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(10)}, path)
    assert torch.load(path)["weights"].numel() == 10


def test_one_process_writes_a_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*callback("Signals", name="SIGINT", step=5)) == 130
    [folder] = runs()
    capsys.readouterr()
    with sole_writer(folder):
        assert resume(folder) == 2
    line = capsys.readouterr().err
    assert f"{folder} is being written by process {os.getpid()}" in line
    assert "Go on with" not in line


@pytest.mark.parametrize("heads", ["auto", "fused"])
def test_one_seed_gives_the_same_weights_where_nothing_is_measured(config: Path, heads: str) -> None:
    two = ["--model.conversion.num_heads", "2", "--model.heads", heads, "--trainer.deterministic", "true"]
    for _ in range(2):
        assert fit(*two, "--trainer.max_epochs", "1") == 0
    first, second = (saved(folder) for folder in runs())
    assert first["heads"] == second["heads"] == [{"auto": "looped"}.get(heads, heads)]
    [row] = json.loads((runs()[0] / "results.json").read_text())["rows"]
    assert row["heads"] == {"run": first["heads"][0], "separate": []}
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_a_resumed_run_keeps_how_each_convolution_runs(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["--model.conversion.num_heads", "2", "--model.heads", "fused"]
    measured = iter([{"conv3.0"}, set()])  # what a clock says the first and the second time
    monkeypatch.setattr("ensemblenet.heads.choice.tune", lambda *_: next(measured))
    assert fit(*two, *callback("Signals", name="SIGINT", step=5)) == 130
    [folder] = runs()
    assert saved(folder)["heads"] == ["fused", "conv3.0"]
    assert resume(folder, "--trainer.callbacks", "null") == 0
    assert saved(folder)["heads"] == ["fused", "conv3.0"]
