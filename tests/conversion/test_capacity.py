"""Spare capacity: measured as the plain losses say, and said by `convert` and `info`; plans that keep a least width."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet import BudgetError, Capacity, ConversionError, convert, plans, spare_capacity
from ensemblenet.cli.main import main
from ensemblenet.data import MNIST1D
from ensemblenet.models import MNIST1DNet
from ensemblenet.storage.restore import restore
from ensemblenet.training.fit import fit

X = torch.randn(2, 40)


def batches(seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def test_it_is_the_mean_over_examples_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).train()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    train, validation = batches(0, 5, 3), batches(1, 4)
    found = spare_capacity(base, train, validation)
    assert base.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    base.eval()
    every_x, every_y = (torch.cat(parts) for parts in zip(*train, strict=True))
    assert found.train_loss == pytest.approx(F.cross_entropy(base(every_x), every_y).item())
    assert found.validation_loss == pytest.approx(F.cross_entropy(base(validation[0][0]), validation[0][1]).item())
    assert found.ratio == pytest.approx(found.train_loss / found.validation_loss)


def test_labels_that_do_not_exclude_each_other() -> None:
    base, x, y = nn.Linear(6, 4), torch.randn(7, 6), torch.randint(2, (7, 4)).float()
    expected = F.binary_cross_entropy_with_logits(base(x), y, reduction="none").sum(1).mean().item()
    assert spare_capacity(base, [(x, y)], [(x, y)], "multilabel").train_loss == pytest.approx(expected)


def test_without_examples_it_is_an_error() -> None:
    with pytest.raises(ConversionError, match="none of one kind"):
        spare_capacity(nn.Linear(6, 4), batches(0, 3), [])


def test_a_network_trained_for_long_has_spare_capacity_and_one_that_was_not_has_none() -> None:
    data = MNIST1D(num_train=200, num_val=200)
    data.setup("fit")
    torch.manual_seed(0)
    base = MNIST1DNet(32)
    before = spare_capacity(base, data.train_dataloader(), data.val_dataloader())
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.01)
    for _ in range(30):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(base(x), y).backward()
            optimizer.step()
    after = spare_capacity(base, data.train_dataloader(), data.val_dataloader())
    assert not before.is_spare
    assert before.ratio == pytest.approx(1, rel=0.1)
    assert after.is_spare


def test_convert_says_when_it_is_likely_to_hurt() -> None:
    with pytest.warns(
        UserWarning, match="0.50 of its validation loss .0.4000 against 0.8000.*expect no gain in accuracy"
    ):
        none = convert(MNIST1DNet(16), X, capacity=Capacity(0.4, 0.8)).recipe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spare = convert(MNIST1DNet(16), X, capacity=Capacity(0.04, 0.8)).recipe
    assert none is not None
    assert spare is not None
    assert (spare.split_at, none.split_at) == ("conv1", "conv3")  # where the last stage begins


def test_info_says_it_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = {"num_train": 40, "num_val": 40, "num_test": 50, "batch_size": 20}
    options = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--runs", str(tmp_path)]
    options += [f"--data.init_args.{name}={value}" for name, value in init.items()]
    base = ["--model.base", "ensemblenet.models.MNIST1DNet", "--model.base.init_args.width=8", "--name", "tiny"]
    run = fit([*base, "--data", "ensemblenet.data.MNIST1D", *options])
    data = MNIST1D(**init)
    data.setup("fit")
    expected = spare_capacity(restore(run).network, data.train_dataloader(), data.val_dataloader())
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{expected.train_loss:.4f} against {expected.validation_loss:.4f}" in printed
    assert "no capacity to spare" in printed
    assert "conv2" in printed
    conversion = fit([*base, "--data", "ensemblenet.data.MNIST1D", "--model.conversion.num_heads=2", *options])
    capsys.readouterr()
    assert main(["info", str(conversion)]) == 2
    assert "give the run of one" in capsys.readouterr().err


def test_the_automatic_plan_keeps_a_least_width() -> None:
    widths = {plan.split.name: plan.width for plan in plans(MNIST1DNet(32), X, 3, 1.0)}
    assert widths["conv1"] < 0.5 <= widths["input"]
    chosen = [convert(MNIST1DNet(32), X, 3, min_width=width).recipe for width in (None, 0.5)]
    assert chosen[0].split_at == "conv1"
    assert chosen[1].split_at != "conv1"
    assert chosen[1].width == widths[chosen[1].split_at] >= 0.5


@pytest.mark.parametrize("split_at", ["auto", "conv3"])
def test_a_least_width_that_does_not_fit_is_an_error_that_says_what_does(split_at: str) -> None:
    with pytest.raises(BudgetError, match=r"keep 0.9 of their channels do not fit .* they could keep 0\.\d+ .at '"):
        convert(MNIST1DNet(32), X, 4, split_at=split_at, min_width=0.9)
    with pytest.raises(ConversionError, match="0 to 1, got 90"):
        convert(MNIST1DNet(32), X, min_width=90)
