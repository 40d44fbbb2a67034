"""The progress bar: epochs count from 1, and all of it stands on one line of a terminal."""

from __future__ import annotations

import io
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ensemblenet.training.callbacks import Progress, Speed, what_fits


class Logs(LightningModule):
    """Logs what the project's module logs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", 0 * loss + 1.25, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/accuracy", torch.tensor(0.986), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("width", [80, 45])
def test_a_line_fits_the_terminal_and_epochs_count_from_one(width: int) -> None:
    terminal = io.StringIO()
    bar = Progress(speed := Speed())
    bar._console_kwargs = {"file": terminal, "force_terminal": True, "width": width}
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=3, callbacks=[speed, bar], num_sanity_val_steps=0, **options)
    batches = DataLoader(TensorDataset(torch.ones(40, 2), torch.ones(40)), batch_size=1)
    trainer.fit(Logs(), batches, batches)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", written) if line.strip()]
    assert {line[:9] for line in lines if line.startswith("Epoch")} == {"Epoch 1/3", "Epoch 2/3", "Epoch 3/3"}
    assert all(len(line) <= width and re.match("Epoch|Validation", line) for line in lines)  # none goes on below
    last = [line for line in lines if line.startswith("Epoch")][-1]
    assert " 40/40 left: 0:00:00" in last
    if width == 80:
        assert re.search(r" loss: 1\.250 val error: 1\.40 ex/s: \d+", last)


@given(st.dictionaries(st.text("abc", max_size=9), st.text("123", max_size=9)), st.integers(-5, 80))
def test_what_fits_is_the_most_that_does(items: dict[str, str], room: int) -> None:
    def line(shown: dict[str, str]) -> str:
        return " ".join(f"{name}: {value}" for name, value in shown.items())

    shown = what_fits(items, room)
    names = list(items)
    assert list(shown) == names[: len(shown)]
    assert not shown or len(line(shown)) <= room
    if len(shown) < len(names):
        assert len(line({name: items[name] for name in names[: len(shown) + 1]})) > room
