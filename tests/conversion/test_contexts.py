"""no_grad, autocast, and what acts in the backward pass alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_alike import Net, assert_trains_alike

import ensemblenet
from ensemblenet import ConversionError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def _statistic(net: Any, x: Tensor) -> Tensor:
    h = net.first(x).relu()
    with torch.no_grad():
        mean = h.mean(1, keepdim=True)
    return net.last(net.middle(h - mean).relu())


def _frozen_backbone(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.first(x)
    return net.last(net.middle(h.relu()).relu())


def _set_grad_enabled(net: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        h = net.first(x)
    return net.last(net.middle(h).relu())


def _by_mode(net: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(net.training):
        h = net.first(x)
    return net.last(net.middle(h).relu())


@torch.no_grad()
def _reshaped(net: Any, x: Tensor) -> Tensor:
    return net.first(x).view(x.shape[0], 8, 8).transpose(1, 2).reshape(x.shape[0], 64)


def _decorated(net: Any, x: Tensor) -> Tensor:
    return net.last(net.middle(_reshaped(net, x)).relu())


def _inference_mode(net: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = net.first(x)
    return net.last(net.middle(h.clone()).relu())


def _enabled_again(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.first(x)
        with torch.enable_grad():
            h = net.middle(h.relu())
    return net.last(h.relu())


def _autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = net.middle(net.first(x).relu())
    return net.last(h.float().relu())


@torch.autocast("cpu", dtype=torch.bfloat16)
def _all_in_autocast(net: Any, x: Tensor) -> Tensor:
    return net.last(net.middle(net.first(x).relu()).relu())


def _nested_autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = net.first(x).relu()
        with torch.autocast("cpu", enabled=False):
            h = net.middle(h.float())
        return net.last(h.relu())


def _autocast_of_another_device(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return net.last(net.middle(net.first(x).relu()))


@pytest.mark.parametrize(
    "forward",
    [
        _statistic, _frozen_backbone, _set_grad_enabled, _by_mode, _decorated, _inference_mode, _enabled_again,
        _autocast, _all_in_autocast, _nested_autocast, _autocast_of_another_device,
    ],
)  # fmt: skip
@pytest.mark.parametrize("split_at", ["input", "first"])
def test_operations_keep_their_contexts(forward: Callable[[Any, Tensor], Tensor], split_at: str) -> None:
    assert_trains_alike(Net(forward), X, split_at)


def test_a_block_without_autocast_stays_without_it_in_an_autocast_of_the_callers() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = net.middle(net.first(x.float()).relu())
        return net.last(h)

    base = Net(forward)
    model = ensemblenet.convert(base, X, 1, 5.0, split_at="input", init="inherit").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(X), base.eval()(X))


def test_contexts_hold_in_narrow_and_fused_heads_and_in_compiled_ones() -> None:
    model = ensemblenet.convert(Net(_decorated), X, 2, split_at="input").eval()
    fused = ensemblenet.fuse(model)
    torch.testing.assert_close(fused(X), model(X))
    fused.train()(X).sum().backward()
    torch.compile(model.train(), backend="eager", fullgraph=True)(X).sum().backward()
    for head in model.heads:
        assert head.get_parameter("first.weight").grad is None
        assert head.get_parameter("last.weight").grad is not None


def test_a_layer_in_two_contexts_is_refused_and_detach_is_the_way_out() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        with torch.no_grad():
            target = net.middle(h)
        return net.last(net.middle(h) - target * 0.5)

    def detached(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        return net.last(net.middle(h) - net.middle(h).detach() * 0.5)

    with pytest.raises(ConversionError, match=r"middle \(Linear\) at test_contexts.py:\d+ calls.* detach\(\)"):
        ensemblenet.split_points(Net(forward), X)
    assert_trains_alike(Net(detached), X)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -ctx.scale * gradients[0], None


class _Threefold(_Reverse):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 3 * gradients[0], None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 0.1 * gradients[0]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


class _TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return gradients[0] * y + gradients[1], gradients[0] * x - gradients[1]


reverse = _Reverse.apply  # as it is often kept


def _without_gradients(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = _Reverse.apply(net.first(x))
    return net.last(net.middle(h))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.last(net.middle(reverse(net.first(x), 0.5).relu())),
        lambda net, x: net.last(net.middle(_Threefold.apply(net.first(x)).relu())),
        lambda net, x: net.last(net.middle(_ScaledGradient.apply(net.first(x)).relu())),
        lambda net, x: net.last(net.middle(_StraightThrough.apply(net.first(x)))),
        lambda net, x: net.last(sum(_TwoOutputs.apply(h := net.first(x), net.middle(h)))),
        _without_gradients,
    ],
    ids=["reverse", "derived", "input returned", "setup_context", "two outputs", "no_grad"],
)
def test_autograd_functions_keep_their_backward_pass(forward: Callable[[Any, Tensor], Tensor]) -> None:
    assert_trains_alike(Net(forward), X)
    assert ensemblenet.convert(Net(forward), X, budget=0.9).recipe.head.width < 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_followed(use_reentrant: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        h = checkpoint(net.middle, h, use_reentrant=use_reentrant) if net.training else net.middle(h)
        return net.last(h.relu())

    assert_trains_alike(Net(forward), X)


def test_hooks_on_gradients_inside_of_forward_are_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 0.1)
        return net.last(h)

    with pytest.raises(ConversionError, match=r"Net at test_contexts.py:\d+ puts a hook .*autograd.Function"):
        ensemblenet.split_points(Net(forward), X)


def _plain(net: Any, x: Tensor) -> Tensor:
    return net.last(net.middle(net.first(x)).relu())


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_refused(kind: str) -> None:
    base = Net(_plain)
    getattr(base.middle.weight, kind)(lambda tensor: None)
    with pytest.raises(ConversionError, match=r"'middle.weight' has a hook on its gradient"):
        ensemblenet.split_points(base, X)


def test_hooks_of_modules_are_kept_or_refused() -> None:
    base = Net(_plain)
    base.middle.register_full_backward_hook(lambda layer, inner, outer: (inner[0] * 0.1,))
    base.middle.register_forward_hook(lambda layer, args, out: out * 2)
    base.first = nn.Sequential(base.first, nn.ReLU())
    base.first.register_forward_hook(lambda layer, args, out: out + 1)
    assert_trains_alike(base, X)
    base.first.register_full_backward_hook(lambda layer, inner, outer: None)
    with pytest.raises(ConversionError, match=r"first \(Sequential\) .* has a backward hook"):
        ensemblenet.split_points(base, X)


def test_gradients_taken_inside_of_forward_are_refused() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        (gradient,) = torch.autograd.grad(h.sum(), net.first.weight, create_graph=True)
        return net.last(h) * gradient.sum()

    with pytest.raises(ConversionError, match=r"test_contexts.py:\d+ takes gradients inside"):
        ensemblenet.split_points(Net(forward), X)


def test_layers_that_stay_in_evaluation_mode_do_so_in_the_model() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self.norm.eval()
            return self

    base = Frozen(lambda net, x: net.last(net.norm(net.first(x)).relu()), norm=nn.BatchNorm1d(64))
    assert_trains_alike(base, X)
    model = ensemblenet.convert(base, X, 2, split_at="input").train()
    looped = model(X)
    torch.testing.assert_close(ensemblenet.fuse(model)(X), looped)


def test_a_difference_in_training_is_found_whatever_it_comes_from() -> None:
    class Other(Net):
        def train(self, mode: bool = True) -> "Other":
            self.middle.weight.requires_grad_(not mode)  # nothing that a trace can see
            return super().train(mode)

    with pytest.raises(
        ConversionError, match=r"the gradient of 'middle.weight' differs between the base and its graph"
    ):
        ensemblenet.split_points(Other(_plain), X)
