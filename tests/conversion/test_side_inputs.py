"""Networks of several inputs; heads that take inputs and sizes beside the features; sizes that are free or fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemblenet import EnsembleNet, convert, fuse, load, save, split_points
from ensemblenet.conversion.convert import rebuild
from ensemblenet.conversion.split import find_cuts, head_graph, trunk_graph
from ensemblenet.conversion.trace import trace
from ensemblenet.ensemble import as_tuple
from ensemblenet.errors import BudgetError, ConversionError, InputError
from ensemblenet.inputs import call
from ensemblenet.testing import check_conversion


class Masked(nn.Module):
    """A residual network over tokens; padding is left out of the mean at the very end."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 64), nn.Linear(64, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(depth)
        )

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor | None = None) -> Tensor:
        """ids (N, L), mask (N, L), scale (N, 1)."""
        h = self.embed(ids)
        for block in self.blocks:
            h = h + block(h) * mask[..., None]
        h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.out(h if scale is None else h * scale)


class WrittenMask(Masked):
    """The same from one input: the mask is written in place."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        mask = torch.ones(ids.shape)
        mask[ids == 0] = 0
        return super().forward(ids, mask)


class Siamese(nn.Module):
    """One network for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out((self.body(left) - self.body(right)).abs())


class Convolved(nn.Module):
    """A graph network: nodes (N, 8), edges (2, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)])

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        for layer in self.layers[:-1]:
            h = layer(nodes)
            nodes = (h + torch.zeros_like(h).index_add(0, target, h[source])).relu()
        return self.layers[-1](nodes)


class Nested(nn.Module):
    """A dictionary with a tuple in it, as one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = (
            nn.Linear(6, 64),
            nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)),
        )
        self.tables = nn.ModuleList(nn.Embedding(20, 64) for _ in range(2))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        h = self.dense(batch["dense"])
        for table, index in zip(self.tables, batch["ids"], strict=True):
            h = h + table(index)
        return self.out(h)


class SequenceFirst(nn.Module):
    """The batch is the second dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, 64), nn.Linear(64, 5)
        self.block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        h = self.stem(x).transpose(0, 1)
        h = h + self.block(h)
        return self.out(h.reshape(-1, n, 64).mean(0))


class Resized(nn.Module):
    """Gives its output at the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.up(self.down(x).relu()), size=x.shape[-2:])


class Auxiliary(nn.Module):
    """Two outputs that are both learned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more = nn.Linear(8, 64), nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.logits, self.aux = nn.Linear(64, 3), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.stem(x)
        more = self.more(h)
        return {"logits": self.logits(more), "aux": self.aux(h), "features": more}


def ids(n: int, length: int = 12) -> Tensor:
    tokens = torch.randint(1, 50, (n, length))
    tokens[0, length // 2 :] = 0
    return tokens


def masked(n: int, length: int = 12) -> dict[str, Tensor]:
    tokens = ids(n, length)
    return {"ids": tokens, "mask": (tokens != 0).float()}


def graph(n: int, edges: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 8), torch.randint(0, n, (2, edges))


def nested(n: int) -> tuple[dict[str, Any]]:
    return ({"dense": torch.randn(n, 6), "ids": (torch.randint(0, 20, (n,)), torch.randint(0, 20, (n,)))},)


# a network, inputs of n examples, and inputs of n examples of another size where it takes them
NETWORKS: dict[str, tuple[Any, Any, Any]] = {
    "masked": (Masked, masked, lambda n: masked(n, 7)),
    "written mask": (WrittenMask, ids, lambda n: ids(n, 5)),
    "siamese": (Siamese, lambda n: (torch.randn(n, 12), torch.randn(n, 12)), None),
    "graph": (Convolved, graph, lambda n: graph(n, 4)),
    "nested": (Nested, nested, None),
    "sequence first": (SequenceFirst, lambda n: torch.randn(n, 10, 16), lambda n: torch.randn(n, 4, 16)),
    "resized": (Resized, lambda n: torch.randn(n, 3, 16, 16), lambda n: torch.randn(n, 3, 32, 24)),
}


def make(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    factory, inputs, _ = NETWORKS[name]
    return factory().eval(), inputs(4)


def others(name: str) -> list[Any]:
    _, inputs, resized = NETWORKS[name]
    return [inputs(1), inputs(7), *([resized(3)] if resized else [])]


@pytest.mark.parametrize("name", NETWORKS)
def test_at_full_width_the_parts_are_the_network_at_every_split_point_and_size(name: str) -> None:
    base, inputs = make(name)
    cuts = find_cuts(trace(base, inputs))
    assert len(cuts) > 1
    for cut in cuts:
        traced = trace(base, inputs)
        cut = next(other for other in find_cuts(traced) if other.point.name == cut.point.name)
        trunk, head = (
            torch.fx.GraphModule(traced.module, part).eval()
            for part in (trunk_graph(traced, cut), head_graph(traced, cut)[0])
        )
        for other in others(name):
            torch.testing.assert_close(head(*as_tuple(call(trunk, other))), call(base, other), msg=cut.point.name)


@pytest.mark.parametrize("name", NETWORKS)
def test_conversions_keep_their_promises(name: str) -> None:
    base, inputs = make(name)
    check_conversion(base, inputs, budget=1.2)


@pytest.mark.parametrize("name", NETWORKS)
def test_narrow_heads_take_other_sizes_fused_too(name: str) -> None:
    base, inputs = make(name)
    model = convert(base, inputs, budget=1.2).eval()
    fused = fuse(model)
    for other in others(name):
        expected = call(model, other, per_head=True)
        assert expected.shape[1:] == call(base, other).shape
        torch.testing.assert_close(call(fused, other, per_head=True), expected)


def test_what_is_alive_from_the_first_to_the_last_layer_does_not_force_a_split_at_the_input() -> None:
    base, inputs = make("masked")
    points = split_points(base, inputs)
    assert [point.name for point in points][:3] == ["input", "embed", "add"]
    model = convert(base, inputs, split_at="add")
    assert dict(model.heads[0].named_parameters()).keys() >= {"blocks.1.1.weight", "out.weight"}
    assert "embed.weight" not in dict(model.heads[0].named_parameters())


def test_a_padded_position_changes_nothing() -> None:
    base, _ = make("written mask")
    model = convert(base, ids(4), split_at="add").eval()
    tokens = ids(3)
    expected = model(tokens)
    with torch.no_grad():
        model.trunk.get_parameter("embed.weight")[0] += 10  # of the padding token
    torch.testing.assert_close(model(tokens), expected)


def test_gradients_balance_on_the_features_alone() -> None:
    base, inputs = make("masked")
    scale = torch.ones(4, 1, requires_grad=True)
    model = convert(base, inputs | {"scale": torch.rand(4, 1)}, num_heads=3, split_at="add").train()
    call(model, inputs | {"scale": scale}).mean(0).sum().backward()
    embedded = model.trunk.get_parameter("embed.weight").grad
    model.zero_grad()
    model.balance_gradients = False
    twin = torch.ones(4, 1, requires_grad=True)
    call(model, inputs | {"scale": twin}).mean(0).sum().backward()
    assert scale.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(embedded, model.trunk.get_parameter("embed.weight").grad)
    # outputs' gradients grow by K; only the features' shrink by K again
    torch.testing.assert_close(scale.grad, 3 * twin.grad)


def test_a_size_that_the_graph_cannot_follow_is_refused_by_the_model() -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x).relu().sum((2, 3)) / int(x.shape[2] * x.shape[3]))  # a plain number

    base = Flattened()
    model = convert(base, torch.randn(2, 3, 8, 8)).eval()
    with pytest.raises(InputError, match=r"Input 'x' must have the shape \(any, 3, 8, 8\), got \(2, 3, 16, 8\)"):
        model(torch.randn(2, 3, 16, 8))
    assert model(torch.randn(5, 3, 8, 8)).shape == (5, 4)


def test_a_loop_over_a_size_is_not_cut_short() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.cell, self.out = nn.Linear(6, 32), nn.GRUCell(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.shape[0], 32)
            for t in range(x.shape[1]):
                state = self.cell(self.inward(x[:, t]), state)
            return self.out(state)

    model = convert(Loop(), torch.randn(3, 5, 6), 1, 2.0, "input", init="inherit").eval()
    for length in (3, 5, 9):
        if length == 5:
            assert model(torch.randn(2, length, 6)).shape == (2, 4)
        else:
            with pytest.raises(InputError, match=r"Input 'x' must have the shape \(any, 5, 6\)"):
                model(torch.randn(2, length, 6))


def test_dimensions_of_one_size_may_follow_together() -> None:
    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.last((adjacency + torch.eye(x.shape[1])) @ self.first(x).relu()).sum(1)

    base = Graphs()
    model = convert(base, (torch.randn(3, 5, 6), torch.rand(3, 5, 5)), 1, 2.0, init="inherit").eval()
    inputs = (torch.randn(2, 7, 6), torch.rand(2, 7, 7))
    torch.testing.assert_close(model(*inputs), base(*inputs))


def test_divisions_by_a_width_follow_the_width() -> None:
    class Normalised(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.plain, self.first, self.last = plain, nn.Linear(8, 256), nn.Linear(256, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            size = h.size(1)
            root = float(size) ** 0.5 if self.plain else size**0.5
            return self.last(h / h.norm(dim=1, keepdim=True) * root)

    with pytest.raises(BudgetError):  # a plain number keeps its size
        convert(Normalised(plain=True), torch.randn(4, 8), 1, 0.5, split_at="input")
    for plain, budget in ((False, 0.5), (True, 1.0)):
        model = convert(Normalised(plain), torch.randn(4, 8), 1, budget, split_at="input").eval()
        norms: list[Tensor] = []
        model.heads[0].get_submodule("last").register_forward_pre_hook(lambda _, args, n=norms: n.append(args[0]))
        model(torch.randn(64, 8))
        width = norms[0].shape[1]
        assert (width == 256) == plain, "a plain number keeps its size"
        assert norms[0].square().mean().item() == pytest.approx(1.0, rel=1e-4)


def test_named_inputs_go_by_position_only_where_the_base_has_them_so() -> None:
    base, inputs = make("masked")
    model = convert(base, dict(reversed(inputs.items()))).eval()
    torch.testing.assert_close(model(inputs["ids"], inputs["mask"]), model(**inputs))
    gap = {"ids": inputs["ids"], "scale": torch.rand(4, 1)}

    class Gap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Masked()

        def forward(self, ids: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
            return self.net(ids, torch.ones(ids.shape) if mask is None else mask, scale)

    model = convert(Gap(), gap).eval()
    assert model(**gap).shape == (4, 5)
    with pytest.raises(TypeError, match="keyword-only"):
        model(*gap.values())  # the second one is the mask, for the base


def test_several_outputs_are_stacked_each() -> None:
    torch.manual_seed(0)
    base, x = Auxiliary().eval(), torch.randn(4, 8)
    model = convert(base, x, 3, output=["logits", "aux"], split_at="stem", budget=2.0, init="inherit")
    logits, aux = model.train()(x)
    assert (logits.shape, aux.shape) == ((3, 4, 3), (3, 4, 2))
    (logits.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    whole = convert(base, x, 1, output=("logits", "aux"), split_at="stem", budget=2.0, init="inherit").eval()
    for got, name in zip(whole(x), ("logits", "aux"), strict=True):
        torch.testing.assert_close(got, base(x)[name])
    for got, expected in zip(fuse(model)(x), model(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_logits_are_taken_without_being_asked_for() -> None:
    base, x = Auxiliary(), torch.randn(4, 8)
    assert convert(base, x, 2).train()(x).shape == (2, 4, 3)
    assert convert(base, x, 2, output="aux").train()(x).shape == (2, 4, 2)
    with pytest.raises(ConversionError, match=r"no tensor 'auxiliary' in it: output= takes one of \['logits', 'aux'"):
        convert(base, x, 2, output="auxiliary")


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_models_load(name: str, tmp_path: Path) -> None:
    base, inputs = make(name)
    model = convert(base, inputs, budget=1.2).eval()
    again = load(save(model, tmp_path / "model"), base).eval()
    assert again.recipe == model.recipe
    for other in (inputs, *others(name)):
        assert torch.equal(call(again, other), call(model, other))


def test_trunks_by_hand_give_heads_what_they_take() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 16)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), mask

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, features: Tensor, mask: Tensor) -> Tensor:
            return self.layer(features * mask)

    model = EnsembleNet(Trunk(), [Head() for _ in range(2)])
    x, mask = torch.randn(5, 8), torch.rand(5, 16)
    assert model.train()(x, mask=mask).shape == (2, 5, 3)
    expected = torch.stack([model.head(k)(x, mask) for k in range(2)])
    torch.testing.assert_close(model(x, mask), expected)
    torch.testing.assert_close(fuse(model, (x, mask))(x, mask), expected)


class Wrapper(nn.Module):
    """A network one level deeper."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(**inputs)


class Looked(nn.Module):
    """Embeddings and a residual layer in a module of their own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"embed": nn.Embedding(100, width), "first": nn.Linear(width, hidden)})
        self.second, self.out = nn.Linear(hidden, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.net["embed"](ids)
        return self.out((h + self.second(self.net["first"](h).relu())).mean(1))


def test_embeddings_are_shared_though_heads_would_be_a_little_wider_without() -> None:
    base, tokens = Looked(32, 120), torch.randint(0, 100, (4, 7))
    unshared, shared = (convert(base, tokens, split_at=name).recipe.head.width for name in ("input", "net.embed"))  # type: ignore[union-attr]
    assert 0.9 * unshared < shared < unshared
    assert convert(base, tokens).recipe.split_at == "net.embed"  # type: ignore[union-attr]


class Shallow(nn.Module):
    """Embeddings that no heads share willingly: behind them they would be much narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.out = nn.Linear(64, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.out((h + self.second(self.first(h).relu())).mean(1))


@pytest.mark.parametrize(("base", "inputs"), [(Masked(), masked(4)), (Shallow(), {"ids": ids(4)})])
def test_the_automatic_split_is_the_same_for_a_wrapped_network_and_shares_rather_than_not(
    base: nn.Module, inputs: dict[str, Tensor]
) -> None:
    alone, wrapped = (convert(net, inputs).recipe for net in (base, Wrapper(Wrapper(base))))
    assert alone is not None
    assert wrapped is not None
    assert alone.split_at != "input"
    assert wrapped.split_at == f"net.net.{alone.split_at}"


class Weighted(nn.Module):
    """A graph network, whose edges have rows too: with as many edges as nodes, nothing tells these from examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, nodes: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        edges = edges.T  # (2, E)
        h = self.first(nodes).relu()
        return self.last(torch.zeros_like(h).index_add(0, edges[1], weights[:, None] * h[edges[0]]))


@pytest.mark.parametrize("edges", [5, 6])
def test_rows_that_are_no_examples_do_not_mislead(edges: int, tmp_path: Path) -> None:
    def inputs(n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 8), torch.tensor([[4, 0]] * edges), torch.rand(edges)

    base = Weighted()
    model = convert(base, inputs(5)).eval()
    assert model(*inputs(5)).shape == (5, 4)
    again = load(save(model, tmp_path / "model"), base)
    x = inputs(5)
    assert torch.equal(again(*x), model(*x))
    if edges == 5:  # one cannot know which of the rows are nodes
        with pytest.raises(InputError, match=r"'nodes' must have the shape \(5, 8\), got \(7, 8\)"):
            model(*inputs(7))
    else:
        assert model(*inputs(7)).shape == (7, 4)


def test_layers_that_could_not_be_narrowed_before_keep_the_sizes_that_were_saved() -> None:
    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    recipe = convert(base, torch.randn(4, 8), split_at="input").recipe
    assert recipe is not None
    new = rebuild(base, recipe).heads[0].state_dict()
    assert new["2.weight"].shape < (64, 64)
    sizes = {name: tuple(tensor.shape) for name, tensor in new.items()}
    kept = {"2.weight": (64, 64), "2.bias": (64,), "0.weight": (64, 8), "0.bias": (64,), "4.weight": (3, 64)}
    old = rebuild(base, recipe, sizes | kept).heads[0].state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in old.items()} == sizes | kept
