"""Example inputs of the right shape, dtype and device."""

import pytest
import torch
from torch import nn

from ensemblenet import EnsembleNet
from ensemblenet.errors import DataError
from ensemblenet.inputs import DTYPES, Inputs, InputSpec, inputs_and_targets, one_example


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_has_the_dtype_of_the_batch_that_it_was_specified_by(dtype: str) -> None:
    batch = torch.ones(4, 3, 8).to(getattr(torch, dtype))
    spec = InputSpec.of(batch)
    assert spec == InputSpec((3, 8), dtype)
    for made in (spec.zeros(2), spec.random(2)):
        assert (made.shape, made.dtype) == ((2, 3, 8), batch.dtype)
        parts = torch.view_as_real(made) if made.is_complex() else made.double()
        assert ((parts >= 0) & (parts <= 1)).all()
    assert torch.equal(spec.random(), spec.random())


def test_random_flags_are_of_both_kinds() -> None:
    assert 0 < InputSpec((100,), "bool").random().double().mean() < 1


def test_zeros_go_where_the_network_is_but_integers_stay_integers() -> None:
    network = nn.Linear(3, 1, dtype=torch.float64, device="meta")
    made = InputSpec((3,)).zeros(like=network)
    assert (made.dtype, made.device.type) == (torch.float64, "meta")
    assert InputSpec((3,), "int64").zeros(like=network).dtype == torch.int64
    assert InputSpec((3,), "complex64").zeros(like=network).dtype == torch.complex128


@pytest.mark.parametrize(("weights", "inputs"), [("complex64", "float32"), ("complex128", "float64")])
def test_the_precision_of_complex_weights_is_that_of_real_inputs(weights: str, inputs: str) -> None:
    network = nn.Module()
    network.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    network.filter = nn.Parameter(torch.zeros(1, dtype=getattr(torch, weights)))
    assert InputSpec((3,)).zeros(like=network).dtype == getattr(torch, inputs)


def test_names_come_from_the_signature_the_keys_and_the_positions() -> None:
    x = torch.zeros(4, 8)
    inputs = Inputs.of((x, {"left": x, "right": [x, x]}))
    assert inputs.names(nn.Bilinear(8, 8, 2)) == ["input1", "input2_left", "input2_right_0", "input2_right_1"]
    assert Inputs.of({"ids": x, "mask": x}).names(nn.Identity()) == ["ids", "mask"]
    assert Inputs.of(x).names(nn.Linear(8, 2)) == ["input"]
    by_hand = EnsembleNet(nn.Bilinear(8, 8, 2), [nn.Linear(2, 3)])
    assert Inputs.of((x, x)).names(by_hand) == ["input1", "input2"]

    class Any(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat(tensors, 1)

    assert Inputs.of((x, x)).names(Any()) == ["input_0", "input_1"]


def test_a_batch_is_a_pair_or_a_dictionary_with_labels() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(4)
    for name in ("labels", "label"):
        inputs, targets = inputs_and_targets({"ids": x, name: y, "mask": x})
        assert (list(inputs), targets is y) == (["ids", "mask"], True)
    assert inputs_and_targets(({"ids": x}, y, "more")) == ({"ids": x}, y)
    with pytest.raises(DataError, match=r"must hold its targets as 'labels', got \['ids', 'target'\]\.$"):
        inputs_and_targets({"ids": x, "target": y})


def test_one_example_keeps_what_serves_all() -> None:
    x, edges = torch.zeros(4, 8), torch.zeros(2, 9, dtype=torch.int64)
    assert one_example((x, edges))[0] is x
    assert [len(tensor) for tensor in one_example((x, [x, x]))[1]] == [1, 1]
