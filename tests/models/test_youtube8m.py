"""The taggers: against their definitions, blind to padding, and converted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ensemblenet import BudgetError, convert
from ensemblenet.models import (
    DeepBagOfFrames,
    GatedNetVLAD,
    GRUTagger,
    LogisticTagger,
    MLPTagger,
    MoETagger,
    NeXtVLAD,
)
from ensemblenet.testing import check_conversion

D, C, T = 24, 40, 6
VIDEO = {
    "mlp": lambda: MLPTagger(D, C, [64, 48], dropout=0.1),
    "moe": lambda: MoETagger(D, C, 2, [64]),
}
FRAMES = {
    "dbof": lambda: DeepBagOfFrames(D, C, 64, 32),
    "netvlad": lambda: GatedNetVLAD([16, 8], C, 8, 32),
    "nextvlad": lambda: NeXtVLAD([16, 8], C, 8, groups=4, hidden_size=32, gate_reduction=4),
    "gru": lambda: GRUTagger(D, C, 32),
}
ALL = VIDEO | FRAMES


def inputs(name, videos=4):
    torch.manual_seed(0)
    if name in VIDEO:
        return torch.randn(videos, D)
    x = torch.randn(videos, T, D)
    for video in range(1, videos):
        x[video, video + 1 :] = 0
    return x


def trained_norms(network):
    """Batch normalisation with statistics and weights as after training, so that every part shows."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight.data, 0.5),
                (module.bias.data, -0.5),
            ):
                tensor.uniform_(low, low + 1, generator=generator)
    return network.double().eval()


@pytest.mark.parametrize(("num_heads", "budget"), [(2, 0.9), (4, 1.0)])
@pytest.mark.parametrize("name", ALL)
def test_conversion(name: str, num_heads: int, budget: float) -> None:
    torch.manual_seed(0)
    assert check_conversion(ALL[name](), inputs(name), num_heads, budget).width < 1


@pytest.mark.parametrize("name", ALL)
def test_a_saved_conversion_knows_its_base(name: str) -> None:
    recipe = convert(ALL[name](), inputs(name), 2, 1.0).recipe
    assert recipe is not None
    assert recipe.base is not None
    assert recipe.base.build().arguments == ALL[name]().arguments


def test_a_logistic_regression_has_nothing_to_narrow() -> None:
    with pytest.raises(BudgetError, match="do not fit"):
        convert(LogisticTagger(D, C), torch.randn(2, D), 2, 0.9)


def test_heads_have_fewer_experts() -> None:
    model = convert(MoETagger(D, C, 4, [64]), torch.randn(4, D), 2, 1.0, "input")
    experts = {head.get_submodule("classifier.experts").out_features for head in model.heads}
    assert experts == {3 * C}


@pytest.mark.parametrize("hidden", [[], [16]])
def test_a_mixture_of_experts_gives_the_log_odds_of_its_probability(hidden: list[int]) -> None:
    torch.manual_seed(0)
    network = trained_norms(MoETagger(D, C, 3, hidden))
    x = torch.randn(5, D, dtype=torch.float64)
    features = network.hidden(x)
    gates = network.classifier.gates(features).view(5, 3, C)
    experts = network.classifier.experts(features).view(5, 3, C)
    shares = torch.cat([gates, torch.zeros(5, 1, C)], 1).softmax(1)[:, :3]
    p = (shares * experts.sigmoid()).sum(1)
    torch.testing.assert_close(network(x), torch.log(p / (1 - p)), rtol=1e-5, atol=1e-5)


def test_a_mixture_of_experts_is_finite_where_its_probability_is_not() -> None:
    network = MoETagger(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    for size in (1e2, 1e5):
        y = network(size * x)
        assert y.isfinite().all()
        [gradient] = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all()
    assert y.abs().max() > 1000


@pytest.mark.parametrize("name", ALL)
def test_outputs_begin_at_the_odds_of_few_labels(name: str) -> None:
    network = ALL[name]().eval()
    mean = network(inputs(name)).sigmoid().mean().item()
    assert mean == pytest.approx(3 / C, rel=0.6)


@pytest.mark.parametrize("name", FRAMES)
def test_padding_changes_nothing(name: str) -> None:
    network = trained_norms(FRAMES[name]())
    x = inputs(name).double()
    for video in range(4):
        length = int((x[video] != 0).any(1).sum())
        longer = torch.cat([x[video : video + 1, :length], torch.zeros(1, 5, D)], 1)
        torch.testing.assert_close(network(longer), network(x[video : video + 1, :length]))


@pytest.mark.parametrize("name", ["dbof", "netvlad", "nextvlad"])
def test_pooling_does_not_see_the_order_of_frames(name: str) -> None:
    network = trained_norms(FRAMES[name]())
    x = inputs(name).double()
    torch.testing.assert_close(network(x.flip(1)), network(x))


def test_the_recurrent_tagger_sees_the_order_and_the_first_frame() -> None:
    network = GRUTagger(D, C, 32).double().eval()
    x = inputs("gru").double()
    assert not torch.allclose(network(x[:1].flip(1)), network(x[:1]))
    changed = x.clone()
    changed[:, 0] += 1
    assert ((network(changed) - network(x)).abs().amax(1) > 1e-4).all()


def test_netvlad_pools_as_defined() -> None:
    """Residuals to every centre, weighted by soft assignment, frame by frame."""
    torch.manual_seed(0)
    pool = trained_norms(GatedNetVLAD([D], C, 5, 8)).pools[0]
    x = torch.randn(2, T, D, dtype=torch.float64)
    is_there = torch.ones(2, T, 1, dtype=torch.float64)
    is_there[1, 3:] = 0
    expected = []
    for video, here in zip(x, is_there, strict=True):
        rows = torch.zeros(5, D, dtype=torch.float64)
        for frame, counts in zip(video, here, strict=True):
            norm = pool.norm
            scores = (pool.assign(frame) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            share = (scores * norm.weight + norm.bias).softmax(0)
            for k in range(5):
                rows[k] += counts * share[k] * (frame - pool.centres[k])
        rows = rows / rows.norm(dim=1, keepdim=True)
        expected.append(rows.flatten() / rows.norm())
    torch.testing.assert_close(pool(x, is_there), torch.stack(expected))


def test_nextvlad_pools_as_defined() -> None:
    """Groups of lower dimension, each attended and assigned by itself, frame by frame."""
    torch.manual_seed(0)
    groups, clusters = 3, 5
    pool = trained_norms(NeXtVLAD([D], C, clusters, groups=groups, hidden_size=8, gate_reduction=2)).pools[0]
    x = torch.randn(2, T, D, dtype=torch.float64)
    is_there = torch.ones(2, T, 1, dtype=torch.float64)
    is_there[1, 3:] = 0
    size = 2 * D // groups
    pooled = []
    for video, here in zip(x, is_there, strict=True):
        rows = torch.zeros(clusters, size, dtype=torch.float64)
        for frame, counts in zip(video, here, strict=True):
            wide = pool.expand(frame)
            norm = pool.assign_norm
            scores = (pool.assign(wide) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
            scores = scores * norm.weight + norm.bias
            for g in range(groups):
                share = scores[g * clusters : (g + 1) * clusters].softmax(0) * pool.attend(wide)[g].sigmoid() * counts
                rows += share[:, None] * (wide[g * size : (g + 1) * size] - pool.centres)
        pooled.append((rows / rows.norm(dim=1, keepdim=True)).flatten())
    torch.testing.assert_close(pool(x, is_there), pool.norm(torch.stack(pooled)))


def test_deep_bag_of_frames_pools_codes_by_their_maximum() -> None:
    network = trained_norms(DeepBagOfFrames(D, C, 16, 8))
    x = inputs("dbof").double()
    frames = [x[1:2, [t]] for t in range(2)]  # two frames are there
    codes = torch.stack(
        [network.cluster_norm(network.cluster(network.input_norm(f))).clamp(0, 6)[0, 0] for f in frames]
    )
    hidden = network.hidden_norm(network.hidden(codes.amax(0)[None])).clamp(0, 6)
    torch.testing.assert_close(network(x[1:2]), network.classifier(hidden))


def test_nextvlad_needs_groups_that_divide() -> None:
    with pytest.raises(ValueError, match="must be multiples of groups, got 48 and 5"):
        NeXtVLAD([D], C, groups=5)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_learns(name: str) -> None:
    network = ALL[name]()
    network(inputs(name)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (LogisticTagger(), 1153 * 3862),
        (MLPTagger(hidden=[1024]), 1152 * 1024 + 2 * 1024 + 1025 * 3862),
        (MoETagger(), 4 * 1153 * 3862),
    ],
)
def test_default_sizes_are_those_of_the_data(network: nn.Module, size: int) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == size
    assert network(torch.zeros(2, *network.input_shape)).shape == (2, 3862)
    assert math.prod(network.input_shape) == 1152
