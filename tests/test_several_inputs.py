"""Models of several inputs: called by name and by position, with all that is done to models of one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Graph, Text, TwoAnswers, graph_batch, text_batch
from torch import Tensor, nn
from torch.testing import assert_close

from ensemblenet import CoDistillationLoss, EnsembleNet, InputError, convert, fuse, load, save
from ensemblenet.cost import measure_cost
from ensemblenet.heads import choose
from ensemblenet.heads.anytime import AnytimeError, predict_anytime
from ensemblenet.inputs import Tree, call

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]] = {
    # split where heads take the mask beside the features, by name; and where they take the edges, by position
    "text": (Text, text_batch, {"split_at": "add#2"}),
    "graph": (Graph, graph_batch, {}),
}


def made(name: str, **options: Any) -> tuple[EnsembleNet, Tree]:
    """A converted model, and inputs of another size than those that it was converted for."""
    torch.manual_seed(0)
    make, batch, settings = CASES[name]
    return convert(make(), batch(), **{"budget": 1.2, "shape": "narrow", **settings, **options}), batch(6, 14)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[EnsembleNet, Tree]:
    return made(request.param)


def loss_and_gradients(model: EnsembleNet, x: Tree) -> tuple[Tensor, list[Tensor]]:
    outputs = call(model.train(), x)
    loss = CoDistillationLoss()(outputs, torch.arange(outputs.shape[1]) % outputs.shape[2])
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def test_heads_take_an_input_beside_the_features(case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    given = call(model.trunk, x)
    assert isinstance(given, tuple)
    outputs = call(model.train(), x)
    assert_close(outputs, torch.stack([head(*given) for head in model.heads]))
    assert_close(call(model.eval(), x), outputs.mean(0))
    assert_close(call(model.head(1), x), outputs[1])
    assert_close(call(model.first(1), x), outputs[0])


def test_a_mask_reaches_the_heads() -> None:
    model, x = made("text")
    shown = copy.deepcopy(x)
    shown["ids"][x["mask"] == 0] = 7  # what is hidden may be anything
    assert_close(model.eval()(**shown), model(**x))
    assert not torch.allclose(model(x["ids"], torch.ones_like(x["mask"])), model(**x))


def test_fused_heads_give_and_learn_the_same(case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    expected, gradients = loss_and_gradients(model, x)
    got, others = loss_and_gradients(fuse(copy.deepcopy(model)), x)
    assert_close(got, expected)
    assert_close(others, gradients, atol=1e-6, rtol=1e-4)


def test_copies_and_checkpointing_learn_the_same(case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    expected = loss_and_gradients(model, x)
    other = made("text" if isinstance(x, dict) else "graph", seed=5)[0]
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert_close(loss_and_gradients(twin, x), expected)
    model.checkpoint_activations = True
    assert_close(loss_and_gradients(model, x), expected)


def test_autocast_changes_the_precision_alone(case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    expected = call(model.train(), x)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(model, x)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), expected, atol=0.05, rtol=0.05)


def test_a_compiled_model_gives_the_same_at_several_sizes() -> None:
    model, x = made("text")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for batch in (x, text_batch(5, 9), text_batch(3, 20)):
        assert_close(compiled(**batch), model(**batch))


def test_the_faster_way_is_measured_and_gives_the_same(case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    expected = call(model.eval(), x)
    for heads in ("auto", "fused", "looped"):
        chosen, choice = choose(copy.deepcopy(model).eval(), x, heads)
        assert set(choice.seconds) == ({"looped", "fused"} if heads == "auto" else set())
        assert_close(call(chosen, x), expected)


def test_costs_are_measured_as_they_were_planned(case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    assert model.recipe is not None
    planned, measured = model.cost, measure_cost(model, model.recipe.inputs.zeros(2))
    assert planned is not None
    assert measured.parameters == planned.parameters
    if isinstance(x, dict):  # of a graph, what an example costs is not what a node costs
        assert measured.macs == pytest.approx(planned.macs)


def test_early_stopping_takes_the_rows_of_all_that_heads_take() -> None:
    model, x = made("text", num_heads=3)
    result = predict_anytime(model.eval(), x, lambda outputs: torch.arange(outputs.shape[1]) % 2 == len(outputs) % 2)
    for k in range(1, 4):
        rows = result.heads_used == k
        assert_close(result.outputs[rows], model.first(k)(**x)[rows])
    assert len(result.heads_used.unique()) > 1


def test_early_stopping_needs_a_row_for_each_example() -> None:
    model, x = made("graph")
    with pytest.raises(AnytimeError, match=r"The trunk gives .*\(2, 14\) for 6 examples, not a row for each"):
        predict_anytime(model.eval(), x)


def test_a_saved_model_comes_back(tmp_path: Path, case: tuple[EnsembleNet, Tree]) -> None:
    model, x = case
    again = load(save(model, tmp_path / "saved"), Text() if isinstance(x, dict) else Graph())
    assert again.recipe == model.recipe
    assert torch.equal(call(again, x), call(model.eval(), x))


def test_a_size_that_was_fixed_is_refused_by_one_line() -> None:
    model, (_, edges) = made("graph")
    with pytest.raises(InputError, match=r"^Input 'x' must have the shape \(any, 8\), got \(6, 9\): [^\n]*$"):
        model(torch.zeros(6, 9), edges)


# -- by hand


class Pair(nn.Module):
    """A trunk that gives features and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.gate = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(x), self.gate(x)


class Gated(nn.Module):
    """A head that takes both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        return self.linear(features * gate.sigmoid())


@pytest.mark.parametrize("balance", [False, True])
def test_gradients_are_balanced_in_heads_and_features(balance: bool) -> None:
    torch.manual_seed(0)
    model = EnsembleNet(Pair(), [Gated() for _ in range(4)], balance_gradients=balance)
    x, y = torch.randn(5, 8), torch.arange(5) % 3

    plain = copy.deepcopy(model)
    features, gate = plain.trunk(x)
    outputs = torch.stack([head(features, gate) for head in plain.heads])
    CoDistillationLoss()(outputs, y).backward()
    CoDistillationLoss()(model(x), y).backward()

    assert_close(model.trunk.features.weight.grad, plain.trunk.features.weight.grad)  # pyright: ignore
    for head, other in zip(model.heads, plain.heads, strict=True):
        assert_close(head.linear.weight.grad, other.linear.weight.grad * (4 if balance else 1))  # pyright: ignore
    # the gate is no features: what heads send back to it is not divided by K again
    assert_close(model.trunk.gate.weight.grad, plain.trunk.gate.weight.grad * (4 if balance else 1))  # pyright: ignore


# -- several outputs


def test_an_auxiliary_output_is_learned_beside_the_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(TwoAnswers(), text_batch(), output=["logits", "aux"], budget=1.5)
    x = text_batch(6, 14)
    logits, aux = model.train()(**x)
    assert (logits.shape, aux.shape) == ((2, 6, 3), (2, 6, 2))
    criterion = CoDistillationLoss()
    (criterion(logits, torch.arange(6) % 3) + 0.3 * criterion(aux, torch.arange(6) % 2)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_close(fuse(copy.deepcopy(model))(**x), (logits, aux))
    assert_close(model.eval()(**x), (logits.mean(0), aux.mean(0)))
    again = load(save(model, tmp_path / "saved"), TwoAnswers())
    assert_close(again(**x), model(**x))
    assert again.recipe == model.recipe
