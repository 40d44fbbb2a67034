"""Converted models in the hands of PyTorch's own tools."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from networks import ODD, LongSkip, TokenMixer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ensemblenet import CoDistillationLoss, EnsembleNet, convert
from ensemblenet.heads import fuse

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 2])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Every EnsembleNet shares one `forward`, of which the compiler keeps a limited number of versions a process."""
    torch.compiler.reset()


def mixer() -> EnsembleNet:
    torch.manual_seed(0)
    return convert(TokenMixer(), IMAGES, 3)


def gradients(model: nn.Module, network: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    CoDistillationLoss(weight=2.0)(network(IMAGES), LABELS).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", ["long skip", "token mixer", "volume", "1-d"])
def test_compiled_in_one_graph(name: str) -> None:
    factory, shape = ODD[name]
    x = torch.randn(4, *shape)
    torch.manual_seed(0)
    model = convert(factory(), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))
    labels = torch.zeros(4, dtype=torch.long)
    CoDistillationLoss(weight=2.0)(compiled.train()(x), labels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_keeps_the_loss_in_float32() -> None:
    model = mixer().train()
    plain = CoDistillationLoss(weight=2.0)(model.eval()(IMAGES, per_head=True), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(IMAGES, per_head=True)
        loss = CoDistillationLoss(weight=2.0)(outputs, LABELS)
    assert outputs.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0.05)


def test_channels_last() -> None:
    model = convert(LongSkip(), IMAGES).eval()
    expected = model(IMAGES)
    got = model.to(memory_format=torch.channels_last)(IMAGES.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_deep_copies_and_pickles_are_models_of_their_own() -> None:
    model = mixer().train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(3)
        expected = model(IMAGES)
        torch.manual_seed(3)
        assert torch.equal(twin(IMAGES), expected)
        assert torch.equal(twin.eval()(IMAGES), model.eval()(IMAGES))
        assert twin.recipe == model.recipe
        model.train()
        next(twin.parameters()).data.zero_()
        assert next(model.parameters()).abs().sum() > 0


def run_rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    for heads in (looped, fuse):
        model = heads(mixer().eval())  # without dropout, so that two halves of a batch make the whole
        parallel = DistributedDataParallel(model)  # raises in the second step if a parameter had no gradient
        for _ in range(2):
            parallel.zero_grad()
            CoDistillationLoss(weight=2.0)(parallel(IMAGES[half], per_head=True), LABELS[half]).backward()
        torch.save([parameter.grad for parameter in model.parameters()], folder / f"{heads.__name__}{rank}.pt")
    torch.distributed.destroy_process_group()


def looped(model: EnsembleNet) -> EnsembleNet:
    return model


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    mp.start_processes(run_rank, args=(tmp_path,), nprocs=2, start_method="forkserver")
    for heads in (looped, fuse):
        model = heads(mixer().eval())
        CoDistillationLoss(weight=2.0)(model(IMAGES, per_head=True), LABELS).backward()
        left, right = (torch.load(tmp_path / f"{heads.__name__}{rank}.pt") for rank in (0, 1))
        for one, other, parameter in zip(left, right, model.parameters(), strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)
