"""Files that are served: all answers in one, in 8-bit integers, for devices, and without this library."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import own_environment
from torch import Tensor, nn

import ensemblenet
from ensemblenet import EnsembleNet, ExportError, convert, export, fuse
from ensemblenet.cli import main
from ensemblenet.data.mnist1d import generate_mnist1d
from ensemblenet.deploy import formats
from ensemblenet.functional import Task, head_spread
from ensemblenet.models import MNIST1DNet

CLASSES = list("abcdefghij")


@pytest.fixture(scope="module")
def model() -> EnsembleNet:
    """Three heads whose outputs differ."""
    return convert(MNIST1DNet(8), torch.randn(2, 40), num_heads=3, seed=1).eval()


def answers(model: EnsembleNet, x: Tensor) -> dict[str, Tensor]:
    """What a file must give, the slow way: example by example."""
    with torch.no_grad():
        heads = model(x, per_head=True)
        prediction = model(x)
    spread = []
    for n in range(len(x)):
        of_heads = heads[:, n].softmax(1)[:, prediction[n].argmax()]
        spread.append(((of_heads - of_heads.mean()) ** 2).mean().sqrt())
    return {"output": prediction, "heads": heads, "spread": torch.stack(spread)}


# -- one file


_STRANGER = """
import json, sys
sys.modules.update(dict.fromkeys(("ensemblenet", "torch")))  # neither can be imported
import numpy as np, onnxruntime
try:
    import ensemblenet
except ImportError:
    pass
else:
    raise SystemExit("ensemblenet is there")
session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
got = session.run(["output", "heads", "spread"], {"input": np.load("x.npy")})
np.savez("got.npz", *got)
print(*(classes[c] for c in got[0].argmax(1)))
"""


def test_a_process_without_ensemblenet_gives_prediction_heads_and_spread(tmp_path: Path, model: EnsembleNet) -> None:
    export(fuse(model), tmp_path / "m.onnx", description={"classes": CLASSES})
    x = 3 * torch.randn(5, 40)
    np.save(tmp_path / "x.npy", x.numpy())
    done = subprocess.run([sys.executable, "-c", _STRANGER], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    expected = answers(model, x)
    with np.load(tmp_path / "got.npz") as got:
        for name, value in zip(got.files, expected.values(), strict=True):
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6)
    assert done.stdout.split() == [CLASSES[c] for c in expected["output"].argmax(1)]


def test_other_formats_and_the_prediction_alone(tmp_path: Path, model: EnsembleNet) -> None:
    x = torch.randn(3, 40)
    path = export(model, tmp_path / "all.pt2", "torch", all_answers=True).path
    torch.testing.assert_close(torch.export.load(path).module()(x), answers(model, x), rtol=1e-4, atol=1e-6)
    graph = onnx.load(export(model, tmp_path / "prediction.onnx", all_answers=False).path).graph
    assert [output.name for output in graph.output] == ["output"]
    with pytest.raises(ExportError, match="Only a model of several heads that give one output each has all_answers"):
        export(model, tmp_path / "h.onnx", head=1, all_answers=True)


@pytest.mark.parametrize(("task", "shape"), [("multilabel", (4, 10)), ("regression", (4, 10))])
def test_the_spread_of_labels_and_of_outputs(tmp_path: Path, task: Task, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = EnsembleNet(nn.Linear(6, 8), [nn.Linear(8, 10) for _ in range(3)], task=task).eval()
    x = torch.randn(4, 6)
    path = export(model, tmp_path / "m.onnx", example_inputs=x).path
    [spread] = onnxruntime.InferenceSession(path).run(["spread"], {"input": x.numpy()})
    heads = model(x, per_head=True).detach()
    said = (heads.sigmoid() if task == "multilabel" else heads).numpy()
    assert spread.shape == shape
    np.testing.assert_allclose(spread, said.std(0), rtol=1e-4, atol=1e-6)


def test_dense_predictions_have_a_spread_at_each_position() -> None:
    z = torch.randn(3, 2, 5, 4, 4)
    torch.testing.assert_close(head_spread(z)[1, :, 2, 3], z[:, 1, :, 2, 3].softmax(1).std(0, correction=0))


# -- a server

_SERVER = """
import sys
sys.modules.update(dict.fromkeys(("ensemblenet", "torch")))  # neither can be imported
import uvicorn
uvicorn.run("serve_fastapi:app", port=0)
"""
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: EnsembleNet) -> Path:
    """The folder of the files that are served."""
    folder = tmp_path_factory.mktemp("served")
    for name, head in (("all", None), ("one", 0)):
        export(model, folder / f"{name}.onnx", head=head, description={"classes": CLASSES})
    return folder


@pytest.fixture(scope="module")
def address(served: Path) -> Iterator[str]:
    """Where the example serves them."""
    environment = own_environment(EXAMPLES) | {"BUSY": "4", "DELAY": "0.3"}
    command = [sys.executable, "-c", _SERVER]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=served, env=environment, **streams) as server:
        assert server.stderr is not None
        lines: list[str] = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"http://\S+:\d+", line):
                yield found[0]
                break
        else:
            raise AssertionError("".join(lines))
        server.terminate()


async def ask(address: str, x: list[Tensor]) -> list[Any]:
    """What the server says to clients who ask at once."""
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        responses = await asyncio.gather(*(client.post("/predict", json={"x": row.tolist()}) for row in x))
    return [response.raise_for_status().json() for response in responses]


def test_a_server_answers_by_all_heads_when_idle_and_by_one_when_busy(address: str, served: Path) -> None:
    x = 3 * torch.randn(40, 40)
    by_file = {}
    for name, heads in (("all", 3), ("one", 1)):
        [output] = onnxruntime.InferenceSession(served / f"{name}.onnx").run(["output"], {"input": x.numpy()})
        by_file[heads] = [{"class": CLASSES[best], "heads": heads} for best in output.argmax(1)]
    assert [said["class"] for said in by_file[1]] != [said["class"] for said in by_file[3]]
    assert [asyncio.run(ask(address, [row]))[0] for row in x[:3]] == by_file[3][:3]
    busy = asyncio.run(ask(address, list(x)))
    assert busy == [by_file[said["heads"]][n] for n, said in enumerate(busy)]
    assert sum(said["heads"] == 1 for said in busy) > 30


def test_a_server_refuses_what_is_no_example(address: str) -> None:
    for wrong in ([1.0, 2.0], [[0.0] * 40], ["a"] * 40, [[0.0], 1.0]):
        response = httpx.post(f"{address}/predict", json={"x": wrong})
        assert response.status_code == 422
        assert response.json()["detail"] == "x must be nested lists of numbers, of the shape [40]."
    assert httpx.post(f"{address}/predict", json={"x": [0.0] * 40}).json()["heads"] == 3


# -- 8-bit integers


def test_a_file_in_8_bits_says_nearly_the_same(tmp_path: Path, model: EnsembleNet) -> None:
    (x, _), (test_x, _) = generate_mnist1d((256, 300))
    exported = export(model, tmp_path / "q.onnx", description={"classes": CLASSES}, calibration=x.split(64))
    nodes = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= nodes
    [output, _, _] = onnxruntime.InferenceSession(exported.path).run(None, {"input": test_x.numpy()})
    expected = model(test_x).detach().numpy()
    error = np.abs(output - expected).max()
    assert 1e-5 < error < 0.1 * np.abs(expected).max()  # not the exact file, and no noise
    assert exported.difference == pytest.approx(np.abs(output - expected).max() / np.abs(expected).max(), rel=1.0)
    props = {prop.key: json.loads(prop.value) for prop in onnx.load(exported.path).metadata_props}
    assert props["classes"] == CLASSES


def test_calibration_that_says_nothing_is_refused(tmp_path: Path, model: EnsembleNet) -> None:
    with pytest.raises(ExportError, match="calibration must hold a batch of inputs"):
        export(model, tmp_path / "m.onnx", calibration=[])
    with pytest.raises(ExportError, match="8-bit integers are for format 'onnx'"):
        export(model, tmp_path / "m.pt2", "torch", calibration=[torch.randn(4, 40)])


def test_an_8_bit_file_that_says_something_else_is_not_kept(
    tmp_path: Path, model: EnsembleNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "quantise", lambda *arguments: None)
    monkeypatch.setattr(formats, "read_onnx", lambda *arguments: lambda x: [torch.zeros(len(x), 10)] * 3)
    with pytest.raises(ExportError, match=r"differs from PyTorch by 1 of .* 0\.3 is allowed. Nothing was kept"):
        export(model, tmp_path / "m.onnx", calibration=[torch.randn(8, 40)])
    assert list(tmp_path.iterdir()) == []


# -- devices


def test_an_executorch_file(tmp_path: Path, model: EnsembleNet) -> None:
    runtime = pytest.importorskip("executorch.runtime")
    exported = export(model, tmp_path / "m.pte", "executorch", description={"classes": CLASSES}, batch_size=2)
    program = runtime.Runtime.get().load_program(exported.path)
    x = torch.randn(2, 40)
    got = [output.clone() for output in program.load_method("forward").execute([x])]
    torch.testing.assert_close(got, list(answers(model, x).values()), rtol=1e-4, atol=1e-5)
    [text] = program.load_method("description").execute([])
    assert json.loads(text)["classes"] == CLASSES


def test_executorch_that_is_missing_is_named(
    tmp_path: Path, model: EnsembleNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    monkeypatch.setitem(sys.modules, "executorch.backends.xnnpack.partition.xnnpack_partitioner", None)
    with pytest.raises(ExportError, match=r"pip install 'ensemblenet\[executorch\]'"):
        export(model, tmp_path / "m.pte", "executorch")
    assert list(tmp_path.iterdir()) == []


# -- the command


def test_the_command_prints_the_scores_before_and_after(
    tmp_path: Path, model: EnsembleNet, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(ensemblenet.save(model, tmp_path / "saved", {"classes": list("0123456789")}))
    output = str(tmp_path / "q.onnx")
    data = ["--data.class_path", "ensemblenet.data.MNIST1D"]
    assert main(["export", saved, "--output", output, "--int8", *data, "--calibration", "100"]) == 0
    printed = capsys.readouterr().out
    assert "val examples" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.startswith((" before", " 8 bits"))}
    assert set(rows) == {"before", "8"}
    assert main(["export", saved, "--output", str(tmp_path / "r.onnx"), "--int8"]) == 2
    assert "does not know its data: give --data.class_path" in capsys.readouterr().err
    assert main(["export", saved, "--output", str(tmp_path / "r.onnx"), *data]) == 2
    assert capsys.readouterr().err == "ensemblenet export: Only --int8 needs data.\n"
    assert not (tmp_path / "r.onnx").exists()
