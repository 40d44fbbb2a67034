from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from networks import ODD, TokenMixer
from torch import Tensor, fx, nn

from ensemblenet import ConversionError, measure_cost
from ensemblenet.conversion.trace import BY_MODE, trace


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_graph_says_what_the_network_says(name: str, batch: int) -> None:
    factory, shape = ODD[name]
    torch.manual_seed(0)
    base = factory().eval()
    traced = trace(base, torch.randn(3, *shape))
    graph = fx.GraphModule(traced.module, traced.graph).eval()
    x = torch.randn(batch, *shape)
    torch.testing.assert_close(graph(x), base(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ODD)
def test_costs_of_all_nodes_add_up_to_what_is_measured(name: str) -> None:
    factory, shape = ODD[name]
    base, x = factory(), torch.randn(3, *shape)
    traced = trace(base, x)
    assert astuple(traced.cost(traced.graph.nodes)) == pytest.approx(astuple(measure_cost(base, x)))


def test_a_constant_that_differs_between_the_modes_is_chosen_by_the_mode() -> None:
    traced = trace(TokenMixer(), torch.randn(2, 3, 16, 16))
    choices = [node.args for node in traced.graph.nodes if node.target == BY_MODE]
    assert choices == [(0.1, 0.0)] * 3


def test_functions_that_read_the_mode_follow_it() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layer(x), 0.5, training=self.training)

    traced = trace(Functional(), torch.randn(2, 4))
    graph = fx.GraphModule(traced.module, traced.graph)
    x = torch.ones(64, 4)
    assert torch.equal(graph.eval()(x), graph(x))
    assert (graph.train()(x) == 0).any()


def test_shapes_stay_free_and_other_numbers_are_numbers() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, length, features = x.shape
            return self.layer(x.reshape(n * length, features)).view(n, -1).repeat(1, 3)

    traced = trace(Flat(), torch.randn(2, 5, 6))
    graph = fx.GraphModule(traced.module, traced.graph)
    assert graph(torch.randn(7, 5, 6)).shape == (7, 30)
    assert graph(torch.randn(7, 4, 6)).shape == (7, 24)


def test_writing_in_place_is_kept() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            x[:, 0] = 0
            x[:, 1:].mul_(2)
            return x

    base = Masked().eval()
    traced = trace(base, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.equal(fx.GraphModule(traced.module, traced.graph)(x), base(x))


def test_tensors_that_are_plain_attributes_become_constants() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.shift = torch.arange(4.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - self.shift) + torch.tensor([1.0, 2.0, 3.0, 4.0])

    base = Shifted().eval()
    traced = trace(base, torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.equal(fx.GraphModule(traced.module, traced.graph)(x), base(x))


def test_a_cache_filled_in_the_first_run_is_no_difference_between_the_modes() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.arange(4.0) * self.layer.weight.sum(0)
            return self.layer(x) + self.cache.detach()

    base = Caching()
    traced = trace(base, torch.randn(2, 4))
    assert base.cache is None
    x = torch.randn(3, 4)
    torch.testing.assert_close(fx.GraphModule(traced.module, traced.graph)(x), base(x))


def test_a_cache_in_a_buffer_keeps_what_the_first_run_put_there() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("table", torch.zeros(1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.table.shape[1] != x.shape[1]:
                self.table = torch.arange(float(x.shape[1])).unsqueeze(0)
            return self.layer(x) + self.table

    base = Positions()
    traced = trace(base, torch.randn(2, 4))
    assert base.table.shape == (1, 1)
    x = torch.randn(3, 4)
    torch.testing.assert_close(fx.GraphModule(traced.module, traced.graph)(x), base(x))


def test_the_failing_module_and_the_users_line_are_named() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 6), Broken()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.first(x))

    with pytest.raises(ConversionError, match=r"failed in block \(Broken\) at test_trace.py:\d+: RuntimeError: .*mat1"):
        trace(Outer(), torch.randn(2, 4))
