import pytest
import torch
from networks import LongSkip, Recurrent, Shared, TokenMixer, perceptron
from torch import Tensor, fx, nn

from ensemblenet import split_points
from ensemblenet.conversion.split import find_cuts, head_graph, trunk_graph
from ensemblenet.conversion.trace import trace
from ensemblenet.cost import count_parameters, measure_cost

IMAGES = torch.randn(2, 3, 16, 16)


def names(base: nn.Module, x: Tensor) -> list[str]:
    return [point.name for point in split_points(base, x)]


def test_a_long_skip_leaves_no_split_point_beside_it() -> None:
    found = names(LongSkip(), IMAGES)
    assert "down" in found
    assert not any(name.startswith(("middle", "up")) for name in found)
    assert "merge" in found
    assert "last.0" in found


def test_a_residual_stream_is_split_between_its_blocks_only() -> None:
    found = names(TokenMixer(), IMAGES)
    assert not any(name.startswith("layers.") for name in found)
    assert [name for name in found if name.startswith("add")] == ["add", *(f"add#{k}" for k in range(2, 8))]


def test_a_module_called_twice_has_two_names() -> None:
    found = names(Shared(), torch.randn(2, 12))
    assert {"add", "add#2", "middle"} <= set(found)


def test_a_tuple_is_no_tensor() -> None:
    found = names(Recurrent(), torch.randn(2, 7, 6))
    assert "lstm" not in found
    assert "mlp.0" in found


def test_a_tensor_that_is_overwritten_is_no_split_point() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert names(net, torch.randn(2, 4)) == ["input", "1", "2", "3"]


def test_shares_are_those_of_the_part_before() -> None:
    base, x = perceptron(), torch.randn(2, 20)
    whole = measure_cost(base, x)
    for k, point in enumerate(split_points(base, x)):
        part = base[:k]
        assert point.parameters_share == pytest.approx(count_parameters(part) / whole.parameters)
        assert point.macs_share == pytest.approx(measure_cost(part, x).macs / whole.macs if k else 0)
        assert point.shape == tuple(part(x).shape)


def test_inner_modules_that_end_at_the_same_place_are_aliases() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    (_, inner, outer) = split_points(net, torch.randn(2, 4))
    assert (inner.name, inner.aliases) == ("0.0", ())
    assert (outer.name, outer.aliases) == ("0", ("0.1",))


@pytest.mark.parametrize(
    ("base", "shape"),
    [(LongSkip, (3, 16, 16)), (TokenMixer, (3, 16, 16)), (Recurrent, (7, 6)), (Shared, (12,)), (perceptron, (20,))],
)
def test_the_two_parts_make_the_whole_at_every_split_point(base: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = base().eval()
    traced = trace(network, torch.randn(2, *shape))
    x = torch.randn(5, *shape)
    expected = network(x)
    for cut in find_cuts(traced):
        first = trunk_graph(traced, cut)
        second, _ = head_graph(traced, cut)
        trunk, head = (fx.GraphModule(traced.module, graph).eval() for graph in (first, second))
        torch.testing.assert_close(head(trunk(x)), expected, rtol=1e-5, atol=1e-6, msg=cut.point.name)
