"""A layer type of a user's own takes one class, and the decorators of version 0.1 still work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ensemblenet import BudgetError, EnsembleNet, convert, fuse, load, save
from ensemblenet.conversion.trace import trace
from ensemblenet.operations import FIRST, LayerSizes, Operation, Program, Value, operation_of, register

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def layer_type() -> type[nn.Module]:
    """A new layer type, which checks a number of its own and does other things in each mode."""

    class Shifted(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width
            self.shift = nn.Parameter(torch.linspace(0, 1, width))

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == self.width, "another width"
            return x + self.shift if self.training else x + 2 * self.shift

    return Shifted


def network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), layer, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )


def narrow(layer: Any, base: Any, sizes: LayerSizes) -> None:
    layer.width = sizes.input[-1]


def fused_shift(program: Program, node: fx.Node) -> Value:
    shift = program.method("unsqueeze", program.parameter(node, "shift"), 1)
    out = program.call(torch.add, program.first(node.args[0]), shift, alpha=2)
    return Value(out, FIRST)


def converted(kind: type[nn.Module]) -> EnsembleNet:
    return convert(network(kind(64)), X, num_heads=3, budget=0.9, split_at="1")


def test_a_layer_of_ones_own_converts_trains_fuses_saves_and_loads(tmp_path: Path) -> None:
    kind = layer_type()

    @register(kind)
    class Shift(Operation):
        def narrow(self, layer: Any, base: Any, sizes: LayerSizes) -> None:
            narrow(layer, base, sizes)

    model = converted(kind)
    layer = model.heads[0].get_submodule("3")
    assert type(layer) is kind  # it stayed whole
    assert layer.width == layer.shift.numel() < 64
    assert not torch.equal(model.train()(X).mean(0), model.eval()(X))
    model.train()(X).square().mean().backward()
    assert all(head.get_submodule("3").shift.grad.any() for head in model.heads)
    model.eval()
    fused = fuse(model)
    torch.testing.assert_close(fused(X, per_head=True), model(X, per_head=True))
    assert fused.fusion is not None
    assert fused.fusion.by_vmap == ["_3"]
    again = load(save(model, tmp_path / "model"), network(kind(64)))
    assert torch.equal(again(X, per_head=True), model(X, per_head=True))


def test_a_class_may_say_how_its_layer_is_fused() -> None:
    kind = layer_type()

    @register(kind)
    class Shift(Operation):
        def narrow(self, layer: Any, base: Any, sizes: LayerSizes) -> None:
            narrow(layer, base, sizes)

        def fuse(self, program: Program, node: fx.Node) -> Value | None:
            return fused_shift(program, node)

    model = converted(kind).eval()
    fused = fuse(model)
    assert fused.fusion is not None
    assert (fused.fusion.by_vmap, fused.fusion.looped) == ([], [])
    torch.testing.assert_close(fused(X, per_head=True), model(X, per_head=True))
    with_hand = EnsembleNet(nn.Identity(), [nn.Sequential(nn.Linear(8, 6), kind(6)) for _ in range(2)]).eval()
    torch.testing.assert_close(fuse(with_hand)(X), with_hand(X))


def test_without_a_class_the_layer_is_opened_and_its_mode_is_refused() -> None:
    kind = layer_type()
    assert not operation_of(kind).is_whole
    with pytest.raises(BudgetError, match="do not fit"):
        converted(kind)


def test_a_class_serves_derived_types_but_fuses_only_with_the_same_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), Doubled(64, 64), nn.ReLU(), nn.Linear(64, 3))
    model = convert(base, X, budget=0.9, split_at="input").eval()
    layer = model.heads[0].get_submodule("2")
    assert isinstance(layer, Doubled)
    assert layer.in_features == layer.weight.shape[1] < 64
    torch.testing.assert_close(fuse(model)(X), model(X))


def test_a_later_class_takes_an_earlier_ones_place() -> None:
    kind = layer_type()
    for is_whole in (True, False):
        register(kind)(type("Again", (Operation,), {"is_whole": is_whole}))
        assert operation_of(kind).is_whole == is_whole


def test_types_of_other_libraries_are_found_by_name() -> None:
    from timm.layers import LayerNorm2d

    assert type(operation_of(LayerNorm2d)).__name__ == "ChannelLayerNorm"


def deprecated(decorator: Callable[..., Any], *names: Any) -> Callable[..., Any]:
    with pytest.deprecated_call(match="a class that ensemblenet.operations.register takes"):
        return decorator(*names)


def test_the_old_decorators_work_with_a_warning() -> None:
    from ensemblenet.conversion.equations import rule
    from ensemblenet.heads import fusion_rule
    from ensemblenet.operations.deprecated import layer_rule

    kind = layer_type()
    deprecated(layer_rule, kind)(narrow)
    deprecated(fusion_rule, kind)(fused_shift)
    model = converted(kind).eval()
    assert model.heads[0].get_submodule("3").width < 64
    fused = fuse(model)
    assert fused.fusion is not None
    assert not fused.fusion.by_vmap
    torch.testing.assert_close(fused(X), model(X))

    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unsqueeze(2).cummax(2).values.squeeze(2)

    assert convert(network(Largest()), X, budget=2.0, split_at="1").heads[0].get_submodule("5").in_features == 64

    @deprecated(rule, "cummax")
    def along(sizes: Any, event: Any) -> None:
        for out in event.out:
            sizes.set(out, list(sizes.axes(event.args[0])))

    assert convert(network(Largest()), X, budget=0.9, split_at="1").heads[0].get_submodule("5").in_features < 64


def test_an_old_layer_rule_extends_what_is_known_of_the_type() -> None:
    from ensemblenet.operations.deprecated import layer_rule

    class Scaled(nn.Linear):
        width = 64

    @deprecated(layer_rule, "Scaled")
    def scaled(layer: Scaled, base: Scaled, sizes: LayerSizes) -> None:
        assert layer.in_features == layer.weight.shape[1]  # the rule of nn.Linear came first
        layer.width = sizes.output[-1]

    base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), Scaled(64, 64), nn.ReLU(), nn.Linear(64, 3))
    layer = convert(base, X, budget=0.9, split_at="input").heads[0].get_submodule("2")
    assert layer.width == layer.out_features < 64


def test_the_trace_keeps_pytorchs_layers_whole_and_opens_others() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x))

    graph = trace(nn.Sequential(Block(), nn.Dropout(0.5)), X).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_function", "call_module", "output"]
