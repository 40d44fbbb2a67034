"""Trained networks, told from fresh ones."""

from collections.abc import Callable

import pytest
import torch
from kinds import BY_HAND, TRANSFORMERS
from networks import ODD
from torch import nn
from torch.nn import functional as F

from ensemblenet.conversion.trained import looks_trained
from ensemblenet.models import CifarResNet, MNIST1DNet


def _plain(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.last = nn.GRU(16, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.steps(x.unsqueeze(1))[0][:, 0])


# a network, and how many steps of training show
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "batch normalisation": (lambda: CifarResNet(8, 8, 4), (3, 8, 8), 1),
    "one dimension": (lambda: MNIST1DNet(8, 4), (40,), 1),
    "none": (_plain, (16,), 200),
    "recurrent": (Steps, (16,), 200),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_training_shows_and_batches_do_not(name: str) -> None:
    make, shape, steps = NETWORKS[name]
    torch.manual_seed(0)
    network = make().train()
    with torch.no_grad():
        network(torch.randn(64, *shape))
    assert not looks_trained(network)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        x = torch.randn(64, *shape)
        optimizer.zero_grad()
        F.cross_entropy(network(x), x.flatten(1)[:, :4].argmax(1)).backward()
        optimizer.step()
    assert looks_trained(network)


INITS: dict[str, Callable[[torch.Tensor], object]] = {
    "normal": lambda w: nn.init.normal_(w, 0.1, 0.02),
    "kaiming": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "sparse": lambda w: nn.init.sparse_(w, 0.5),
    "constant": nn.init.ones_,
}


@pytest.mark.parametrize("name", INITS)
def test_no_usual_initialisation_looks_trained(name: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        network = _plain(96)
        for layer in network.children():
            if isinstance(layer, nn.Linear):
                INITS[name](layer.weight)
        assert not looks_trained(network)


def test_normalisations_that_begin_by_chance_do_not_look_trained() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
    )
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)  # as DCGAN does
    assert not looks_trained(network)


def test_the_kinds_of_networks_are_fresh_when_they_are_made() -> None:
    torch.manual_seed(0)
    found = [entry.name for entry in (*BY_HAND, *TRANSFORMERS) if looks_trained(entry.make())]
    found += [name for name, (make, _) in ODD.items() if looks_trained(make())]
    assert found == []
