"""The LightningModule takes batches of several tensors, as pairs and as dictionaries with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from networks import Graph, Text, TwoAnswers, graph_batch, text_batch
from torch import nn

from ensemblenet import TrainingError
from ensemblenet.cli.main import main
from ensemblenet.conversion.capacity import spare_capacity
from ensemblenet.evaluation.scoring import score
from ensemblenet.inputs import Inputs
from ensemblenet.storage.restore import Restored
from ensemblenet.study.task import Setup, Source, codistilled
from ensemblenet.study.trials import train
from ensemblenet.training.mixing import Mixing
from ensemblenet.training.module import Classifier, Conversion
from ensemblenet.training.optimization import Optimization

pytestmark = pytest.mark.filterwarnings("ignore")


class Batches(LightningDataModule):
    """The same few batches in every split."""

    def __init__(self, kind: str = "dictionary", count: int = 3) -> None:
        super().__init__()
        if kind == "graph":
            self.batches: list[Any] = [(graph_batch(), torch.arange(10) % 3)] * count
        else:
            labels = torch.arange(6) % 3
            named = text_batch(6)
            self.batches = [{**named, "labels": labels} if kind == "dictionary" else (named, labels)] * count

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)  # pyright: ignore

    val_dataloader = test_dataloader = train_dataloader


def trained(module: Classifier, data: LightningDataModule, steps: int = 3) -> dict[str, float]:
    trainer = Trainer(
        max_epochs=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    [metrics] = trainer.test(module, data, verbose=False)
    return metrics


@pytest.mark.parametrize("kind", ["dictionary", "pair", "graph"])
@pytest.mark.parametrize("heads", ["looped", "fused"])
def test_several_inputs_are_learned(kind: str, heads: Any) -> None:
    torch.manual_seed(0)
    base = Graph() if kind == "graph" else Text()
    module = Classifier(base, Conversion(budget=1.5), heads=heads, optimization=Optimization(lr=0.01))
    metrics = trained(module, Batches(kind), steps=15)
    assert module.num_heads == 2
    assert metrics["test/accuracy"] == 1.0


def test_a_base_of_several_inputs_and_named_outputs_is_learned_too() -> None:
    torch.manual_seed(0)
    assert trained(Classifier(TwoAnswers(), optimization=Optimization(lr=0.01)), Batches(), 15)["test/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mixing": Mixing(mixup=0.2)},
            r"model.mixing needs images or videos; the data gives inputs \(6, 12\), ",
        ),
        ({"channels_last": True}, r"model.channels_last needs images \(N, C, H, W\); the data gives inputs \(6, 12\)"),
        (
            {"conversion": Conversion(budget=2.0, output=["logits", "aux"])},
            "The heads give 2 outputs, and this trains one",
        ),
    ],
)
def test_what_does_not_apply_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        trained(Classifier(TwoAnswers(), **options), Batches())
    assert "\n" not in str(caught.value)


def test_the_command_fit_refuses_several_inputs_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": {"base": {"class_path": "networks.Text"}, "conversion": {"budget": 1.5}},
        "data": {"class_path": f"{__name__}.Batches"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "`fit` trains networks of one tensor, and the data gives ids: int64 (N, 12); mask: int64 (N, 12)" in error


def test_several_inputs_are_scored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Classifier(Text(), Conversion(budget=1.5), heads="looped")
    metrics = trained(network, Batches(), steps=2)
    inputs = Inputs.of(text_batch())
    restored = Restored(network.network.eval(), "multiclass", inputs, {}, None, tmp_path)
    rows = score(restored, Batches(), "test")
    assert [row["method"] for row in rows] == ["ensemble", "head 0", "head 1"]
    assert rows[0]["accuracy"] == pytest.approx(metrics["test/accuracy"])
    with pytest.raises(Exception, match=r"The data has inputs of shape .*was trained on \(12,\), \(12,\)"):
        score(restored, Batches("graph"), "test")


def test_spare_capacity_and_studies_take_dictionaries() -> None:
    torch.manual_seed(0)
    data, source = Batches(), Source(Text, text_batch(6))
    loss = nn.functional.cross_entropy
    base, batch = Text().eval(), data.batches[0]
    expected = loss(base(batch["ids"], batch["mask"]), batch["labels"]).item()
    assert spare_capacity(base, data.batches, data.batches).train_loss == pytest.approx(expected)
    task = codistilled(source.convert(Setup(Conversion(budget=1.5))), 2.0, "multiclass")
    train(task, data, Optimization(lr=0.01), epochs=15, seed=0)
    outputs, prediction = task.eval()(ids=batch["ids"], mask=batch["mask"])
    assert outputs.shape == (2, 6, 3)
    assert (prediction.argmax(1) == batch["labels"]).all()
