"""How heads are chosen to run. No test here measures time: what was measured is given."""

import copy
from collections.abc import Mapping

import pytest
import torch
from networks import LongSkip
from torch import Tensor, nn

from ensemblenet import EnsembleNet, convert
from ensemblenet.cli.main import main
from ensemblenet.errors import FusionError
from ensemblenet.heads import FusedEnsembleNet, choice, choose, fuse, tune

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
    chosen, why = choose(unlike, IMAGES)
    assert chosen is unlike
    assert "heads 0 and 1 differ" in why.reason
    with pytest.raises(FusionError, match="heads 0 and 1 differ"):
        choose(unlike, IMAGES, "fused")


@pytest.mark.parametrize("training", [True, False])
def test_what_is_measured_under_autocast_is_a_real_step(
    slow: set, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Fusing looks at fake tensors; once their casts stayed in autocast's cache, and looped heads ran on them."""
    seen: list[Tensor] = []
    run = EnsembleNet._run_heads

    def kept(self: EnsembleNet, features: Tensor) -> Tensor:
        seen.append(run(self, features))
        return seen[-1]

    monkeypatch.setattr(EnsembleNet, "_run_heads", kept)
    with torch.autocast("cpu", torch.bfloat16):
        choose(model().train(training), IMAGES)
    assert {type(outputs) for outputs in seen} == {Tensor}
    assert {outputs.dtype for outputs in seen} == {torch.bfloat16}


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
