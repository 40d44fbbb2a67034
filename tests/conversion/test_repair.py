"""Repaired heads, against a pass in training mode and against the base's own outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensemblenet
from ensemblenet.models import CifarResNet

BATCHES = [(torch.randn(12, 3, 8, 8) + shift, torch.randint(3, (12,))) for shift in (0.0, 0.5, 1.0)]
IMAGES = BATCHES[0][0][:4]


def _trained(base: nn.Module, x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.std().nan_to_num(0.1))
    for _ in range(20):
        base.train()(x)
    return base.eval()


@pytest.mark.parametrize("options", [{"width": 0.5}, {"depth": 0.0, "width": 1.0}, {"depth": 0.0, "width": 0.75}])
def test_statistics_are_those_of_a_pass_in_training_mode(options: dict[str, Any]) -> None:
    base = _trained(CifarResNet(depth=14, width=8, num_classes=3), IMAGES)
    before = {name: own.clone() for name, own in base.state_dict().items()}
    model = ensemblenet.convert(base, IMAGES, 2, 4.0, "stem", init="inherit", calibration=iter(BATCHES), **options)
    assert all(torch.equal(before[name], own) for name, own in base.state_dict().items())
    assert not model.training
    expected = ensemblenet.convert(base, IMAGES, 2, 4.0, "stem", init="inherit", calibration=BATCHES, **options)
    for layer in expected.heads.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        expected.train()
        expected.trunk.eval()
        for x, _ in BATCHES:
            expected(x)
    for (name, own), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=name)
    assert all(layer.momentum == 0.1 for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    trunk = {name: own for name, own in model.trunk.state_dict().items() if "running" in name}
    assert trunk
    assert all(torch.equal(own, before[name]) for name, own in trunk.items())


def test_outputs_of_layers_without_normalisation_have_the_bases_moments() -> None:
    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)).eval()
    batches = [(torch.randn(40, 8) + shift, torch.randint(3, (40,))) for shift in (0.0, 1.0)]
    x = torch.cat([x for x, _ in batches])
    model = ensemblenet.convert(base, x[:4], 2, 4.0, "0", init="inherit", width=0.5, calibration=batches).eval()
    plain = ensemblenet.convert(base, x[:4], 2, 4.0, "0", init="inherit", width=0.5, importance="magnitude").eval()
    with torch.no_grad():
        expected = base(x)
        for own in model(x, per_head=True):
            torch.testing.assert_close(own.mean(0), expected.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.std(0), expected.std(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain(x).std(0), expected.std(0), rtol=1e-2)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.attention = nn.MultiheadAttention(32, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.last(x.mean(1))


def _upsamples() -> nn.Sequential:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2, 2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("make", "shape", "layer", "dim"), [(Attends, (5, 8), "attention", -1), (_upsamples, (3, 8, 8), "2", 1)]
)
def test_outputs_of_attention_and_transposed_convolutions_have_the_bases_moments(
    make: Any, shape: tuple[int, ...], layer: str, dim: int
) -> None:
    base = _trained(make(), torch.randn(40, *shape))
    batches = [(torch.randn(40, *shape) + shift, torch.randint(3, (40,))) for shift in (0.0, 1.0)]
    x = torch.cat([x for x, _ in batches])
    model = ensemblenet.convert(base, x[:4], 2, 4.0, "input", init="inherit", width=0.5, calibration=batches).eval()

    def moments(network: nn.Module) -> Tensor:
        found = []

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            values = (out[0] if isinstance(out, tuple) else out).movedim(dim, 0).flatten(1)
            found.append(torch.stack([values.mean(1), values.std(1)], 1))

        handle = network.get_submodule(layer).register_forward_hook(keep)
        network(x)
        handle.remove()
        return found[0]

    with torch.no_grad():
        expected = moments(base)
        for head in model.heads:
            distances = (moments(head).unsqueeze(1) - expected).abs().amax(-1)  # from every output of the base
            assert distances.amin(1).max() < 1e-3


def test_tied_layers_are_left_alone() -> None:
    base = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 3))
    base[4].weight = base[2].weight
    batches = [(torch.randn(40, 8), torch.randint(3, (40,)))]
    model = ensemblenet.convert(base, batches[0][0], 1, 4.0, "input", init="inherit", width=0.5, calibration=batches)
    head = model.heads[0]
    assert head.get_parameter("2.weight") is head.get_parameter("4.weight")
    values = set(base[2].weight.flatten().tolist())  # type: ignore[union-attr, operator]
    assert set(head.get_parameter("2.weight").flatten().tolist()) <= values
