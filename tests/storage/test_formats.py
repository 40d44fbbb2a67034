"""Saved models of every format that there has been load, and give what they gave."""

import json
from pathlib import Path

import pytest
import torch
from saved_models import BASES, SAVED, inputs

from ensemblenet import load
from ensemblenet.inputs import call
from ensemblenet.recipe import FORMAT, Recipe

FORMATS = sorted(path.name for path in SAVED.iterdir())


def test_every_format_has_a_saved_model() -> None:
    assert [f"format{version}" for version in range(1, FORMAT + 1)] == FORMATS


@pytest.mark.parametrize(("version", "name"), [(path.parent.name, path.name) for path in sorted(SAVED.glob("*/*/"))])
def test_a_saved_model_gives_what_it_gave(version: str, name: str) -> None:
    base = None if name == "known" else BASES[name][0]()
    model = load(SAVED / version / name, base)
    outputs = json.loads((SAVED / version / "outputs.json").read_text())
    with torch.no_grad():
        assert call(model, inputs(name), per_head=True).tolist() == outputs[name]
    assert model.recipe is not None
    assert model.recipe.head.pinned == (("conv_transpose1d",) if name == "pinned" else ())


@pytest.mark.parametrize("name", ["known", "pinned"])
def test_recipes_of_the_first_formats_say_the_same(name: str) -> None:
    first, second = (Recipe.from_json((SAVED / f"format{k}" / name / "recipe.json").read_text()) for k in (1, 2))
    assert first == second
    assert (first.inputs.tree, first.inputs.only.fixed, first.output, first.head.blocks) == (0, (), None, "fewer")


def test_old_names_of_a_recipes_fields_are_answered_with_a_warning() -> None:
    recipe = Recipe.from_json(Path(SAVED, "format1", "pinned", "recipe.json").read_text())
    new = {
        "input_shape": recipe.inputs.shape,
        "input_dtype": recipe.inputs.dtype,
        "width": recipe.head.width,
        "multiple": recipe.head.multiple,
        "frozen": recipe.head.pinned,
    }
    for name, value in new.items():
        with pytest.deprecated_call(match=rf"Recipe\.{name} is now Recipe\.(inputs|head)\."):
            assert getattr(recipe, name) == value
