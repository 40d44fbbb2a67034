"""Fused heads against heads that run one after another, which are the reference for everything."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import ODD, LongSkip, TokenMixer
from torch import Tensor, fx, nn

import ensemblenet
from ensemblenet import CoDistillationLoss, EnsembleNet, convert
from ensemblenet.errors import FusionError
from ensemblenet.heads import FusedEnsembleNet, fuse, unfuse
from ensemblenet.operations import Operation, Program, Value, register

# The kinds of tests/test_zoo.py, small and shallow.
ZOO: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (64, {}),
    "densenet121": (64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "mobilenetv3_small_050": (96, {}),
    "regnety_002": (64, {}),
    "convnext_atto": (64, {"depths": (1, 1, 2, 1)}),
    "deit_tiny_patch16_224": (64, {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 4}),
    "test_vit3": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2, 2, 1)}),
    "timm:MlpMixer": (64, {"img_size": 64, "embed_dim": 64, "num_blocks": 4}),
    "test_coatnet": (160, {}),
    "test_nfnet": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "embed_dim": 64, "depth": 3}),
    "torchvision:squeezenet1_1": (64, {}),
    "torchvision:googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "torchvision:shufflenet_v2_x0_5": (96, {}),
    "torchvision:VisionTransformer": (
        64,
        {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128},
    ),
}
INEXACT = {
    "xcit_nano_12_p16_224": (1e-4, torch.float32),  # its own code casts to the type that it was traced in
    "torchvision:shufflenet_v2_x0_5": (1e-9, torch.float64),  # normalises channels that hardly vary
}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 2])


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    _, options = ZOO[name]
    if name == "timm:MlpMixer":
        return timm.models.mlp_mixer.MlpMixer(**options)
    if not name.startswith("torchvision:"):
        return timm.create_model(name, **options)
    name = name.removeprefix("torchvision:")
    if name == "VisionTransformer":
        return torchvision.models.VisionTransformer(**options)
    return torchvision.models.get_model(name, weights=None, **options)


def without_chance(model: EnsembleNet) -> EnsembleNet:
    """The model with every dropout switched off, so that two runs can be compared."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("drop_prob", "attn_drop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def assert_same(model: EnsembleNet, shape: tuple[int, ...], tolerance: float, dtype: torch.dtype) -> FusedEnsembleNet:
    """Compare everything that three training steps and a prediction give."""
    looped = without_chance(model).to(dtype).train()
    fused = fuse(copy.deepcopy(looped))
    generator = torch.Generator().manual_seed(0)
    criterion = CoDistillationLoss(2.0, "regression")
    optimizers = [torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9) for network in (looped, fused)]
    for step in range(3):
        x = torch.randn(4, *shape, generator=generator).to(dtype)
        results = []
        for network, optimizer in zip((looped, fused), optimizers, strict=True):
            own = x.clone().requires_grad_()
            optimizer.zero_grad()
            outputs = network(own)
            target = torch.linspace(-1, 1, outputs[0].numel(), dtype=dtype).view_as(outputs[0])
            criterion(outputs, target).backward()
            optimizer.step()
            results.append((outputs.detach(), own.grad))
        (expected, expected_x), (got, got_x) = results
        assert_close(got, expected, tolerance, f"outputs in step {step}")
        assert_close(got_x, expected_x, tolerance, f"the inputs' gradient in step {step}")
        largest = max(parameter.grad.abs().max() for parameter in looped.parameters())
        for (name, left), right in zip(looped.named_parameters(), fused.parameters(), strict=True):
            gap = (left.grad - right.grad).abs().max()
            assert gap <= tolerance * largest, f"the gradient of {name} in step {step} is off by {gap / largest:.1e}"
    for (name, left), right in zip(looped.named_buffers(), fused.buffers(), strict=True):
        assert_close(right, left, tolerance, name)
    with torch.no_grad():
        assert_close(fused.eval()(x), looped.eval()(x), tolerance, "the prediction")
        assert_close(fused(x[:1], per_head=True), looped(x[:1], per_head=True), tolerance, "that of one example")
    return fused


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    gap = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert gap <= tolerance, f"{what}: off by {gap:.1e} of the largest"


# -- the same function, for every kind of network


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ODD)
def test_odd_graphs(name: str, num_heads: int) -> None:
    factory, shape = ODD[name]
    torch.manual_seed(0)
    if name == "token mixer":
        base = TokenMixer()
        base.attend = lambda layer, x: attend_without_dropout(base, layer, x)  # its F.dropout cannot be switched off
    else:
        base = factory()
    model = convert(base, torch.randn(3, *shape), num_heads, 2.0, "input" if num_heads == 2 else "auto")
    fused = assert_same(model, shape, 1e-10, torch.float64)
    assert fused.fusion is not None
    assert fused.fusion.by_vmap == []
    assert set(fused.fusion.looped) <= ({"lstm", "gru"} if name == "recurrent" else set())


def attend_without_dropout(mixer: TokenMixer, layer: nn.ModuleDict, x: Tensor) -> Tensor:
    n, length, dim = x.shape
    q, k, v = layer["qkv"](x).reshape(n, length, 3, mixer.heads, dim // mixer.heads).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * (dim // mixer.heads) ** -0.5).softmax(-1)
    return layer["proj"]((weights @ v).transpose(1, 2).reshape(n, length, dim))


class Stacking(nn.Module):
    """Nodes called `stack`, `stacked` and so on between layers, which must not take the names of the heads' tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stacked, self.stacked_1, self.last = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = torch.stack([self.stacked(x), self.stacked_1(x)]).sum(0)
        return self.last(torch.stack([x, x.relu()]).sum(0))


def test_names_that_a_head_uses_are_not_taken() -> None:
    model = convert(Stacking(), torch.randn(3, 6), 3, 2.0, "input")
    assert_same(model, (6,), 1e-10, torch.float64)


@pytest.mark.parametrize("name", ["long skip", "shared", "1-d", "perceptron"])
def test_odd_graphs_in_float32(name: str) -> None:
    factory, shape = ODD[name]
    torch.manual_seed(0)
    assert_same(convert(factory(), torch.randn(3, *shape), 4), shape, 1e-5, torch.float32)


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    if name.startswith("test_") and not timm.is_model(name):
        pytest.skip("a network of a later timm")
    shape = (3, ZOO[name][0], ZOO[name][0])
    model = convert(create(name), torch.randn(2, *shape), 2)
    tolerance, dtype = INEXACT.get(name, (1e-10, torch.float64))
    fused = assert_same(model, shape, tolerance, dtype)
    assert fused.fusion is not None
    assert fused.fusion.looped == []
    with_bias = name == "test_coatnet"
    assert all(operation.startswith("scaled_dot") and with_bias for operation in fused.fusion.by_vmap)


# -- the same parameters, whatever becomes of them


def mixer(num_heads: int = 3) -> EnsembleNet:
    torch.manual_seed(0)
    return convert(TokenMixer(), IMAGES, num_heads)


def perceptron(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def by_hand(*heads: nn.Module) -> EnsembleNet:
    torch.manual_seed(0)
    return EnsembleNet(nn.Linear(5, 6), heads or [perceptron() for _ in range(3)])


def assert_alike(fused: EnsembleNet, model: EnsembleNet, x: Tensor) -> None:
    torch.testing.assert_close(fused.eval()(x, per_head=True), model.eval()(x, per_head=True), rtol=1e-4, atol=1e-5)


def test_the_saved_layout_is_the_plain_one_both_ways() -> None:
    model = mixer()
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse(model)
    assert [type(fused), fused.recipe, fused.cost] == [FusedEnsembleNet, model.recipe, model.cost]
    assert list(fused.state_dict()) == list(names)
    assert all(torch.equal(tensor, names[name]) for name, tensor in fused.state_dict().items())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
    assert fuse(fused) is fused
    plain = unfuse(fused)
    assert type(plain) is EnsembleNet
    assert unfuse(plain) is plain
    assert all(ours is theirs for ours, theirs in zip(plain.heads, model.heads, strict=True))


def test_single_heads_and_the_first_few_are_the_looped_ones() -> None:
    model = mixer().eval()
    fused = fuse(model)
    expected = model(IMAGES, per_head=True)
    for k in range(3):
        assert torch.equal(fused.head(k)(IMAGES), expected[k])
    assert torch.equal(fused.first(2)(IMAGES, per_head=True), expected[:2])


@pytest.mark.parametrize("start_fused", [True, False])
def test_a_run_may_change_its_mind_at_every_restart(start_fused: bool) -> None:
    torch.manual_seed(0)
    plain = convert(LongSkip(), IMAGES, 2).double().train()
    x, criterion = IMAGES.double(), CoDistillationLoss(2.0)

    def steps(network: EnsembleNet, state: dict | None) -> dict:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(2):
            optimizer.zero_grad()
            criterion(network(x), LABELS).backward()
            optimizer.step()
        return optimizer.state_dict()

    reference = copy.deepcopy(plain)
    steps(reference, steps(reference, None))
    first, second = (fuse(plain), copy.deepcopy(plain)) if start_fused else (plain, fuse(copy.deepcopy(plain)))
    buffer = io.BytesIO()
    torch.save([steps(first, None), first.state_dict()], buffer)
    buffer.seek(0)
    optimizer_state, weights = torch.load(buffer, weights_only=True)
    second.load_state_dict(weights)
    steps(second, optimizer_state)
    for left, right in zip(reference.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_saved_and_loaded(tmp_path: Path) -> None:
    fused = fuse(mixer()).eval()
    again = ensemblenet.load(ensemblenet.save(fused, tmp_path / "model"), TokenMixer())
    torch.testing.assert_close(fused(IMAGES), again(IMAGES))
    assert type(again) is EnsembleNet


def test_what_is_saved_of_one_head_is_no_larger_than_it() -> None:
    fused = fuse(by_hand())
    fused(torch.randn(4, 5))
    for tensor in fused.heads[1].state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def replace_in_place(model: EnsembleNet) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def replace_data(model: EnsembleNet) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def replace_parameters(model: EnsembleNet) -> None:
    model.heads[1][0].weight = nn.Parameter(torch.randn(8, 6))


def assign(model: EnsembleNet) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)


def convert_twice(model: EnsembleNet) -> None:
    model.double().float()


CHANGES = [replace_in_place, replace_data, replace_parameters, assign, convert_twice]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("of_the_fused", [True, False])
def test_every_change_of_the_parameters_is_seen(change: Callable[..., Any], of_the_fused: bool) -> None:
    model, x = by_hand(), torch.randn(4, 5)
    fused = fuse(model, x)
    assert_alike(fused, model, x)
    if change is assign or change is replace_parameters:  # these make new ones, which only one of the two gets to have
        fused = fuse(model, x)
    change(fused if of_the_fused else model)
    twin = unfuse(fused)
    with torch.no_grad():
        assert_alike(fused, twin, x)
    fused.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_copies_are_models_of_their_own() -> None:
    fused = fuse(mixer()).eval()
    expected = fused(IMAGES)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(twin) is FusedEnsembleNet
        assert torch.equal(twin(IMAGES), expected)
        for parameter in twin.parameters():
            parameter.data.zero_()
        assert torch.equal(fused(IMAGES), expected)


def test_frozen_heads_and_layers_keep_their_mode() -> None:
    model = by_hand().train()
    for head in model.heads:
        head[1].eval()
        head[0].weight.requires_grad_(False)
    fused, x = fuse(copy.deepcopy(model)), torch.randn(4, 5)
    torch.testing.assert_close(fused(x), model(x))
    fused(x).sum().backward()
    assert not fused.heads[0][1].training
    assert fused.heads[2][0].weight.grad is None
    assert torch.equal(fused.heads[0][1].running_mean, torch.zeros(8))
    assert not unfuse(fused).heads[1][1].training


# -- heads that were made by hand


class BySign(nn.Module):
    """A head whose operations depend on its input: no graph says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class ByMode(nn.Module):
    """A head that does one thing in training and another in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.training else self.layer(x).relu()


class Rare(nn.Module):
    """Operations for which there is no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 4)
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,co->no", self.pair(x, x), self.weight).sinh()


@pytest.mark.parametrize(
    ("kind", "by_vmap", "looped"),
    [(BySign, 0, 1), (ByMode, 1, 0), (Rare, 3, 0), (lambda: nn.Linear(6, 3), 0, 0), (perceptron, 0, 0)],
)
def test_what_has_no_rule_or_graph(kind: Callable[..., Any], by_vmap: int, looped: int) -> None:
    model, x = by_hand(*(kind() for _ in range(3))).double(), torch.randn(4, 5).double()
    fused = fuse(copy.deepcopy(model))
    assert fused.fusion is None  # it does not know its inputs yet
    for training in (True, False):
        torch.testing.assert_close(fused.train(training)(x, per_head=True), model.train(training)(x, per_head=True))
    assert (len(fused.fusion.by_vmap), len(fused.fusion.looped)) == (by_vmap, looped)
    fused(x).square().sum().backward()
    model(x).square().sum().backward()
    for left, right in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_a_part_with_hooks_runs_one_head_after_another() -> None:
    model, x = by_hand(), torch.randn(4, 5)
    for k, head in enumerate(model.heads):
        head[0].register_forward_hook(lambda module, args, out, k=k: out + k)
    fused = fuse(model)
    assert_alike(fused, model, x)
    assert fused.fusion.looped == ["_0"]


def test_a_head_with_hooks_runs_as_a_whole() -> None:
    model, x = by_hand(), torch.randn(4, 5)
    model.heads[2].register_forward_hook(lambda module, args, out: out + 1)
    fused = fuse(copy.deepcopy(model))
    assert_alike(fused, model, x)


class Writes(nn.Module):
    """Writes into a tensor that no head's parameters have touched."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 3)
        out[:, 1:] = self.layers(x)
        return out + 1


def test_writing_into_a_tensor() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    model = convert(Writes(), x, 3, 2.0, "input")
    fused = assert_same(model, (5,), 1e-10, torch.float64)
    assert fused.fusion is not None
    assert fused.fusion.looped == ["setitem"]


def test_dropout_in_place_on_what_the_trunk_gave() -> None:
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(6, 3)) for _ in range(2)]
    fused = fuse(EnsembleNet(nn.Linear(5, 6), heads)).train()
    fused(torch.randn(4, 5)).sum().backward()
    assert fused.trunk.weight.grad is not None


def test_parameters_lent_by_functional_call() -> None:
    model, x = by_hand().eval(), torch.randn(4, 5)
    fused = fuse(model, x)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    others = {name: parameter + 0.1 for name, parameter in own.items()}
    call = torch.func.functional_call
    torch.testing.assert_close(call(fused, others, (x,)), call(model, others, (x,)))
    got, expected = (
        torch.func.grad(lambda p, network=network: call(network, p, (x,)).square().sum())(others)
        for network in (fused, model)
    )
    for name in own:
        torch.testing.assert_close(got[name], expected[name])
    assert all(torch.equal(parameter, own[name]) for name, parameter in fused.named_parameters())


def test_heads_that_share_a_parameter() -> None:
    model, x = by_hand(), torch.randn(4, 5)
    model.heads[2][3].weight = model.heads[0][3].weight
    fused = fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(x), model(x))
    for network in (model, fused):
        network.train()(x).square().sum().backward()
    assert fused.heads[2][3].weight is fused.heads[0][3].weight
    for left, right in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)


def test_a_class_of_ones_own() -> None:
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    @register(Cube)
    class CubeOperation(Operation):
        def fuse(self, program: Program, node: fx.Node) -> Value:
            value = program.value(node.args[0])
            return Value(program.call(torch.pow, value.node, 3), value.layout)

    model = by_hand(*(nn.Sequential(nn.Linear(6, 3), Cube()) for _ in range(2)))
    assert_alike(fuse(model), model, torch.randn(4, 5))


def test_heads_of_unlike_structure_are_refused() -> None:
    model = by_hand(perceptron(8), perceptron(8), perceptron(12))
    with pytest.raises(FusionError, match=r"heads 0 and 2 differ: 0: Linear.*out_features=8.*out_features=12"):
        fuse(model)
    other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
    with pytest.raises(FusionError, match=r"heads 0 and 1 differ: 2: ReLU.* and 2: GELU.*leave it as it is"):
        fuse(by_hand(perceptron(), other))


def test_an_unknown_shape_cannot_be_compiled() -> None:
    compiled = torch.compile(fuse(by_hand()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call it once before it is compiled"):
        compiled(torch.randn(4, 5))


# -- gradients, chance, and PyTorch's tools


@pytest.mark.parametrize("balance", [True, False])
def test_balanced_gradients(balance: bool) -> None:
    model, x = by_hand().double(), torch.randn(4, 5).double()
    model.balance_gradients = balance
    fused = fuse(copy.deepcopy(model))
    for network in (model, fused):
        network.train()(x).square().mean().backward()
    for left, right in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_dropout_is_independent_for_every_head_and_keeps_its_rate() -> None:
    class Path(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    heads = [nn.Sequential(nn.Dropout(0.5), nn.Identity()) for _ in range(4)]
    fused = fuse(EnsembleNet(nn.Identity(), heads)).train()
    kept = fused(torch.ones(2000, 10)) > 0
    assert abs(kept.float().mean() - 0.5) < 0.02
    both = kept[0] & kept[1]
    assert abs(both.float().mean() - 0.25) < 0.02  # independent: half of a half
    paths = [nn.Sequential(timm.layers.DropPath(0.5)) for _ in range(2)]
    kept = fuse(EnsembleNet(nn.Identity(), paths)).train()(torch.ones(4000, 3)) > 0
    assert torch.equal(kept.any(2), kept.all(2))  # whole examples
    assert abs((kept[0] & kept[1]).float().mean() - 0.25) < 0.03


@pytest.mark.parametrize("name", ["long skip", "token mixer", "perceptron"])
def test_compiled_and_exported(name: str) -> None:
    torch.compiler.reset()
    factory, shape = ODD[name]
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    model = convert(factory(), x)
    fused = fuse(model)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    CoDistillationLoss(2.0)(compiled.train()(x), torch.zeros(4, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for _ in range(2):
        with torch.no_grad():
            expected = model.eval()(x)
            torch.testing.assert_close(compiled.eval()(x), expected)
            torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected)
        replace_in_place(model)  # as an average of weights does: the compiled program must see it


def test_autocast() -> None:
    model = mixer().eval()
    fused = fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(IMAGES, per_head=True)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), model(IMAGES, per_head=True), rtol=0.05, atol=0.05)


def test_a_training_step_under_autocast() -> None:
    torch.manual_seed(0)
    model = convert(LongSkip(), IMAGES, 3).train()
    fused = fuse(copy.deepcopy(model))
    gradients = []
    for network in (model, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = CoDistillationLoss(2.0)(network(IMAGES), LABELS)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


def test_fusing_under_autocast_leaves_nothing_in_its_cache() -> None:
    model = EnsembleNet(nn.Conv2d(3, 8, 3), [nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten()) for _ in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fuse(model, IMAGES)
        outputs = model(IMAGES)
    assert type(outputs) is torch.Tensor
    outputs.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_channels_last() -> None:
    torch.manual_seed(0)
    model = convert(LongSkip(), IMAGES, 3).eval()
    expected = model(IMAGES)
    fused = fuse(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(IMAGES.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    convolution = fused.heads[1].get_parameter("merge.weight")
    assert convolution.is_contiguous(memory_format=torch.channels_last)
