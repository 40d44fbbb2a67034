from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from ensemblenet import Budget, BudgetError, Cost, measure_cost
from ensemblenet.cost import ROOFLINE, Roofline


def test_a_convolution_costs_what_the_textbook_says() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=True)
    cost = measure_cost(layer, torch.zeros(4, 3, 10, 12))
    assert (cost.parameters, cost.macs) == (8 * 3 * 9 + 8, 10 * 12 * 8 * 3 * 9)
    assert cost.activations == 10 * 12 * 8


def test_torchvisions_published_figures() -> None:
    """ResNet-18: 11,689,512 parameters and 1.814 GMACs, as its documentation states."""
    from torchvision.models import resnet18

    cost = measure_cost(resnet18(), torch.zeros(1, 3, 224, 224))
    assert cost.parameters == 11_689_512
    assert round(cost.macs / 1e9, 3) == 1.814


def test_measuring_attention_counts_its_products_and_leaves_no_trace() -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    net = SelfAttention().train()
    fast = torch.backends.mha.get_fastpath_enabled()
    cost = measure_cost(net, torch.zeros(2, 5, 16))
    assert cost.macs == 5 * 16 * 16 * 4 + 2 * 5 * 5 * 16
    assert net.training
    assert layer.training
    assert torch.backends.mha.get_fastpath_enabled() == fast


def small() -> nn.Sequential:
    features = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(128, 5))


def test_activations_and_time_of_a_small_network_counted_by_hand() -> None:
    """At 8 x 8 pixels; in-place work writes, a view does not."""
    ridge, batch, overhead = 10.0, 4, 80.0
    accelerator = Roofline(ridge=ridge, bytes=2.0, batch=batch, overhead=overhead)
    cost = measure_cost(small(), torch.zeros(2, 3, 8, 8), accelerator)
    maps, pooled = 8 * 8 * 8, 8 * 4 * 4
    assert cost.activations == maps + maps + maps + 2 * pooled + 5  # pooling gives indices too
    flops = [2 * 64 * 8 * 27, 0, 0, 0, 2 * 128 * 5]
    moved = [
        3 * 64 + maps + 8 * 27 / batch,
        maps + maps + 4 * 8 / batch,
        maps + maps,
        maps + 2 * pooled,
        128 + 5 + (128 * 5 + 5) / batch,
    ]
    times = [max(a, ridge * 2 * b) + overhead / batch for a, b in zip(flops, moved, strict=True)]
    assert times[0] == flops[0] + overhead / batch  # arithmetic and memory are both the longer somewhere
    assert cost.time == pytest.approx(sum(times))


class Written(TorchDispatchMode):
    """Sums the elements of outputs that own their memory or were written in place, whatever schemas say."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
            is_view = one.untyped_storage().data_ptr() in before and not writes
            self.count += 0 if is_view else one.numel()
        return out


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_activations_are_what_a_dispatch_mode_sees_written(name: str) -> None:
    base, x = timm.create_model(name).eval(), torch.randn(2, 3, 160, 160)
    with Written() as written, torch.enable_grad():
        base(x)
    assert measure_cost(base, x).activations == written.count / 2


def test_what_comes_from_weights_alone_is_no_activation() -> None:
    plain, normed = nn.Linear(64, 32), weight_norm(nn.Linear(64, 32))
    costs = [measure_cost(layer, torch.zeros(n, 64)) for layer, n in ((plain, 2), (normed, 2), (normed, 8))]
    assert [cost.activations for cost in costs] == [32, 32, 32]
    assert costs[0].time < costs[1].time == costs[2].time


def test_a_cost_does_not_depend_on_the_number_of_examples() -> None:
    base = small()
    assert measure_cost(base, torch.zeros(2, 3, 8, 8)) == measure_cost(base, torch.zeros(8, 3, 8, 8))


def test_inference_mode_measures_the_same() -> None:
    x = torch.zeros(2, 3, 8, 8)
    base = small()
    expected = measure_cost(base, x)
    with torch.inference_mode():
        assert measure_cost(base, x) == expected


def test_shares_are_of_the_accelerator_that_is_named() -> None:
    base, x = small(), torch.zeros(2, 3, 8, 8)
    default, slow = (measure_cost(base, x, accelerator) for accelerator in (ROOFLINE, Roofline(overhead=1e12)))
    assert default.time < slow.time
    assert default.activations == slow.activations


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget.of(0.5), "0.5 of the base's parameters and 0.5 of its MACs"),
        (Budget(None, None, time=1.2), "1.2 of the base's time"),
        (Budget(0.5, None, 1.5, 1.2), "0.5 of the base's parameters, 1.5 of its activations and 1.2 of its time"),
    ],
)
def test_a_budget_names_what_it_limits(budget: Budget, text: str) -> None:
    assert str(budget) == text


def test_one_share_limits_parameters_and_macs_alone() -> None:
    limit = Budget.of(0.5).limit(Cost(10, 20.0, 30.0, 40.0))
    assert limit == Cost(5, 10.0, float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(time=-1.0), "got -1.0"),
        (Budget(activations=True), "got True"),
        (Budget(None, None), "budget must limit something"),
        (None, "got None"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget.of(budget)
