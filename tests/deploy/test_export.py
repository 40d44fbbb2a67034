"""What is exported gives what PyTorch gives, says what it is, and is never left behind when it does not."""

from __future__ import annotations

import copy
import errno
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from networks import Graph, Text, TwoAnswers, Volume, graph_batch, text_batch
from torch import nn
from torch._inductor.exc import InductorError

import ensemblenet
from ensemblenet import EnsembleNet, ExportError, convert, export, fuse
from ensemblenet.cli import main
from ensemblenet.cli.failures import explain
from ensemblenet.deploy import formats
from ensemblenet.models import MLPTagger, MNIST1DNet, MoETagger

CLASSES = ["cat", 'a "quoted" dog', "Ünicode", *"3456789"]


def runs(path, x):
    """The outputs of an ONNX file or of a program of torch.export, read as a stranger would."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    return torch.export.load(path).module()(x)


@pytest.fixture(scope="module")
def model():
    """Three heads whose outputs differ."""
    return convert(MNIST1DNet(8), torch.randn(2, 40), num_heads=3, seed=1).eval()


BASES = {
    "resnet": lambda: (timm.create_model("test_resnet", num_classes=5), (3, 32, 32), "multiclass"),
    "vit": lambda: (timm.create_model("test_vit", num_classes=5), (3, 160, 160), "multiclass"),
    "tagger": lambda: (MLPTagger(24, num_classes=40, hidden=(32, 32)), (24,), "multilabel"),
    "video": lambda: (Volume(), (3, 8, 8, 8), "multiclass"),
}


@pytest.mark.parametrize("name", BASES)
def test_networks_of_every_kind_as_onnx(tmp_path, name):
    base, shape, task = BASES[name]()
    model = convert(base, torch.randn(2, *shape), task=task).eval()
    exported = export(model, tmp_path / "model.onnx")
    x = torch.randn(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(runs(exported.path, x), model(x), rtol=1e-3, atol=1e-4)
    assert exported.size == (tmp_path / "model.onnx").stat().st_size
    assert exported.difference < 1e-4
    assert list(exported.seconds) == [1, 4]
    assert min(min(pair) for pair in exported.seconds.values()) > 0
    read = onnx.load(tmp_path / "model.onnx")
    assert {prop.key: json.loads(prop.value) for prop in read.metadata_props} == {
        "input_shape": list(shape),
        "num_heads": 2,
        "task": task,
    }
    assert read.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_mixture_of_experts_is_finite_in_the_file_where_its_probability_is_not(tmp_path):
    torch.manual_seed(0)
    network = MoETagger(4, 3).eval()
    path = export(network, tmp_path / "m.onnx", example_inputs=torch.zeros(2, 4)).path
    x = 1e3 * torch.randn(5, 4)
    with torch.no_grad():
        assert network(x).abs().max() > 200
        # differences of terms of a thousand, whose float32 are 6e-5 apart
        torch.testing.assert_close(runs(path, x), network(x), rtol=1.3e-6, atol=2.5e-4)


PARTS = {
    "all": ({}, lambda model: model),
    "head": ({"head": 2}, lambda model: model.head(2)),
    "first": ({"first": 2}, lambda model: model.first(2)),
}


@pytest.mark.parametrize("how", ["looped", "fused"])
@pytest.mark.parametrize(
    ("name", "part"), [("m.pt2", "all"), ("m.pt2", "head"), ("m.pt2", "first"), ("m.onnx", "head"), ("m.onnx", "first")]
)
def test_all_heads_one_head_and_the_first_heads(tmp_path, model, how, name, part):
    choice, wanted = PARTS[part]
    source = fuse(copy.deepcopy(model)) if how == "fused" else model
    path = export(source, tmp_path / name, "onnx" if name.endswith("onnx") else "torch", **choice).path
    x = torch.randn(5, 40)
    with torch.no_grad():
        torch.testing.assert_close(runs(path, x), wanted(model)(x))


def test_fused_heads_stay_fused_in_the_file(tmp_path):
    model = convert(MNIST1DNet(8), torch.randn(2, 40), num_heads=3).eval()

    def convolutions(source, name):
        nodes = onnx.load(export(source, tmp_path / name, first=2).path).graph.node
        return sum(node.op_type == "Conv" for node in nodes)

    looped = convolutions(model, "looped.onnx")
    assert convolutions(fuse(model), "fused.onnx") < looped


def test_names_of_other_classes_are_refused(tmp_path: Path, model: EnsembleNet) -> None:
    with pytest.raises(ExportError, match=r"^The description names 11 classes, but the model has 10 outputs\.$"):
        export(model, tmp_path / "new" / "m.onnx", description={"classes": [*CLASSES, "another"]})
    assert not list(tmp_path.iterdir())


def test_what_a_program_of_torch_export_says_of_itself(tmp_path, model):
    preprocessing = {"mean": [0.5], "input_shape": [40]}
    path = export(
        model, tmp_path / "m.pt2", "torch", description={"classes": CLASSES, "preprocessing": preprocessing}
    ).path
    extra = {"data.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["data.json"]) == {
        "classes": CLASSES,
        "preprocessing": preprocessing,
        "input_shape": [40],
        "num_heads": 3,
        "task": "multiclass",
    }


def test_a_file_names_no_folders_of_this_machine(tmp_path, model):
    path = export(model, tmp_path / "model.pt2", "torch").path
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name) for name in archive.namelist()]
    assert not any(str(Path(ensemblenet.__file__).parent).encode() in text for text in texts)


def test_an_aot_package(tmp_path):
    model = convert(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)), torch.randn(2, 4)).eval()
    exported = export(model, tmp_path / "model.pt2", "aot", description={"classes": CLASSES[:3]})
    package = torch._inductor.aoti_load_package(str(exported.path))
    x = torch.randn(11, 4)
    with torch.no_grad():
        torch.testing.assert_close(package(x), model(x))
    assert json.loads(package.get_metadata()["data.json"])["classes"] == CLASSES[:3]


@pytest.mark.parametrize("choice", [{}, {"head": 1}, {"first": 2}])
def test_a_directory(tmp_path, model, choice):
    exported = export(model, tmp_path / "saved", "safetensors", description={"classes": CLASSES}, **choice)
    again = ensemblenet.load(tmp_path / "saved")
    wanted = model.head(1) if "head" in choice else model.first(choice.get("first", 3))
    x = torch.randn(3, 40)
    torch.testing.assert_close(again(x), wanted(x))
    assert json.loads((tmp_path / "saved" / "data.json").read_text())["classes"] == CLASSES
    assert exported.size == sum(file.stat().st_size for file in (tmp_path / "saved").iterdir())


def test_a_directory_of_a_base_that_only_the_user_can_make(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))

    model = convert(make(), torch.randn(2, 4))
    with pytest.raises(ensemblenet.LoadError, match="pass a fresh instance"):
        export(model, tmp_path / "saved", "safetensors")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "saved", "safetensors", base=make())
    assert (tmp_path / "saved" / "recipe.json").is_file()


def test_one_batch_size(tmp_path, model):
    exported = export(model, tmp_path / "model.onnx", batch_size=3)
    assert list(exported.seconds) == [3]
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [3, 40]


def test_a_base_and_a_model_by_hand(tmp_path):
    base = MNIST1DNet(8)
    with pytest.raises(ExportError, match="does not know the shape of its inputs: pass example_inputs"):
        export(base, tmp_path / "base.onnx")
    x = torch.randn(3, 40)
    path = export(base, tmp_path / "base.onnx", example_inputs=x).path
    torch.testing.assert_close(runs(path, x), base.eval()(x).detach(), rtol=1e-4, atol=1e-6)

    by_hand = EnsembleNet(nn.Linear(40, 8), [nn.Linear(8, 3) for _ in range(2)], "probabilities")
    path = export(fuse(by_hand), tmp_path / "hand.onnx", example_inputs=x).path
    torch.testing.assert_close(runs(path, x), by_hand.eval()(x).detach(), rtol=1e-4, atol=1e-6)


def test_integer_inputs(tmp_path):
    base = nn.Sequential(nn.Embedding(10, 16), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    model = convert(base, torch.randint(0, 10, (2, 4))).eval()
    path = export(model, tmp_path / "model.onnx").path
    x = torch.randint(0, 10, (3, 4))
    torch.testing.assert_close(runs(path, x), model(x).detach())


# -- several inputs


def texts(path):
    """Runs a file of a text model, which takes its inputs by name."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda **batch: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])
    return torch.export.load(path).module()


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
@pytest.mark.parametrize("how", ["looped", "fused"])
def test_named_inputs_of_any_length(tmp_path, name, how):
    model = convert(Text(), text_batch(), split_at="add#2", budget=1.2).eval()
    network = fuse(model) if how == "fused" else model
    exported = export(network, tmp_path / name, "onnx" if name.endswith("onnx") else "torch")
    assert exported.dynamic == {"ids": (0, 1), "mask": (0, 1)}
    run = texts(exported.path)
    for batch in (text_batch(1, 12), text_batch(5, 7), text_batch(3, 40)):
        torch.testing.assert_close(run(**batch), model(**batch).detach(), rtol=1e-4, atol=1e-5)


def test_what_a_file_says_of_named_inputs(tmp_path):
    model = convert(Text(), text_batch(), budget=1.2)
    read = onnx.load(export(model, tmp_path / "m.onnx").path)
    sizes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in read.graph.input}
    assert sizes == {"ids": ["batch", "ids_1"], "mask": ["batch", "ids_1"]}
    described = {prop.key: json.loads(prop.value) for prop in read.metadata_props}
    assert described["inputs"] == {name: {"dtype": "int64", "shape": [12]} for name in ("ids", "mask")}
    assert "input_shape" not in described
    fixed = onnx.load(export(model, tmp_path / "fixed.onnx", batch_size=3).path)
    assert [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in fixed.graph.input] == [[3, 12], [3, 12]]


def test_a_graph_of_any_size(tmp_path):
    model = convert(Graph(), graph_batch(), budget=1.2).eval()
    exported = export(model, tmp_path / "m.onnx")
    assert exported.dynamic == {"x": (0,), "edge_index": (1,)}  # the others were fixed by the conversion
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    for x, edges in (graph_batch(5, 3), graph_batch(40, 90)):
        [got] = session.run(["output"], {"x": x.numpy(), "edge_index": edges.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x, edges).detach(), rtol=1e-4, atol=1e-5)


def test_an_aot_package_takes_named_inputs(tmp_path):
    model = convert(Text(), text_batch(), split_at="div", budget=2.0).eval()
    package = torch._inductor.aoti_load_package(str(export(model, tmp_path / "m.pt2", "aot").path))
    batch = text_batch(5, 9)
    torch.testing.assert_close(package(**batch), model(**batch).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "compiles", "said"),
    [
        ("torch", True, "No space left on device; free some space."),
        ("aot", True, "No space left on device; free some space."),
        ("aot", False, "No space left on device in /inductor, where it is compiled; free some space."),
    ],
)
def test_a_full_disk_is_named_with_what_to_do(model, tmp_path, monkeypatch, format, compiles, said):
    """Inductor wraps what it meets in a folder of its own in an error of the compiler."""

    def write(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def compile_it(*_args, **_kwargs):
        if not compiles:
            raise InductorError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/inductor")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_it)
    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match="No space") as caught:
        export(model, tmp_path / "m.pt2", format)
    assert explain(caught.value) == (2, f"{tmp_path / 'm.pt2'}: {said}")
    assert not list(tmp_path.iterdir())


def test_several_outputs_have_the_names_of_the_conversion(tmp_path):
    model = convert(TwoAnswers(), text_batch(), output=["logits", "aux"], budget=1.5).eval()
    session = onnxruntime.InferenceSession(export(model, tmp_path / "m.onnx").path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "aux"]
    batch = text_batch(3, 9)
    got = [torch.from_numpy(part) for part in session.run(None, {k: v.numpy() for k, v in batch.items()})]
    torch.testing.assert_close(tuple(got), tuple(part.detach() for part in model(**batch)), rtol=1e-4, atol=1e-5)


class AnyLength(nn.Module):
    """A network that PyTorch runs at any length, and torch.export at the one that it saw."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 64), nn.Linear(64, 3)

    def forward(self, ids):
        return self.head(self.embed(ids).sum(1) / len(list(ids.unbind(1))))


def test_a_length_that_the_format_cannot_follow_stays_fixed(tmp_path):
    known = convert(AnyLength(), torch.randint(10, (4, 12)), num_heads=1).recipe
    inputs = replace(known.inputs, tensors=(replace(known.inputs.tensors[0], fixed=()),))
    model = EnsembleNet(AnyLength(), [nn.Linear(3, 3)], recipe=replace(known, inputs=inputs)).eval()
    exported = export(model, tmp_path / "m.onnx")
    assert exported.dynamic == {"input": (0,)}
    x = torch.randint(10, (5, 12))
    torch.testing.assert_close(runs(exported.path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


class HidesAll(nn.Module):
    """A mean over what a mask shows, which is not finite where it shows nothing."""

    def forward(self, x, mask):
        return (x * mask).sum(1) / mask.sum(1)


def test_a_mask_shows_something_and_an_index_exists(tmp_path):
    example = (torch.randn(4, 1, 3), torch.zeros(4, 1, 1, dtype=torch.bool))  # the user's own would not do
    assert export(HidesAll(), tmp_path / "mask.pt2", "torch", example_inputs=example).difference == 0
    gather = {"x": torch.randn(4, 1, 3), "index": torch.full((4, 1, 3), 5)}

    class Gather(nn.Module):
        def forward(self, x, index):
            return x.gather(1, index)

    assert export(Gather(), tmp_path / "index.pt2", "torch", example_inputs=gather).difference == 0


class Picky(nn.Module):
    """Takes the user's own inputs, and no random ones."""

    def forward(self, kind, x):
        if not torch.compiler.is_compiling() and not (kind == 7).all():
            raise ValueError("the kind must be 7")
        return x * kind


def test_the_users_own_values_are_the_last_resort(tmp_path):
    example = (torch.full((2, 1), 7), torch.randn(2, 3))
    assert export(Picky(), tmp_path / "m.pt2", "torch", example_inputs=example).difference == 0
    with pytest.raises(ExportError, match=r"The model fails on random inputs of shape .*: the kind must be 7$"):
        export(Picky(), tmp_path / "n.pt2", "torch", example_inputs=(torch.full((2, 1), 6), torch.randn(2, 3)))


def test_the_model_is_left_as_it_was(tmp_path, model):
    model = convert(MNIST1DNet(8), torch.randn(2, 40)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "model.pt2", "torch")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class KeepsBatchSize(nn.Module):
    """A batch size that became a number."""

    def forward(self, x):
        return x.reshape(2, 4) * 2


class RandomOutput(nn.Module):
    """An output that no file can repeat."""

    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (KeepsBatchSize(), {}, r"torch.export cannot write the model; if it works for one size only, fix the batch"),
        (RandomOutput(), {}, r"The torch file differs from PyTorch by .* of the largest output, for 1 random inputs"),
        (
            nn.LogSigmoid(),
            {"format": "onyx"},
            "format must be one of onnx, .*, safetensors; got 'onyx'",
        ),
        (nn.Identity(), {"head": 0}, "is a single network and has no heads"),
        (nn.Identity(), {"format": "safetensors"}, "Only a converted model is written as safetensors"),
        (nn.Identity(), {"format": "onnx"}, r"A file of format 'onnx' is named \*.onnx, got model.pt2"),
        (nn.Identity(), {"batch_size": 0}, "batch_size must be positive, got 0"),
        (EnsembleNet(nn.Identity(), [nn.Identity()]), {"head": 1}, "The model has heads 0 to 0, got head 1"),
        (EnsembleNet(nn.Identity(), [nn.Identity()]), {"first": 2}, "The model has 1 heads, got first 2"),
        (EnsembleNet(nn.Identity(), [nn.Identity()]), {"first": 1, "head": 0}, "head or first, not both"),
    ],
)
def test_nothing_is_left_of_what_fails(tmp_path, network, options, message):
    options = {"format": "torch", "example_inputs": torch.ones(2, 4)} | options
    with pytest.raises(ExportError, match=message):
        export(network, tmp_path / "model.pt2", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_lies_is_not_kept(tmp_path, model, monkeypatch):
    real = formats._write_onnx

    def wrong(*arguments):
        predict = real(*arguments)
        return lambda x: tuple(output * (1 + 1e-3) for output in predict(x))

    monkeypatch.setattr(formats, "_write_onnx", wrong)
    with pytest.raises(ExportError, match=r"differs from PyTorch by 0.001 of the largest output.*Nothing was kept"):
        export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(formats, "_write_onnx", lambda *arguments: lambda x: (torch.zeros(1, 2),) * 3)
    with pytest.raises(ExportError, match=r"gives \(1, 2\) for inputs of shape \(1, 40\), PyTorch gives \(1, 10\)"):
        export(model, tmp_path / "model.onnx")


def test_a_model_that_gives_no_numbers(tmp_path):
    broken = nn.Linear(4, 3)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ExportError, match="own outputs are not finite"):
        export(broken, tmp_path / "model.pt2", "torch", example_inputs=torch.ones(2, 4))


def test_models_of_half_precision(tmp_path, model):
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(ExportError, match=r"NumPy has no bfloat16 .* export model.float\(\)"):
        export(half, tmp_path / "model.onnx")
    path = export(half, tmp_path / "model.pt2", "torch").path
    assert runs(path, torch.zeros(3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_a_missing_library_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setattr(formats, "_PACKAGES", ("onnx", "no_such_runtime"))
    with pytest.raises(ExportError, match=r"pip install 'ensemblenet\[export\]' \(No module named 'no_such_runtime'\)"):
        export(model, tmp_path / "model.onnx")


# -- the command


@pytest.fixture
def saved(tmp_path, model):
    return ensemblenet.save(model, tmp_path / "saved", {"classes": list("abcdefghij")})


def test_the_command(tmp_path, saved, model, capsys):
    output = tmp_path / "new" / "first.onnx"
    assert main(["export", str(saved), "--output", str(output), "--first", "2", "--fuse"]) == 0
    printed = capsys.readouterr().out
    assert "first.onnx" in printed
    assert "MB" in printed
    assert "Outputs agree with PyTorch" in printed
    x = torch.randn(3, 40)
    torch.testing.assert_close(runs(output, x), model.first(2)(x).detach(), rtol=1e-4, atol=1e-6)
    metadata = onnxruntime.InferenceSession(output).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list("abcdefghij")
    assert main(["export", str(saved), "--output", str(output)]) == 2
    assert "exists; --output needs a new path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "3", "--output", "x.onnx"], "The model has heads 0 to 2, got head 3"),
        (["--output", "x.pt2"], "A file of format 'onnx' is named *.onnx, got x.pt2"),
    ],
)
def test_mistakes_are_one_line(saved, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(saved), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_base_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    base = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    ensemblenet.save(convert(base, torch.randn(2, 8)), tmp_path / "saved")
    output = tmp_path / "model.pt2"
    arguments = ["export", str(tmp_path / "saved"), "--format", "torch", "--output", str(output)]
    assert main(arguments) == 2
    assert "pass a fresh instance" in capsys.readouterr().err
    assert main([*arguments, "--base", "test_export:small_base"]) == 0
    assert np.prod(runs(output, torch.zeros(3, 8)).shape) == 24


def small_base():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
