"""A frozen trunk: heads are trained alone."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ensemblenet
from ensemblenet import EnsembleNet
from ensemblenet.errors import ConversionError
from ensemblenet.models import CifarResNet
from ensemblenet.training.module import plan_in_words

IMAGES = torch.randn(4, 3, 8, 8)


def _converted() -> EnsembleNet:
    torch.manual_seed(0)
    base = CifarResNet(depth=14, width=8, num_classes=3)
    return ensemblenet.convert(base, IMAGES, 2, 4.0, "stages.0", init="inherit", width=0.5, freeze="trunk").train()


def _state(part: nn.Module) -> dict[str, Tensor]:
    return {name: own.clone() for name, own in part.state_dict().items()}


def _steps(model: EnsembleNet, number: int = 3) -> None:
    optimizer = torch.optim.SGD([own for own in model.parameters() if own.requires_grad], 0.1)
    for _ in range(number):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


def test_training_leaves_the_trunk_and_changes_every_head() -> None:
    model = _converted()
    trunk, heads = _state(model.trunk), [_state(head) for head in model.heads]
    _steps(model.train())
    assert all(own.grad is None for own in model.trunk.parameters())
    assert all(torch.equal(own, trunk[name]) for name, own in model.trunk.state_dict().items())
    for head, before in zip(model.heads, heads, strict=True):
        assert not any(torch.equal(own, before[name]) for name, own in head.state_dict().items())


def test_heads_get_the_gradients_that_they_would_have_had() -> None:
    model = _converted()
    other = copy.deepcopy(model).freeze_trunk(False)
    other.train().trunk.eval()
    for one in (model, other):
        one(IMAGES).square().mean().backward()
    for own, expected in zip(model.heads.parameters(), other.heads.parameters(), strict=True):
        assert torch.equal(own.grad, expected.grad)  # pyright: ignore[reportArgumentType]
    assert any(own.grad is not None for own in other.trunk.parameters())


def test_every_way_to_a_model_keeps_it(tmp_path: Path) -> None:
    model = _converted()
    loaded = ensemblenet.load(ensemblenet.save(model, tmp_path / "model"))
    fused = ensemblenet.fuse(model)
    for one in (model, loaded, fused, ensemblenet.unfuse(fused), copy.deepcopy(model), model.first(1)):
        one.train()
        assert one.training
        assert not any(layer.training for layer in one.trunk.modules())
        assert all(layer.training for layer in one.heads.modules())
        assert not any(own.requires_grad for own in one.trunk.parameters())
    single = model.head(0).train()
    assert single.head.training
    assert not any(layer.training for layer in model.trunk.modules())
    assert model.freeze_trunk(False).head(0).trunk.training


def test_a_trunk_that_learns_again_is_stored_so(tmp_path: Path) -> None:
    model = _converted().freeze_trunk(False)
    loaded = ensemblenet.load(ensemblenet.save(model, tmp_path / "model")).train()
    for one in (model, loaded):
        assert one.trunk.training
        assert all(own.requires_grad for own in one.parameters())


def test_a_step_saves_the_trunks_share_of_the_backward_pass() -> None:
    model = _converted()
    macs: list[int] = []
    for frozen in (True, False):
        model.freeze_trunk(frozen)
        outputs = model(IMAGES)
        with FlopCounterMode(display=False) as counter:
            outputs.square().mean().backward()
        macs.append(counter.get_total_flops() // 2)
    assert model.trunk_cost is not None
    assert model.cost is not None
    # the first layer of what is trained needs no gradient of its input, on either side
    assert 1 - macs[0] / macs[1] == pytest.approx(model.trunk_cost.macs / model.cost.macs, abs=0.05)
    said = plan_in_words(model.freeze_trunk())
    told = re.search(r"saves about (\d+)% of the backward pass's MACs", said)
    assert told is not None
    assert int(told[1]) == pytest.approx(100 * (1 - macs[0] / macs[1]), abs=5.5)
    trained = sum(own.numel() for own in model.heads.parameters())
    assert f"{trained:,} of {sum(own.numel() for own in model.parameters()):,} parameters are trained" in said


def test_what_cannot_be_frozen_is_refused_in_one_line() -> None:
    base = CifarResNet(depth=14, width=8, num_classes=3)
    for options, said in (
        ({"freeze": "heads"}, "freeze must be .trunk. or None, got 'heads'"),
        ({"freeze": "trunk"}, 'pass init="inherit" too'),
        ({"freeze": "trunk", "init": "inherit", "split_at": "input"}, "the split is at 'input': name a later"),
    ):
        with pytest.raises(ConversionError, match=said) as caught:
            ensemblenet.convert(base, IMAGES, **options)  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no parameters to freeze"):
        EnsembleNet(nn.Flatten(), [nn.Linear(192, 3)]).freeze_trunk()
