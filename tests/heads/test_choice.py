"""How heads are chosen to run. No test here measures time: what was measured is given."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from networks import LongSkip
from torch import Tensor, fx, nn

from ensemblenet import EnsembleNet, convert
from ensemblenet.cli.main import main
from ensemblenet.errors import FusionError
from ensemblenet.heads import FusedEnsembleNet, choice, choose, fuse, tune
from ensemblenet.operations import FIRST, Operation, Program, Value, register

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def model(num_heads: int = 2) -> EnsembleNet:
    torch.manual_seed(0)
    return convert(LongSkip(), IMAGES, num_heads).train()


@pytest.fixture
def slow(monkeypatch) -> set:
    """Names of what is slow; everything else takes a second."""
    names: set = set()

    def measured(steps: Mapping, repeats: int = 5, at_least: float = 0.0) -> dict:
        for run in steps.values():
            run()
        return {name: 2.0 if name in names else 1.0 for name in steps}

    monkeypatch.setattr(choice, "measure", measured)
    return names


@pytest.mark.parametrize(("slower", "expected"), [("looped", "fused"), ("fused", "looped"), ("neither", "fused")])
def test_the_faster_one_is_taken(slow: set, slower: str, expected: str) -> None:
    slow.add(slower)
    network = model()
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(5)
    chosen, why = choose(network, IMAGES)
    assert torch.initial_seed() == 5
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert isinstance(chosen, FusedEnsembleNet) == (expected == "fused")
    assert why.heads == expected
    assert why.reason.startswith("a training step of 4 examples took 2000.0 ms" if slower == "fused" else "a training")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert chosen.heads[1] is network.heads[1]


def test_the_user_can_force_one(slow: set) -> None:
    for heads in ("looped", "fused"):
        slow.add(heads)
        chosen, why = choose(model(), IMAGES, heads)
        assert isinstance(chosen, FusedEnsembleNet) == (heads == "fused")
        assert (why.heads, why.reason) == (heads, "as asked")
    expected = "heads must be one of 'auto', 'looped', 'fused', 'compiled', 'checkpointed'; got 'fast'"
    with pytest.raises(FusionError, match=expected):
        choose(model(), IMAGES, "fast")  # type: ignore[arg-type]


def test_compiled_and_checkpointed_are_taken_only_when_asked_for(slow: set, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    chosen, why = choose(model(), IMAGES, "compiled")
    assert (compiled, why.heads, type(chosen)) == ([chosen], "compiled", FusedEnsembleNet)
    chosen, why = choose(fuse(model()), IMAGES, "checkpointed")
    assert (chosen.checkpoint_activations, why.heads, type(chosen)) == (True, "checkpointed", EnsembleNet)
    assert not choose(chosen, IMAGES, "looped")[0].checkpoint_activations


def test_one_head_and_unlike_heads_run_looped(slow: set) -> None:
    assert choose(model(1), IMAGES)[1].reason == "there is one head"
    unlike = EnsembleNet(nn.Flatten(), [nn.Linear(768, 3), nn.Linear(768, 3, bias=False)])
    with pytest.warns(UserWarning, match=r"The heads run looped\. .* heads 0 and 1 differ"):
        chosen, why = choose(unlike, IMAGES)
    assert chosen is unlike
    assert "heads 0 and 1 differ" in why.reason
    with pytest.raises(FusionError, match="heads 0 and 1 differ"):
        choose(unlike, IMAGES, "fused")


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_run_head_by_head_where_that_is_faster(slow: set, training: bool) -> None:
    network = model(3).train(training)
    fused = fuse(copy.deepcopy(network))
    assert tune(fused, IMAGES) == set()
    slow.add(False)  # grouped
    assert tune(fused, IMAGES) == set(fused.convolutions)
    assert fused.convolutions
    for layer in copy.deepcopy(fused).convolutions.values():
        assert layer.separate == {training: True, not training: False}
    network.load_state_dict(fused.state_dict())  # tuning ran training steps
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(fused(IMAGES), network(IMAGES))


def test_the_command_shows_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test_resnet", "--num-classes", "5", "--input-shape", "3,32,32", "--batch-size", "2", "--repeats", "1"]
    assert main(["benchmark", *arguments]) == 0
    shown = capsys.readouterr().out
    for part in ("base", "looped", "fused", "prediction of 1", "prediction of 2", "training step of 2", "1.00x"):
        assert part in shown


class Scaled(nn.Module):
    """A layer of a user's own, whose fused form has a fault."""

    fault = ""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class FaultyProduct(torch.autograd.Function):
    """The product, but for what is wrong with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, fault: str) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.fault = fault
        if fault == "forward":
            raise RuntimeError("the kernel is missing\nTraceback of no interest")
        return x * scale * {"outputs": 1.1, "infinite": torch.inf}.get(fault, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        if ctx.fault == "backward":
            raise RuntimeError("no gradient")
        factor = 2.0 if ctx.fault == "gradients" else 1.0
        return grads[0] * scale * factor, (grads[0] * x).sum(1, keepdim=True) * factor, None


def faulty_product(x: Tensor, scale: Tensor, fault: str) -> Tensor:
    return FaultyProduct.apply(x, scale, fault)


@register(Scaled)
class ScaledOperation(Operation):
    def fuse(self, program: Program, node: fx.Node) -> Value:
        if Scaled.fault == "building":
            raise KeyError("no rule")
        if Scaled.fault == "none":
            raise AssertionError
        scale = program.method("unsqueeze", program.parameter(node, "scale"), 1)
        return Value(program.call(faulty_product, program.first(node.args[0]), scale, Scaled.fault), FIRST)


FAULTS = {
    "building": "Fused heads fail: 'no rule'",
    "none": "Fused heads fail: AssertionError",
    "forward": "Fused heads fail: the kernel is missing",
    "backward": "Fused heads fail: no gradient",
    "outputs": "Fused heads differ from looped ones: their outputs by",
    "infinite": "Fused heads differ from looped ones: their outputs by",
    "gradients": "Fused heads differ from looped ones: their gradients by",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_looped_heads_are_taken_where_fused_ones_fail_in_whatever_way(
    fault: str, slow: set, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.add("looped")
    monkeypatch.setattr(Scaled, "fault", fault)
    torch.manual_seed(0)
    network = EnsembleNet(nn.Linear(6, 8), [nn.Sequential(Scaled(), nn.Linear(8, 3)) for _ in range(2)]).train()
    before, x = copy.deepcopy(network.state_dict()), torch.randn(4, 6)
    with pytest.warns(UserWarning, match=r"^The heads run looped\.") as warned:
        chosen, why = choose(network, x)
    assert len(warned) == 1
    assert type(chosen) is EnsembleNet
    assert (why.heads, why.reason[: len(FAULTS[fault])]) == ("looped", FAULTS[fault])
    assert str(warned[0].message) == f"The heads run looped. {why.reason}"
    assert "\n" not in why.reason
    assert all(torch.equal(tensor, before[name]) for name, tensor in chosen.state_dict().items())
    chosen(x).sum().backward()
    with pytest.raises(FusionError, match=re.escape(FAULTS[fault])):
        choose(network, x, "fused")


def test_faults_of_training_alone_do_not_keep_predictions_from_fused_heads(
    slow: set, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.add("looped")
    monkeypatch.setattr(Scaled, "fault", "backward")
    network = EnsembleNet(nn.Linear(6, 8), [nn.Sequential(Scaled(), nn.Linear(8, 3)) for _ in range(2)]).eval()
    assert choose(network, torch.randn(4, 6))[1].heads == "fused"


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8), nn.RReLU()], ids=lambda layer: str(layer))
def test_chance_and_statistics_are_no_faults(layer: nn.Module, slow: set) -> None:
    slow.add("looped")
    heads = [nn.Sequential(nn.Linear(8, 8), copy.deepcopy(layer), nn.Linear(8, 3)) for _ in range(2)]
    assert choose(EnsembleNet(nn.Linear(6, 8), heads).train(), torch.randn(4, 6))[1].heads == "fused"


def test_a_fault_of_the_model_itself_is_not_hidden(slow: set) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        choose(EnsembleNet(nn.Linear(6, 8), [nn.Linear(8, 3) for _ in range(2)]), torch.randn(4, 7))


def test_checkpointing_that_was_set_by_hand_stays_unless_another_way_is_asked_for() -> None:
    network = model()
    network.checkpoint_activations = True
    chosen, why = choose(network, IMAGES)
    assert chosen.checkpoint_activations
    assert (why.heads, why.reason) == ("checkpointed", "checkpoint_activations was set by hand")
    chosen, why = choose(network, IMAGES, "looped")
    assert not chosen.checkpoint_activations


def test_auto_checkpoints_where_a_training_step_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(choice, "step", lambda *_: too_much)
    chosen, why = choose(model(), IMAGES)
    assert chosen.checkpoint_activations
    assert why.reason == "a training step of 4 examples does not fit the memory without"
    for network, heads in ((model().eval(), "auto"), (model(), "fused")):
        with pytest.raises(torch.OutOfMemoryError):
            choose(network, IMAGES, heads)  # pyright: ignore[reportArgumentType]
