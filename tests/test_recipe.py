"""What is asked of a conversion is checked where it is said; `storage/test_checkpoint.py` damages saved recipes."""

from dataclasses import asdict, fields
from inspect import signature

import pytest
import torch
from torch import nn

from ensemblenet import Budget, ConversionError, convert
from ensemblenet.conversion.convert import convert_as
from ensemblenet.recipe import Conversion

X = torch.randn(4, 8)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": True}, 'num_heads must be an integer of at least 1, or "auto", got True'),
        ({"num_heads": 0}, 'num_heads must be an integer of at least 1, or "auto", got 0'),
        ({"budget": -1}, "budget must be a positive number .* got -1"),
        ({"budget": Budget(parameters=0.5, macs=float("inf"))}, "budget must be a positive number .* got inf"),
        ({"budget": Budget(time=0.0)}, "budget must be a positive number .* got 0.0"),
        ({"init": "random"}, "init must be one of"),
        ({"min_width": 2}, "min_width must be a share"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(options: dict, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        Conversion(**options)


def test_convert_has_every_setting_of_a_conversion() -> None:
    parameters = signature(convert).parameters
    for field in fields(Conversion):
        default = 0 if field.name == "seed" else field.default  # of a run's conversion: the run's own
        assert parameters[field.name].default == default


def test_a_conversion_does_what_its_settings_do_one_by_one() -> None:
    wanted = Conversion(num_heads=3, budget=Budget(0.8, 0.9), split_at="1", seed=4, init="inherit")
    one, other = convert_as(wanted, base(), X), convert(base(), X, **asdict(wanted) | {"budget": wanted.budget})
    assert one.recipe == other.recipe
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_seed_of_none_is_pytorchs() -> None:
    wanted = Conversion(split_at="input")
    torch.manual_seed(7)
    model = convert_as(wanted, nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), X)
    assert model.recipe is not None
    assert model.recipe.seed == 7
