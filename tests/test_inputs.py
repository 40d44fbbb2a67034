"""Example inputs of the right shape, dtype and device."""

import pytest
import torch
from torch import nn

from ensemblenet.inputs import DTYPES, InputSpec


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
