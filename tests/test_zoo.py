"""All promises of a conversion, on networks that stand for the kinds; benchmarks/zoo.py runs all that there are."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from kinds import BY_HAND, TRANSFORMERS, Entry
from kinds import check as check_kind
from networks import ODD, SpreadOfBatch
from torch import nn

from ensemblenet.inputs import CheckSizes
from ensemblenet.testing import check_conversion

TIMM = {
    "test_resnet": (3, 64, 64),  # residual
    "densenet121": (3, 64, 64),  # dense
    "mobilenetv3_small_050": (3, 96, 96),  # depthwise, squeeze-and-excite
    "regnety_002": (3, 96, 96),  # groups
    "convnext_atto": (3, 64, 64),
    "deit_tiny_patch16_224": (3, 224, 224),  # vision transformer with a class token
    "test_vit3": (3, 160, 160),  # with pooling
    "swin_tiny_patch4_window7_224": (3, 224, 224),  # windows
    "mixer_s32_224": (3, 224, 224),
    "test_coatnet": (3, 160, 160),  # convolutions and attention
    "test_nfnet": (3, 96, 96),  # normaliser-free
    "xcit_nano_12_p16_224": (3, 224, 224),  # attention over channels
}
TORCHVISION = [
    "squeezenet1_1",  # plain convolutions
    "googlenet",  # inception
    "shufflenet_v2_x0_5",  # channels that change places
    "vit_b_32",  # nn.MultiheadAttention
]


def check(base: nn.Module, shape: tuple[int, ...], num_heads: int, budget: float) -> None:
    x = torch.randn(2, *shape)
    report = check_conversion(base, x, num_heads, budget)
    assert 0 < report.width < 1 or report.depth < 1
    assert report.spread is None or 0.2 < report.spread < 2.5
    assert max(report.parameters_share, report.macs_share) > 0.8 * budget


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    torch.manual_seed(0)
    config = {"img_size": TIMM[name][1:]} if name == "test_vit3" else {}
    check(timm.create_model(name, **config), TIMM[name], num_heads=2, budget=0.9)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    base = torchvision.models.get_model(name, weights=None, **options)
    check(base, (3, 224, 224), num_heads=4, budget=1.0)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("num_heads", "budget"), [(2, 0.9), (4, 1.0)])
def test_odd_graphs(name: str, num_heads: int, budget: float) -> None:
    torch.manual_seed(0)
    make, shape = ODD[name]
    base, x = make(), torch.randn(3, *shape)
    report = check_conversion(base, x, num_heads, budget)
    assert 0 < report.width < 1 or report.depth < 1


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_a_base_that_is_nothing_with_one_example() -> None:
    check_conversion(SpreadOfBatch(), torch.randn(3, 3, 16, 16), 2, 0.9)


SAMPLE = {
    "BERT", "Llama", "ViT", "ResNet",
    "bidirectional LSTM", "causal transformer, tied", "U-Net", "GCN", "DLRM", "two tasks", "experts, top two",
    "TCN, weight norm", "controlled equation", "halting",
}  # fmt: skip


@pytest.mark.parametrize("entry", [e for e in (*BY_HAND, *TRANSFORMERS) if e.name in SAMPLE], ids=lambda e: e.name)
def test_kinds(entry: Entry) -> None:
    found = check_kind(entry)
    assert found.verdict == ("refused, with a way" if entry.way else "converted"), found.text


def test_the_check_of_kinds_sees_a_loop_that_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckSizes, "forward", lambda self, x: x)
    entry = next(entry for entry in BY_HAND if entry.name == "controlled equation")
    found = check_kind(replace(entry, sizes=(15,)))  # longer than the examples: the graph does not fail there
    assert (found.verdict, "size 15: outputs differ" in found.text) == ("wrong", True), found
