import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ensemblenet import CoDistillationLoss, EnsembleNet


def by_hand(num_heads: int = 3, **options: object) -> EnsembleNet:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return EnsembleNet(trunk, [nn.Linear(8, 4) for _ in range(num_heads)], **options)  # type: ignore[arg-type]


x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
y = torch.tensor([0, 1, 2, 3, 0])


def test_outputs_are_those_of_the_parts() -> None:
    model = by_hand()
    expected = torch.stack([head(model.trunk(x)) for head in model.heads])
    assert torch.equal(model.train()(x), expected)
    assert torch.equal(model.eval()(x, per_head=True), expected)
    assert torch.allclose(model(x), expected.mean(0))
    assert all(torch.equal(model.head(k)(x), expected[k]) for k in range(3))
    assert torch.allclose(model.first(2)(x), expected[:2].mean(0))


def test_probabilities_combine_to_their_mean() -> None:
    model = by_hand(combine="probabilities").eval()
    probabilities = model(x, per_head=True).softmax(-1).mean(0)
    assert torch.allclose(model(x).softmax(-1), probabilities, atol=1e-6)


def test_parts_share_their_parameters_with_the_model() -> None:
    model = by_hand()
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in model.head(1).parameters()} <= own
    assert {id(parameter) for parameter in model.first(2).parameters()} <= own


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_balanced_gradients_are_k_times_the_plain_ones_in_heads_and_the_plain_ones_in_the_trunk(num_heads: int) -> None:
    balanced, plain = by_hand(num_heads), by_hand(num_heads, balance_gradients=False)
    losses = []
    for model in (balanced, plain):
        losses.append(CoDistillationLoss(weight=2.0)(model.train()(x), y))
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    for (name, left), right in zip(balanced.named_parameters(), plain.parameters(), strict=True):
        times = num_heads if name.startswith("heads") else 1
        assert left.grad is not None
        assert right.grad is not None
        torch.testing.assert_close(left.grad, times * right.grad)


def test_under_sgd_heads_that_are_the_base_learn_as_fast_as_the_base() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = EnsembleNet(copy.deepcopy(base[:2]), [copy.deepcopy(base[2]) for _ in range(4)])
    for network, loss in [
        (base, lambda out: F.cross_entropy(out, y)),
        (model, lambda out: CoDistillationLoss(weight=1.0)(out, y)),
    ]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss(network.train()(x)).backward()
            optimizer.step()
    for k in range(4):
        torch.testing.assert_close(model.head(k)(x), base(x))


def test_works_under_compile_and_autocast_and_copies() -> None:
    model = by_hand()
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    criterion = CoDistillationLoss(weight=2.0)
    criterion(compiled(x), y).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    criterion(model(x), y).backward()
    for left, right in zip(gradients, model.parameters(), strict=True):
        assert right.grad is not None
        torch.testing.assert_close(left, right.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(model(x), y).dtype == torch.float32
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("trunk", [nn.Linear(2, 2)]), TypeError, r"trunk must be an nn\.Module, got str"),
        ((nn.Identity(), [nn.Linear(2, 2), 3]), TypeError, r"heads\[1\] must be an nn\.Module, got int"),
        ((nn.Identity(), []), ValueError, "heads must hold at least one module, got none"),
        ((nn.Identity(), [nn.Identity()], "votes"), ValueError, "combine"),
    ],
)
def test_bad_parts(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EnsembleNet(*arguments)


def test_heads_that_are_not_there() -> None:
    model = by_hand()
    with pytest.raises(IndexError, match=r"head index must be in \[0, 3\), got 3"):
        model.head(3)
    with pytest.raises(ValueError, match=r"first\(k\) needs k in \[1, 3\], got 0"):
        model.first(0)


def kept_for_backward(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps from a forward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x)  # its graph must live while pointers are counted
    del outputs
    return sum(kept.values())


def test_checkpointed_heads_train_alike_in_less_memory() -> None:
    torch.manual_seed(0)

    def layers() -> list[nn.Module]:
        return [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]

    heads = [nn.Sequential(*layers(), *layers(), nn.Flatten(), nn.Linear(256, 3)) for _ in range(3)]
    plain = EnsembleNet(nn.Conv2d(1, 4, 1), heads).double().train()
    plain.heads[1][1].momentum = None  # a cumulative average: how many updates there were counts
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpoint_activations = True
    for _ in range(3):
        x = torch.randn(5, 1, 8, 8).double()
        gradients = []
        for model in (plain, checkpointed):
            torch.manual_seed(1)
            own = x.clone().requires_grad_()
            model.zero_grad()
            model(own).square().sum().backward()
            gradients.append([own.grad, *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    for left, right in zip(plain.buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(checkpointed.eval()(x), plain.eval()(x))
    assert kept_for_backward(checkpointed.train(), x) < kept_for_backward(plain.train(), x) / 4
