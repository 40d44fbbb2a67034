"""CoDistillationLoss: the pure function as a module."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.functional import codistillation
from ensemblenet.losses import CoDistillationLoss

Z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.parametrize(
    ("task", "target", "options"),
    [
        (
            "multiclass",
            Y,
            {"label_smoothing": 0.1, "class_weight": torch.arange(1.0, 5.0), "ignore_index": 1},
        ),
        ("multilabel", Z[0].sigmoid(), {"combine": "probabilities", "reduction": "sum"}),
        ("regression", Z[1], {"reduction": "none"}),
    ],
)
def test_is_the_pure_function(task: str, target: torch.Tensor, options: dict[str, Any]) -> None:
    example_weight = torch.arange(5.0)
    actual = CoDistillationLoss(3.0, task, **options)(Z, target, example_weight=example_weight)
    expected = codistillation(Z, target, 3.0, task, example_weight=example_weight, **options)
    assert torch.equal(actual, expected)
    with pytest.warns(DeprecationWarning, match="example_weight by its name"):
        assert torch.equal(CoDistillationLoss(3.0, task, **options)(Z, target, example_weight), expected)
    taught = CoDistillationLoss(3.0, task, teacher_weight=0.5, temperature=2.0, **options)
    teaching = {"teacher_logits": Z[2], "teacher_weight": 0.5, "temperature": 2.0}
    assert torch.equal(taught(Z, target, Z[2]), codistillation(Z, target, 3.0, task, **options, **teaching))


def test_the_weight_is_2_unless_given_and_may_change() -> None:
    criterion = CoDistillationLoss()
    assert torch.equal(criterion(Z, Y), codistillation(Z, Y, 2.0))
    criterion.weight = 0.5
    assert torch.equal(criterion(Z, Y), codistillation(Z, Y, 0.5))


def test_class_weight_is_a_buffer() -> None:
    criterion = CoDistillationLoss(class_weight=torch.arange(1.0, 5.0))
    assert list(criterion.state_dict()) == ["class_weight"]
    assert list(CoDistillationLoss().state_dict()) == []
    assert criterion.double()(Z.double(), Y).dtype == torch.float64


def test_trains_an_ensemble_and_refuses_its_combined_prediction() -> None:
    torch.manual_seed(0)
    model = EnsembleNet(nn.Linear(4, 8), [nn.Linear(8, 4) for _ in range(3)])
    criterion = CoDistillationLoss()
    x = torch.randn(5, 4)
    criterion(model.train()(x), Y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert criterion(model.eval()(x, per_head=True), Y).isfinite()
    with pytest.raises(ValueError, match=re.escape("model.train() or model(x, per_head=True)")):
        criterion(model(x), Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "must be a finite number of at least 0, got -1.0"),
        ({"task": "binary"}, "task must be one of"),
        ({"combine": "vote"}, "combine must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 1], got -0.1"),
        ({"label_smoothing": 0.1, "task": "regression"}, "has no label_smoothing"),
        ({"teacher_weight": -1.0}, "teacher_weight must be a finite number of at least 0, got -1.0"),
        ({"teacher_weight": 1.0, "temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_options_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CoDistillationLoss(**options)


def test_repr_shows_the_options() -> None:
    assert repr(CoDistillationLoss(weight=3.0)).startswith("CoDistillationLoss(weight=3.0, task='multiclass', combine")


def test_compiles_in_one_graph_with_its_gradient() -> None:
    criterion = CoDistillationLoss(2.0, label_smoothing=0.1)
    gradients = []
    for loss in (criterion, torch.compile(criterion, backend="aot_eager", fullgraph=True)):
        z = Z.clone().requires_grad_()
        loss(z, Y).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)
