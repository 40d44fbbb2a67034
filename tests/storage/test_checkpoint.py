import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from networks import LongSkip, perceptron
from safetensors.torch import save_file
from torch import Tensor, nn

from ensemblenet import EnsembleNet, LoadError, convert, fuse, load, save
from ensemblenet.deploy.export import Format, export
from ensemblenet.errors import ExportError
from ensemblenet.inputs import DTYPES
from ensemblenet.models import CifarResNet, MNIST1DNet

X = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(convert(perceptron(), X, num_heads=3), tmp_path / "model")


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (lambda: timm.create_model("test_resnet", num_classes=7), (3, 64, 64)),
        (lambda: timm.create_model("test_vit", img_size=96, num_classes=3), (3, 96, 96)),
        (lambda: MNIST1DNet(width=16), (40,)),
        (lambda: CifarResNet(depth=8, width=8, num_classes=4), (3, 16, 16)),
    ],
)
@pytest.mark.parametrize("init", ["fresh", "inherit"])
def test_known_bases_need_not_be_brought(base: object, shape: tuple[int, ...], init: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    model = convert(base(), x, init=init).train()  # type: ignore[operator, arg-type]
    model(x)  # moves the statistics of batch normalisation
    again = load(save(model, tmp_path / "model"))
    assert torch.equal(again(x), model.eval()(x))
    assert not again.training
    assert again.recipe == model.recipe
    assert again.cost == model.cost


def test_other_bases_are_brought_by_the_user(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = convert(LongSkip(), x, num_heads=3).eval()
    directory = save(model, tmp_path / "a" / "model")
    assert torch.equal(load(directory, LongSkip())(x), model(x))
    with pytest.raises(LoadError, match=r"pass a fresh instance of it, ensemblenet\.load\(directory, base=\.\.\.\)"):
        load(directory)


def test_the_first_heads_alone(tmp_path: Path) -> None:
    model = convert(perceptron(), X, num_heads=3).eval()
    again = load(save(model.first(2), tmp_path / "model"), perceptron())
    assert again.num_heads == 2
    assert torch.equal(again(X), model.first(2)(X))


def test_only_json_and_safetensors_are_written(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "recipe.json"]
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"], "nothing is left aside"


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="exists and is not empty; save to a new directory"):
        save(convert(perceptron(), X), saved)


def test_a_model_built_by_hand_cannot_be_saved(tmp_path: Path) -> None:
    model = EnsembleNet(nn.Identity(), [nn.Linear(2, 2)])
    with pytest.raises(LoadError, match=r"save its state_dict\(\) instead"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("ensemblenet.weights.save_model", full)
    with pytest.raises(OSError, match="No space left"):
        save(convert(perceptron(), X), tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Exploit:
    """A pickle that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def edit(directory: Path, within: str | None = None, **changes: object) -> None:
    """Change fields of a saved recipe, or of one of its parts."""
    recipe = json.loads((directory / "recipe.json").read_text())
    (recipe if within is None else recipe[within]).update(changes)
    (directory / "recipe.json").write_text(json.dumps(recipe))


def rebuild_weights(directory: Path, keep: slice) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[keep])


def nested(depth: int) -> list:
    """A list in a list, and so on."""
    found: list = [0]
    for _ in range(depth):
        found = [found]
    return found


OTHER_INPUT = {"shape": [7], "dtype": "float32", "is_batched": True, "fixed": []}
DAMAGE = [
    (lambda d: (d / "recipe.json").unlink(), "holds no saved model: recipe.json is missing"),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda d: (d / "recipe.json").write_text("{"), "The recipe is not JSON"),
    (lambda d: (d / "recipe.json").write_bytes(b"\xff\xfe\x00"), "is not text"),
    (lambda d: (d / "recipe.json").write_text("[1]"), "not one of ensemblenet's"),
    (lambda d: (d / "recipe.json").write_text('{"model_type": "bert"}'), "not one of ensemblenet's"),
    (lambda d: (d / "recipe.json").write_text(" " * (17 << 20)), "larger than any recipe"),
    (lambda d: edit(d, format=99), "format 99; this version reads formats up to 5: update"),
    (lambda d: edit(d, more=1), "must have the fields"),
    (lambda d: edit(d, "head", more=1), "recipe's head must have the fields"),
    (lambda d: edit(d, head=3), "recipe's head must have the fields"),
    (lambda d: edit(d, format=1), r"format 1 but no \['frozen', 'input_dtype', 'input_shape', 'multiple', 'width'\]"),
    (lambda d: edit(d, num_heads=10**9), "num_heads must be an integer from 1 to 1024, got 1000000000"),
    (lambda d: edit(d, num_heads=2), "The recipe has 2 heads, the weights have 3"),
    (lambda d: edit(d, "head", width=-1), r"width must be a number in \(0, 4\], got -1"),
    (lambda d: edit(d, "head", width=0.1), r"of shape .*, but the model of this base has"),
    (lambda d: edit(d, split_at="nowhere"), "does not fit the recipe.*Unknown split point 'nowhere'"),
    (
        lambda d: edit(d, "inputs", tensors=[OTHER_INPUT]),
        "does not fit",
    ),
    (lambda d: edit(d, "inputs", tree=[0, 1]), "tree of inputs must be lists and dictionaries of the tensors' numbers"),
    (lambda d: edit(d, "inputs", tensors=[OTHER_INPUT | {"dtype": "Tensor"}]), "dtype of inputs must be"),
    (lambda d: edit(d, output=[[1]]), "output must be a name, a position or a list of them"),
    (lambda d: edit(d, init="exec"), "init must be one of"),
    (lambda d: edit(d, combine="probabilities"), r"recipe\.json is damaged, or of another model: its checksum"),
    (lambda d: edit(d, "inputs", tree=nested(900)), "tree of inputs must be"),
    (lambda d: edit(d, "inputs", tensors=[OTHER_INPUT | {"fixed": [3]}]), "fixed of inputs must be"),
    (lambda d: edit(d, seed=2**70), "seed must be an integer of 64 bits"),
    (lambda d: edit(d, format=2, inputs=5), "The recipe's inputs must have fields by name, got 5"),
    (lambda d: edit(d, format=2, head=None), "The recipe's head must have fields by name, got None"),
    (lambda d: (d / "recipe.json").write_text("[" * 100_000), "The recipe is not JSON: maximum recursion depth"),
    (lambda d: edit(d, base={"factory": "os", "name": "system", "arguments": {}}), None),
    (lambda d: rebuild_weights(d, slice(1000)), "damaged or not a safetensors file"),
    (lambda d: rebuild_weights(d, slice(-100)), "damaged or not a safetensors file"),
    (lambda d: save_file({"weight": torch.zeros(2)}, d / "model.safetensors"), "holds no heads"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_foreign_and_hostile_directories(damage: object, message: str | None, saved: Path) -> None:
    damage(saved)  # type: ignore[operator]
    if message is None:  # what stands there about the base is not read when the user brings it
        load(saved, perceptron())
        return
    with pytest.raises(LoadError, match=message):
        load(saved, perceptron())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"factory": "os", "name": "system", "arguments": {}}, "Unknown base factory 'os'"),
        (
            {"factory": "timm", "name": "hf-hub:someone/model", "arguments": {}},
            "cannot be built.*timm has no model 'hf-hub:someone/model'",
        ),
        ({"factory": "ensemblenet", "name": "named", "arguments": {}}, "cannot be built"),
        ({"factory": "ensemblenet", "name": "MNIST1DNet", "arguments": {"depth": 3}}, "cannot be built"),
        ({"factory": "timm", "name": "resnet18", "arguments": {"num_classes": "__import__('os')"}}, "base must be"),
    ],
)
def test_a_recipe_names_only_known_bases(base: dict, message: str, saved: Path) -> None:
    edit(saved, base=base)
    with pytest.raises(LoadError, match=message):
        load(saved)


def test_nothing_in_a_directory_is_executed(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for name in ("recipe.json", "model.safetensors"):
        hostile = tmp_path / f"hostile-{name}"
        shutil.copytree(saved, hostile)
        (hostile / name).write_bytes(pickle.dumps(Exploit(trap)))
        with pytest.raises(LoadError):
            load(hostile, perceptron())
    assert not trap.exists()


def test_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(LoadError):
        load(saved, nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 6)))


def test_a_missing_tensor_is_refused(saved: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(saved / "model.safetensors")
    tensors.pop("heads.1." + next(name for name in tensors if name.startswith("heads.1.")).split(".", 2)[2])
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(LoadError, match="does not fit its recipe"):
        load(saved, perceptron())


def test_in_inference_mode(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(4, 8)
    with torch.inference_mode():
        model = convert(base, x, num_heads=2).eval()
        again = load(save(model, tmp_path / "saved"), base)
        assert torch.equal(again(x), model(x))
    again.train()(x).sum().backward()


class AnyNumbers(nn.Module):
    """Takes inputs of every dtype, as networks with a normalisation or a table of their own do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.view_as_real(x).sum(-1) if x.is_complex() else x
        return self.b(self.a(x.float() / 255).relu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    x = (torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) * 2).to(getattr(torch, dtype))
    model = convert(AnyNumbers(), x, 2, 1.5).eval()
    again = load(save(model, tmp_path / "model"), AnyNumbers())
    assert again.recipe == model.recipe
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(fuse(model)(x), model(x))
    if x.is_complex():
        with pytest.raises(ExportError, match=f"ONNX files take no inputs of torch.{dtype.replace('128', '64')}"):
            export(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("dtype", "format"), [("uint8", "onnx"), ("bool", "onnx"), ("int32", "onnx"), ("complex64", "torch")]
)
def test_inputs_of_other_dtypes_are_exported(dtype: str, format: Format, tmp_path: Path) -> None:
    x = torch.ones(4, 8).to(getattr(torch, dtype))
    path = tmp_path / f"model.{'onnx' if format == 'onnx' else 'pt2'}"
    assert export(convert(AnyNumbers(), x, 2, 1.5), path, format).difference < 1e-4
