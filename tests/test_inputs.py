"""Example inputs of the right shape, dtype and device."""

import pytest
import torch

from ensemblenet.inputs import DTYPES, InputSpec


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_has_the_dtype_of_the_batch_that_it_was_specified_by(dtype: str) -> None:
    batch = torch.ones(4, 3, 8).to(getattr(torch, dtype))
    spec = InputSpec.of(batch)
    assert spec == InputSpec((3, 8), dtype)
    for made in (spec.zeros(2), spec.random(2)):
        assert (made.shape, made.dtype) == ((2, 3, 8), batch.dtype)
        assert ((made >= 0) & (made <= 1)).all()
    assert torch.equal(spec.random(), spec.random())


def test_zeros_go_where_the_network_is_but_integers_stay_integers() -> None:
    parameter = torch.zeros(1, dtype=torch.float64, device="meta")
    made = InputSpec((3,)).zeros(like=parameter)
    assert (made.dtype, made.device.type) == (torch.float64, "meta")
    assert InputSpec((3,), "int64").zeros(like=parameter).dtype == torch.int64
