"""What a GPU does otherwise than a processor. `pytest -m cuda` runs these alone, where there is one."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import ensemblenet
from ensemblenet import EnsembleNet, convert, fuse
from ensemblenet.cli.main import main
from ensemblenet.errors import FusionError
from ensemblenet.heads import FusedEnsembleNet, capture, choose
from ensemblenet.timing import measure, step

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SIZES = {
    "test_resnet": 64,
    "resnet50": 64,
    "convnext_atto": 64,
    "test_vit3": 160,
    "mobilenetv3_small_050": 96,
    "regnety_002": 64,
    "test_efficientnet": 96,
    "swin_tiny_patch4_window7_224": 224,
}


def made(name: str, num_heads: int = 3, dtype: torch.dtype = torch.float32) -> tuple[EnsembleNet, Tensor]:
    torch.manual_seed(0)
    size = SIZES[name]
    base = timm.create_model(name, num_classes=10)
    model = convert(base, torch.randn(2, 3, size, size), num_heads)
    x = torch.randn(4, 3, size, size, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    return without_chance(model).to("cuda", dtype, memory_format=torch.channels_last), x


def without_chance(model: EnsembleNet) -> EnsembleNet:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("drop_prob", "attn_drop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def gap(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", SIZES)
def test_fused_heads_are_the_looped_ones(name: str) -> None:
    looped, x = made(name, dtype=torch.float64)
    fused = fuse(copy.deepcopy(looped))
    for model in (looped, fused):
        model.train()(x).square().mean().backward()
    for (part, left), right in zip(looped.named_parameters(), fused.parameters(), strict=True):
        assert left.grad is not None, part
        assert right.grad is not None, part
        torch.testing.assert_close(right.grad, left.grad, rtol=1e-5, atol=1e-9, msg=part)
    with torch.no_grad():
        assert gap(fused.eval()(x), looped.eval()(x)) < 1e-8


@pytest.mark.parametrize("name", SIZES)
def test_under_autocast(name: str) -> None:
    """Fused heads are as far from float32 as looped ones, outputs and gradients, and products are what they use."""
    looped, x = made(name)
    fused = fuse(copy.deepcopy(looped))
    torch.backends.cudnn.allow_tf32 = False
    looped.train()(x).square().mean().backward()
    torch.backends.cudnn.allow_tf32 = True
    expected = [part.grad.clone() for part in looped.parameters()]  # type: ignore[union-attr]
    gaps = []
    for model in (looped, fused):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = model.train()(x)
        out.float().square().mean().backward()
        largest = max(part.norm() for part in expected)
        pairs = zip(model.parameters(), expected, strict=True)
        gaps.append(max(((part.grad - own).norm() / largest).item() for part, own in pairs))  # type: ignore[operator]
    assert gaps[1] < 1.5 * gaps[0] + 0.02, gaps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pointwise_convolutions_are_products_in_16_bits(dtype: torch.dtype) -> None:
    looped, x = made("resnet50")
    fused = fuse(looped).eval()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.no_grad(),
        torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        fused(x)
    products = [event for event in profile.events() if event.name == "aten::bmm"]
    assert bool(products) == (dtype == torch.bfloat16)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = made("test_resnet")
    expected = fuse(model).eval()(x)
    ensemblenet.save(model, tmp_path / "model")
    loaded = ensemblenet.load(tmp_path / "model", timm.create_model("test_resnet", num_classes=10)).cuda().eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_chosen_is_what_is_faster(training: bool) -> None:
    """Measured once more on its own, each step in an autocast of its own, as training has it."""
    looped, x = made("resnet50")
    x = x.repeat(16, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        chosen, choice = choose(looped.train(training), x)

    def lowered(model: EnsembleNet) -> Callable[[], None]:
        run = step(model.train(training), x)

        def one() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                run()

        return one

    other = fuse(copy.deepcopy(looped))
    seconds = measure({"looped": lowered(looped), "fused": lowered(other)}, 7)
    assert choice.seconds["looped"] == pytest.approx(seconds["looped"], rel=0.5)
    assert isinstance(chosen, FusedEnsembleNet) == (choice.heads == "fused")
    assert choice.seconds[choice.heads] == min(choice.seconds.values())


@pytest.mark.parametrize("name", ["test_resnet", "convnext_atto", "test_vit3"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_prediction(name: str, fused: bool) -> None:
    model, x = made(name)
    model = fuse(model).eval() if fused else model.eval()
    with torch.autocast("cuda", torch.bfloat16):
        predict = capture(model, x)
    for _ in range(3):
        x = torch.randn_like(x)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            expected = model(x)
        assert predict(x).dtype == expected.dtype
        assert gap(predict(x), expected) < 1e-2
        with torch.no_grad():
            for part in model.parameters():
                part.mul_(0.95)  # the graph reads the parameters where they are
    with pytest.raises(FusionError, match="captured for inputs of shape"):
        predict(x[:1])


def test_compiled() -> None:
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False)) for _ in range(2)]
    model = EnsembleNet(nn.Conv2d(3, 8, 3), heads).to("cuda", memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    fused = fuse(model, x).eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert gap(torch.compile(fused)(x), fused(x)) < 2e-2


def test_the_command_shows_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test_resnet", "--num-classes", "5", "--input-shape", "3,64,64", "--batch-size", "2", "--repeats", "1"]
    assert main(["benchmark", *arguments, "--device", "cuda"]) == 0
    assert "graph" in capsys.readouterr().out
