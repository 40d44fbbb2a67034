import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import ODD, Dense, LongSkip, Recurrent, TokenMixer, perceptron
from torch import Tensor, nn

import ensemblenet
from ensemblenet import Budget, BudgetError, ConversionError, convert, plans, split_points
from ensemblenet.testing import check_conversion

X = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))


def make() -> nn.Module:
    torch.manual_seed(0)
    return perceptron()


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    base = make()
    first, again, other = (convert(base, X, seed=seed).eval() for seed in (3, 3, 4))
    assert torch.equal(first(X), again(X))
    assert not torch.equal(first(X), other(X))


def test_converting_leaves_the_base_and_the_random_state_alone() -> None:
    base = make().train()
    before, state = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    model = convert(base, X)
    assert base.training
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert not any("forward" in vars(module) for module in base.modules())


def test_names_of_the_bases_modules_survive() -> None:
    model = convert(LongSkip(), torch.randn(2, 3, 16, 16), split_at="merge")
    names = {name for name, _ in model.named_parameters()}
    assert {"trunk.down.0.weight", "heads.0.last.0.weight", "heads.1.classifier.bias"} <= names


@pytest.mark.parametrize("name", ODD)
def test_inherited_heads_hold_the_bases_own_channels(name: str) -> None:
    factory, shape = ODD[name]
    torch.manual_seed(0)
    base = factory()
    model = convert(base, torch.randn(3, *shape), init="inherit")
    theirs = dict(base.named_parameters())
    for key, parameter in model.named_parameters():
        part, _, rest = key.partition(".")
        original = theirs.get(rest.partition(".")[2] if part == "heads" else rest)
        if original is None:
            assert "projection" in key
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}
        else:
            assert torch.isin(parameter, original).all(), key


def test_one_inherited_head_of_full_width_is_the_base() -> None:
    base = make().eval()
    for point in split_points(base, X):
        if point.name != "4":
            model = convert(base, X, num_heads=1, init="inherit", split_at=point.name).eval()
            assert torch.equal(model(X), base(X)), point.name


def test_modes_still_differ_where_the_bases_do() -> None:
    base = TokenMixer()
    model = convert(base, torch.randn(2, 3, 16, 16), split_at="input")
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(model.train()(x), model(x)), "dropout, as a module and as a function, is off in training"
    assert torch.equal(model.eval()(x), model(x))


def test_batch_normalisation_keeps_statistics_per_head() -> None:
    model = convert(make(), X, split_at="input").train()
    model(X * 3 + 1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 2
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)
    assert not torch.equal(norms[0].running_mean, norms[1].running_mean)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(batch: int) -> None:
    for factory, shape in ODD.values():
        model = convert(factory(), torch.randn(3, *shape)).eval()
        assert len(model(torch.randn(batch, *shape))) == batch


def test_larger_images_than_the_example() -> None:
    model = convert(Dense(), torch.randn(2, 3, 16, 16), split_at="encode").eval()
    assert model(torch.randn(2, 3, 32, 24)).shape == (2, 7, 32, 24), "the trunk tells a head the size of its input"
    model = convert(Dense(), torch.randn(2, 3, 16, 16), split_at="input").eval()
    assert model(torch.randn(2, 3, 32, 24)).shape == (2, 7, 32, 24)


def test_recurrent_layers_of_heads_are_narrowed_and_their_own() -> None:
    model = convert(Recurrent(), torch.randn(3, 7, 6), split_at="input", budget=0.9)
    first, second = (module for module in model.modules() if isinstance(module, nn.LSTM))
    assert first.hidden_size == second.hidden_size < 24
    assert not torch.equal(first.weight_ih_l0, second.weight_ih_l0)


def test_plans_agree_with_conversions() -> None:
    base = make()
    for plan in plans(base, X, num_heads=3, budget=0.95):
        if plan.width is not None:
            model = convert(base, X, 3, 0.95, plan.split.name)
            assert model.cost == plan.cost
            assert model.recipe is not None
            assert model.recipe.head.width == plan.width


def test_a_budget_for_each_cost() -> None:
    model = convert(make(), X, budget=Budget(parameters=0.7, macs=2.0))
    assert model.cost is not None
    assert model.base_cost is not None
    assert model.cost.parameters <= 0.7 * model.base_cost.parameters


@pytest.mark.parametrize("limited", ["activations", "time"])
def test_a_budget_of_activations_or_time_makes_heads_narrower(limited: str) -> None:
    layers = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU())
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    base, x = nn.Sequential(*layers, *pool), torch.randn(2, 3, 96, 96)
    wide = convert(base, x, split_at="input")
    narrow = convert(base, x, split_at="input", budget=Budget(None, None, **{limited: 1.2}))
    assert wide.base_cost is not None
    shares = [getattr(model.cost.shares_of(wide.base_cost), limited) for model in (wide, narrow) if model.cost]
    assert shares[0] > 1.2 >= shares[1] > 1.0


def test_a_budget_that_is_too_small_names_what_is_limited() -> None:
    with pytest.raises(BudgetError, match=r"a budget of 0.001 of the base's time .* is [0-9.]+ of the time \(at "):
        convert(make(), X, budget=Budget(None, None, time=0.001))


@pytest.mark.parametrize("name", ["perceptron", "1-d", "token mixer", "long skip"])
def test_fresh_heads_begin_at_the_bases_scale(name: str) -> None:
    factory, shape = ODD[name]
    x = torch.randn(16, *shape)
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        base = factory().eval()
        ratios.append(
            (convert(base, x, 4, 1.0, seed=seed, shape="narrow").eval()(x, per_head=True).std() / base(x).std()).item()
        )
    assert 0.6 < torch.tensor(ratios).log().mean().exp() < 1.6, ratios


def test_fresh_weights_are_the_bases_initialisation_rescaled_by_fan_in() -> None:
    base = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    for layer in (base[0], base[2], base[4]):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.constant_(layer.bias, 0.25)
    model = convert(base, torch.randn(2, 256), 4, 1.0, split_at="input")
    layers = [module for module in model.heads[1].modules() if isinstance(module, nn.Linear)]
    assert layers[0].weight.std().item() == pytest.approx(0.02, rel=0.03)
    narrow = layers[1].in_features
    assert layers[1].weight.std().item() == pytest.approx(0.02 * (512 / narrow) ** 0.5, rel=0.03)
    assert all((layer.bias == 0.25).all() for layer in layers)


class Ends(nn.Module):
    """A base with something behind its last layer."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = make()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layers(x))


PROBABILITIES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("softmax", nn.Softmax(1)),
    ("softmax", lambda z: F.softmax(z, -1)[:, None].squeeze(1)),
    ("softmax", lambda z: z.exp() / z.exp().sum(1, keepdim=True)),
    ("sigmoid", nn.Sigmoid()),
    ("sigmoid", torch.sigmoid_),
    ("logsigmoid", F.logsigmoid),
]


@pytest.mark.parametrize(("name", "end"), PROBABILITIES)
def test_a_base_that_gives_probabilities_is_warned_about_once(name: str, end: Callable[[Tensor], Tensor]) -> None:
    for call in (convert, plans):
        with pytest.warns(UserWarning, match=f"leave the {name} out of the base") as caught:
            call(Ends(end), X)
        assert [warning.filename for warning in caught] == [__file__]  # one, of whoever called


@pytest.mark.parametrize("end", [nn.LogSoftmax(1), lambda z: z - z.exp().sum(1, keepdim=True).log()])
def test_logarithms_of_shares_are_no_logits_of_labels_of_their_own(end: Callable[[Tensor], Tensor]) -> None:
    with pytest.warns(UserWarning, match="leave the log_softmax out of the base"):
        convert(Ends(end), X, task="multilabel")


@pytest.mark.parametrize("end", [nn.LogSoftmax(1), F.relu, lambda z: z * z.sigmoid(), lambda z: 0 * z + 0.5])
def test_other_ends_of_a_base_are_not_warned_about(end: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Ends(end), X)


def test_a_base_of_regression_may_end_in_a_sigmoid() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Ends(torch.sigmoid), X, task="regression")


def test_log_softmax_changes_no_loss() -> None:
    z, y = torch.randn(3, 4, 5), torch.randint(5, (4,))
    criterion = ensemblenet.CoDistillationLoss()
    torch.testing.assert_close(criterion(z.log_softmax(2), y), criterion(z, y))


def test_auxiliary_outputs_are_dropped_with_a_warning() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.auxiliary = nn.Linear(20, 64), nn.Linear(64, 6), nn.Linear(64, 6)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.body(x).relu()
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    with pytest.warns(UserWarning, match="returns tuple of 2 in training mode; only its prediction is kept"):
        model = convert(Auxiliary(), X)
    assert not any("auxiliary" in name for name, _ in model.named_parameters())


def test_a_trained_base_deserves_inherit() -> None:
    base = make().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base(X)  # batches seen alone are no training
        convert(base, X)
    base(X).square().mean().backward()
    torch.optim.SGD(base.parameters(), 0.1).step()
    with pytest.warns(UserWarning, match='init="inherit"'):
        convert(base, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(base, X, init="inherit")


# -- what cannot be converted


class Branching(nn.Module):
    """Its course depends on its input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.layer = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the message names
            x = -x
        return self.layer(x)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Lambda(nn.Module):
    """A layer, and a function of its output."""

    def __init__(self, function: object, features: int = 6) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(20, features), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer(x))  # type: ignore[operator]


BAD = [
    ("not a module", lambda: "resnet50", X, {}, "base must be an nn.Module, got str"),
    ("no tensor", lambda: Lambda(lambda x: None), X, {}, "must return a tensor of shape .*, got NoneType"),
    (
        "several",
        lambda: Lambda(lambda x: (x, x)),
        X,
        {},
        r"returns tuple of 2; name the tensor .*: output= takes one of \[0, 1\]",
    ),
    ("unknown output", lambda: Lambda(lambda x: {"out": x}), X, {"output": "logits"}, "no tensor 'logits' .* one of"),
    ("values", Wrapped, X, {}, r"block \(Branching\) at test_convert.py:\d+ reads the values of a tensor"),
    ("by hand", Wrapped, X, {}, r"given by hand: ensemblenet\.EnsembleNet\(trunk, heads\)"),
    ("numpy", lambda: Lambda(lambda x: torch.from_numpy(x.numpy() * 2)), X, {}, "reads the values of a tensor"),
    ("split", make, X, {"split_at": "layer1"}, "Unknown split point 'layer1': did you mean"),
    ("near", LongSkip, torch.randn(2, 3, 16, 16), {"split_at": "merg"}, "Unknown split point 'merg': .*'merge'"),
    ("end", make, X, {"split_at": "3", "num_heads": 3, "budget": 0.5}, "3 heads do not fit a budget of 0.5"),
    ("no heads", make, X, {"num_heads": 0}, 'num_heads must be an integer of at least 1, or "auto", got 0'),
    ("half a head", make, X, {"num_heads": 1.5}, 'num_heads must be an integer of at least 1, or "auto", got 1.5'),
    ("budget", make, X, {"budget": 0}, "budget must be a positive number.*, got 0"),
    ("negative", make, X, {"budget": -1.0}, "budget must be a positive number.*, got -1.0"),
    ("not a number", make, X, {"budget": "half"}, "budget must be a positive number.*, got 'half'"),
    ("nan", make, X, {"budget": float("nan")}, "budget must be a positive number.*, got nan"),
    ("small", make, X, {"budget": 0.001}, r"The least possible is 0\.\d+ of the parameters and 0\.\d+ of the MACs"),
    ("device", make, X.to("meta"), {}, "example_inputs are on meta and the base is on cpu"),
    (
        "shape",
        make,
        X[:, :7],
        {},
        r"forward pass in evaluation mode, on an input of shape \(2, 7\), failed in 0 \(Linear",
    ),
    ("no batch", make, X[0], {}, r"must have the shape \(N, ...\) with N > 0, got \(20,\)"),
    ("two inputs", make, (X, X), {}, "takes 2 positional arguments but 3 were given"),
    ("no tensors", make, (X, "x"), {}, "must be a tensor, or a tuple or a dictionary of tensors, got str in them"),
    ("infinite", lambda: Lambda(lambda x: x / 0), X, {}, "outputs are not finite on the example inputs"),
    (
        "batch of one",
        make,
        X[:1],
        {},
        "With batch size 1 some layers cannot train: pass example_inputs with at least 2",
    ),
    ("init", make, X, {"init": "zeros"}, "init must be one of"),
    ("no parameters", nn.ReLU, X, {}, "no parameters that heads could have"),
    ("scripted", lambda: torch.jit.script(nn.Linear(20, 6)), X, {}, "got a scripted one; pass the module it came from"),
]


@pytest.mark.parametrize(("base", "x", "options", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input(base: object, x: object, options: dict, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(base() if callable(base) else base, x, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_the_bases_mode(training: bool) -> None:
    model = convert(make().train(training), X)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.filterwarnings("ignore:std")
def test_what_is_not_finite_only_when_narrow_is_found() -> None:
    class Standardize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.std(1, keepdim=True)  # of a single channel it is NaN

    base = nn.Sequential(nn.Linear(20, 2), Standardize(), nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 6))
    with pytest.raises(ConversionError, match="The converted model's outputs are not finite on the example inputs"):
        convert(base, X, num_heads=4, split_at="input")


def test_a_batch_size_turned_into_a_constant_is_found() -> None:
    with pytest.raises(ConversionError, match="turn the batch size into a constant"):
        convert(Lambda(lambda x: x.reshape(int(x.shape[0]), 6) * float(len(x))), X)


def test_a_budget_error_is_a_conversion_error_and_a_value_error() -> None:
    with pytest.raises(BudgetError):
        convert(make(), X, budget=0.001)
    assert issubclass(BudgetError, ConversionError)
    assert issubclass(ConversionError, ValueError)


def test_different_operations_in_the_two_modes_are_an_error_only_at_the_top() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x) if self.training else x

    base = nn.Sequential(nn.Linear(20, 64), Noisy(), nn.ReLU(), nn.Linear(64, 64), Noisy(), nn.Linear(64, 6))
    model = convert(base, X)
    assert not torch.equal(model.train()(X), model(X))

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(x) if self.training else x)

    with pytest.raises(ConversionError, match="different operations in training and evaluation mode"):
        convert(Top(), X)


def test_every_public_name_is_there() -> None:
    for name in ensemblenet.__all__:
        assert getattr(ensemblenet, name) is not None
    assert callable(ensemblenet.convert)


def test_buffers_that_are_parts_of_a_larger_memory_can_be_saved() -> None:
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("window", torch.hann_window(8))  # the first 8 of 9 numbers
            self.register_buffer("scale", torch.tensor(0.5).expand(32))
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x * self.window) * self.scale).relu())

    check_conversion(Windowed(), torch.randn(4, 8), split_at="mul#2", budget=2.0)
    check_conversion(Windowed(), torch.randn(4, 8), split_at="input", budget=2.0)


def test_a_compiled_base_is_what_it_compiles(tmp_path: Path) -> None:
    base, x = (
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)),
        torch.randn(4, 8),
    )
    compiled = torch.compile(base, backend="eager")
    assert isinstance(compiled, nn.Module)
    check_conversion(compiled, x)
    model = convert(compiled, x, seed=3).eval()
    again = ensemblenet.load(ensemblenet.save(model, tmp_path / "model"), base)
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(convert(base, x, seed=3).eval()(x), model(x))
