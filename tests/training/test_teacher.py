"""A trained network teaches a run: whose logits the loss gets, what is kept of it, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

import ensemblenet
from ensemblenet.cli.main import main
from ensemblenet.data import MNIST1D
from ensemblenet.errors import TrainingError
from ensemblenet.models import CifarResNet, MNIST1DNet
from ensemblenet.training import teacher as of_teacher
from ensemblenet.training.fit import fit
from ensemblenet.training.mixing import Mixing
from ensemblenet.training.module import Classifier, Conversion
from ensemblenet.training.teacher import Teacher

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = {"num_train": 100, "num_val": 20, "num_test": 50, "batch_size": 20}


def trained_base(network: nn.Module, x: Tensor) -> nn.Module:
    """A few large steps, so that it looks trained."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        network.train()(x).square().sum().backward()
        optimizer.step()
    return network


class Images(LightningDataModule):
    """Three batches of images, which do not say whether they repeat."""

    def __init__(self, task: str = "multiclass") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        labels = [torch.randint(3, (6,), generator=generator) for _ in range(3)]
        if task == "multilabel":
            labels = [torch.randint(-1, 2, (6, 3), generator=generator) for _ in range(3)]
        self.batches = [(torch.randn(6, 3, 8, 8, generator=generator), label) for label in labels]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)  # pyright: ignore

    val_dataloader = test_dataloader = train_dataloader


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


class Notes(Callback):
    """What network and loss get in training: inputs, targets, the teacher's logits of each batch."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.losses: list[tuple[Any, ...]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.network.register_forward_pre_hook(lambda network, args: self.inputs.append(args[0].clone()))
        pl_module.criterion.register_forward_pre_hook(lambda loss, args: self.losses.append(args))

    @property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(x, y, taught) for x, (_, y, taught) in zip(self.inputs, self.losses, strict=True)]


def noted(module: Classifier, data: LightningDataModule) -> list[tuple[Tensor, Tensor, Tensor]]:
    notes = Notes()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[notes],
    )  # fmt: skip
    trainer.fit(module, data)
    return notes.batches


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("multiclass", {}),
        ("multiclass", {"mixing": Mixing(mixup=0.5), "channels_last": True}),
        ("multiclass", {"loss": "binary_cross_entropy"}),
        ("multilabel", {}),
    ],
)
def test_the_loss_gets_what_the_base_makes_of_each_batch(task: Any, options: dict[str, Any]) -> None:
    data = Images(task)
    base = trained_base(image_net(), data.batches[0][0])
    before = copy.deepcopy(base.state_dict())
    twin = copy.deepcopy(base).eval()
    teaching = {"teacher_weight": 1.0, "teacher_temperature": 2.0}
    module = Classifier(base, Conversion(init="inherit"), task=task, heads="looped", **teaching, **options)
    batches = noted(module, data)
    assert len(batches) == 6
    for x, y, taught in batches:
        expected = twin(x)
        if task == "multilabel":  # an unknown label is one that nobody has
            unknown = taught == -100
            assert 0 < unknown.sum() < unknown.numel()
            expected = expected.masked_fill(unknown, -100.0)
            assert not y[unknown].any()
        torch.testing.assert_close(taught, expected)
    if "mixing" in options:
        assert not any(torch.equal(batches[0][0], x) for x, _ in data.batches)
    assert module.criterion.temperature == 2.0

    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in twin.parameters())
    own = {f"network.{name}" for name in module.network.state_dict()}
    assert {name for name in module.state_dict() if not name.startswith("metrics.")} == own
    assert module.teacher is not None
    assert not module.teacher.network.training
    assert copy.deepcopy(module).teacher is module.teacher
    assert "It runs for every batch, as" in module.teacher.note


def write(folder: Path, **model: Any) -> list[str]:
    settings = {
        "name": "tiny",
        "model": {
            "base": {"class_path": "ensemblenet.models.MNIST1DNet", "init_args": {"width": 8}},
            "conversion": {"num_heads": 2, "budget": 1.0},
            "heads": "looped",
            **model,
        },
        "data": {"class_path": "ensemblenet.data.MNIST1D", "init_args": DATA},
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "tiny.yaml"), "--runs", str(folder / "runs")]


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return fit([*write(folder, conversion=None, optimization={"lr": 0.01}), "--trainer.max_epochs", "8"])


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one: Path, other: Path) -> None:
    for part in ("state_dict", "current_model_state"):
        first, second = (checkpoint(run)[part] for run in (one, other))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_a_run_with_a_stored_teacher_resumes_to_the_bit(
    tmp_path: Path,
    base_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    arguments = [*write(tmp_path, teacher=str(base_run), teacher_temperature=2.0), "--ema", "0.5"]
    whole = fit(arguments)
    out = capsys.readouterr().out
    assert f"The teacher is {base_run}. It ran once for each of 100 training examples" in out.replace("\n", " ")

    # what was stored is what the teacher gives for each batch
    monkeypatch.setattr(of_teacher, "_why_not_stored", lambda *given: "for this test")
    assert_same(whole, fit(arguments))
    monkeypatch.undo()

    step = Classifier.training_step

    def killed(self: Classifier, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 8:
            raise ConnectionError("killed")
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", killed)
    with pytest.raises(ConnectionError):
        fit([*arguments, "--name", "killed", "--checkpoint_steps", "2"])
    monkeypatch.undo()
    [folder] = (tmp_path / "runs").glob("killed-*")
    assert checkpoint(folder)["global_step"] == 8
    assert_same(whole, fit(["--resume", str(folder)]))

    # nothing of the teacher is kept, and nothing of it counts
    names = {name.removeprefix("network.") for name in checkpoint(whole)["state_dict"]}
    assert names == set(ensemblenet.load(whole / "model").state_dict())
    plain = fit([*write(tmp_path), "--trainer.max_epochs", "1", "--name", "plain"])
    rows = [json.loads((run / "results.json").read_text())["rows"][0] for run in (whole, plain)]
    assert all(rows[0][name] == rows[1][name] for name in ("parameters", "macs", "activations", "time"))


def test_a_batch_has_the_logits_of_its_own_examples(base_run: Path) -> None:
    data = MNIST1D(**DATA)
    module = Classifier(MNIST1DNet(width=8), Conversion(budget=1.0), heads="looped", teacher=str(base_run))
    batches = noted(module, data)
    assert module.teacher is not None
    assert module.teacher.is_stored
    assert not torch.equal(batches[0][0], batches[5][0])  # the second epoch has another order
    for x, _, taught in batches:
        torch.testing.assert_close(taught, module.teacher.logits(x))


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        ({"teacher_weight": 1.0}, [], "the base's weights look freshly drawn: give --teacher the folder"),
        ({"teacher_weight": -1.0}, [], "teacher_weight must be a finite number of at least 0, got -1.0"),
        ({"teacher": "RUN", "teacher_temperature": 0.0}, [], "teacher_temperature must be a finite number above 0"),
        ({"teacher": "RUN"}, ["--teacher-weight", "0"], "would be ignored: leave one of the two out"),
        ({"teacher_weight": 1.0, "conversion": None}, [], "a base does not teach itself"),
        ({}, ["--teacher", "nowhere"], "nowhere holds no saved model: there is no such folder"),
        ({}, ["--teacher", "SEVEN"], "gives outputs of shape (1, 7) and the network (1, 10)"),
        ({}, ["--teacher", "IMAGES"], "does not take inputs of shape (40,)"),
        ({}, ["--teacher", "LABELS"], "was trained for the task multilabel, and this run is multiclass"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(
    tmp_path: Path,
    base_run: Path,
    capsys: pytest.CaptureFixture[str],
    model: dict[str, Any],
    more: list[str],
    said: str,
) -> None:
    def saved(base: nn.Module, shape: tuple[int, ...], **options: Any) -> Path:
        ensemblenet.save(ensemblenet.convert(base, torch.zeros(2, *shape), budget=2.0, **options), tmp_path / "saved")
        return tmp_path / "saved"

    made = {
        "RUN": lambda: base_run,
        "SEVEN": lambda: saved(MNIST1DNet(width=8, num_classes=7), (40,)),
        "IMAGES": lambda: saved(CifarResNet(depth=8), (3, 8, 8)),
        "LABELS": lambda: saved(MNIST1DNet(width=8), (40,), task="multilabel"),
    }
    model = {name: str(made[value]()) if value == "RUN" else value for name, value in model.items()}
    more = [str(made[value]()) if value in made else value for value in more]
    capsys.readouterr()
    assert main(["fit", *write(tmp_path, **model), *more]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list((tmp_path / "runs").glob("*"))


def test_a_teacher_of_other_classes_is_named_in_python() -> None:
    with pytest.raises(TrainingError, match=r"does not take inputs of shape \(5,\): .*"):
        Teacher(nn.Linear(4, 3), "it").prepare(torch.zeros(1, 5), nn.Linear(5, 3), 3, False, lambda x: x, Trainer())
