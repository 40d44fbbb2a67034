"""Write a model for other programs to run: ONNX, torch.export, AOTInductor, safetensors; each file is checked first.

Shapes: N examples, C outputs.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError, first_line
from ensemblenet.heads import FusedEnsembleNet, fuse
from ensemblenet.inputs import InputSpec
from ensemblenet.storage.checkpoint import load, save
from ensemblenet.timing import measure

__all__ = ["Exported", "Format", "export"]

Format = Literal["onnx", "torch", "aot", "safetensors"]

_CHECKED_SIZES = (1, 4)
_TIMED_SECONDS = 1.0  # at each batch size
_TRACED_SIZE = 2  # a size of 1 would be taken for a constant
_DESCRIPTION = "data.json"
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2", "safetensors": ""}
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that gives what the model gives.

    Attributes:
        path: of the file, or of the directory for "safetensors".
        format: of the file.
        size: in bytes.
        difference: the largest between the file's outputs and PyTorch's, as a share of PyTorch's largest output.
        seconds: for each batch size that was tried, the median seconds of a prediction in PyTorch and in the file.
    """

    path: Path
    format: Format
    size: int
    difference: float
    seconds: Mapping[int, tuple[float, float]]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: Format = "onnx",
    *,
    example_inputs: Tensor | None = None,
    head: int | None = None,
    first: int | None = None,
    batch_size: int | None = None,
    description: Mapping[str, Any] | None = None,
    base: nn.Module | None = None,
) -> Exported:
    """Write a model in evaluation mode, and check what was written against PyTorch.

    The file is written aside, loaded again, and run on random inputs at two batch sizes. It gets its name only if its
    outputs are those of PyTorch; else nothing is left. The model is not changed. Heads run in the file as they run in
    the model: one after another, or as one after [`ensemblenet.fuse`][].

    Args:
        model: a base or a multi-headed model.
        path: the file to create, `*.onnx` or `*.pt2`; for "safetensors" a directory.
        format: "onnx" for any ONNX runtime; "torch" for `torch.export.load`; "aot" for a library compiled for this
            kind of machine, which `torch._inductor.aoti_load_package` runs from Python and from C++; "safetensors" for
            [`ensemblenet.load`][].
        example_inputs: shape (N, *); not needed for a converted model.
        head: write this head alone.
        first: write the first so many heads.
        batch_size: N, if it must be fixed; None takes batches of any size. "safetensors" always does.
        description: what else is known of the data, as plain data: `{"classes": [...], "preprocessing": {...}}`. It
            goes into the file with the task, the input's shape and the number of heads: as `metadata_props` of ONNX,
            each value as JSON; as the extra file `data.json` of "torch"; under `data.json` in the metadata of "aot";
            as the file `data.json` in a directory.
        base: a fresh instance of the base, for "safetensors" of a model whose base no known factory makes.

    Returns:
        The file's size, and how it compares with PyTorch.

    Raises:
        ExportError: arguments that do not fit, a model that the format cannot hold, a library that is missing, or a
            file whose outputs differ.
        FileExistsError: the path exists.

    Example:
        >>> import ensemblenet
        >>> from ensemblenet.models import MNIST1DNet
        >>> model = ensemblenet.convert(MNIST1DNet(width=8), torch.randn(2, 40), num_heads=3)
        >>> path = tempfile.mkdtemp() + "/model.pt2"
        >>> exported = export(model, path, "torch", first=2, description={"classes": list("0123456789")})
        >>> torch.export.load(exported.path).module()(torch.zeros(5, 40)).shape
        torch.Size([5, 10])
    """
    path = Path(path)
    _check_arguments(model, path, format, head, first, batch_size)
    network = _part(copy.deepcopy(model).eval(), head, first)
    x = _inputs(network, example_inputs, batch_size or _TRACED_SIZE)
    if isinstance(model, FusedEnsembleNet) and isinstance(network, EnsembleNet):
        network = fuse(network, x)  # first(k) of fused heads is a plain model
    described = _describe(network, x, description)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder, torch.no_grad():
        network(x)  # fused heads of a model made by hand learn their shapes
        unfinished = Path(folder, path.name)
        predict = _write(network, x, unfinished, format, batch_size, described, base)
        sizes = (batch_size,) if batch_size else _CHECKED_SIZES
        batches = [_random_like(x, size, seed) for seed, size in enumerate(sizes * (2 // len(sizes)))]
        difference = max(_compare(predict, network, batch, format) for batch in batches)
        seconds = {len(batch): _time(predict, network, batch) for batch in batches}
        size = sum(file.stat().st_size for file in (unfinished, *unfinished.rglob("*")) if file.is_file())
        unfinished.rename(path)
    return Exported(path, format, size, difference, seconds)


def _check_arguments(
    model: nn.Module, path: Path, format: str, head: int | None, first: int | None, batch_size: int | None
) -> None:
    if format not in get_args(Format):
        raise ExportError(f"format must be one of {', '.join(get_args(Format))}; got {format!r}.")
    if path.exists():
        raise FileExistsError(f"{path} exists; export to a new path.")
    suffix = _SUFFIXES[format]
    if suffix and path.suffix != suffix:
        raise ExportError(f"A file of format {format!r} is named *{suffix}, got {path.name}.")
    if batch_size is not None and batch_size < 1:
        raise ExportError(f"batch_size must be positive, got {batch_size}.")
    if head is not None and first is not None:
        raise ExportError("Give head or first, not both.")
    if isinstance(model, EnsembleNet):
        if head is not None and not 0 <= head < model.num_heads:
            raise ExportError(f"The model has heads 0 to {model.num_heads - 1}, got head {head}.")
        if first is not None and not 1 <= first <= model.num_heads:
            raise ExportError(f"The model has {model.num_heads} heads, got first {first}.")
        return
    if head is not None or first is not None:
        raise ExportError("The model is a single network and has no heads to choose from.")
    if format == "safetensors":
        raise ExportError("Only a converted model is written as safetensors; of a base, save the state_dict().")


def _part(model: nn.Module, head: int | None, first: int | None) -> nn.Module:
    """The model of the heads that are wanted."""
    if not isinstance(model, EnsembleNet) or (head is None and first is None):
        return model
    if first is not None:
        return model.first(first)
    assert head is not None
    single = model.first(1)  # an EnsembleNet, unlike head(k): it has a recipe, so every format can hold it
    single.heads[0] = model.heads[head]
    return single


def _inputs(network: nn.Module, example: Tensor | None, size: int) -> Tensor:
    """Random inputs (N, *) of the model's shape, dtype and device."""
    if example is not None:
        spec = InputSpec.of(example)
    elif isinstance(network, EnsembleNet) and network.recipe is not None:
        spec = network.recipe.inputs
    else:
        raise ExportError("The model does not know the shape of its inputs: pass example_inputs.")
    return _random_like(spec.zeros(like=network), size, seed=0)


def _random_like(x: Tensor, size: int, seed: int) -> Tensor:
    """Other inputs of the same kind: normal, or 0 and 1 for integers, which every embedding knows."""
    drawn = torch.complex64 if x.is_complex() else torch.float32
    values = torch.randn((size, *x.shape[1:]), generator=torch.Generator().manual_seed(seed), dtype=drawn)
    return (values if x.is_floating_point() or x.is_complex() else values > 0).to(x)


def _describe(network: nn.Module, x: Tensor, description: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the file says of itself."""
    described: dict[str, Any] = {"input_shape": list(x.shape[1:]), "num_heads": 1}
    if isinstance(network, EnsembleNet):
        described |= {"task": network.task, "num_heads": network.num_heads}
    return described | dict(description or {})


# -- formats


def _write(
    network: nn.Module,
    x: Tensor,
    path: Path,
    format: Format,
    batch_size: int | None,
    description: dict[str, Any],
    base: nn.Module | None,
) -> Predict:
    """Write the file; return a function that runs it."""
    if format == "safetensors":
        return _write_directory(network, path, description, base)
    try:
        dynamic = None if batch_size else ({0: Dim.DYNAMIC},)
        program = torch.export.export(network, (x,), dynamic_shapes=dynamic)
    except Exception as error:  # whatever keeps a network from being traced
        advice = "" if batch_size else "; if it works for one size only, fix the batch size"
        raise ExportError(f"torch.export cannot write the model{advice}: {first_line(error)}") from error
    _forget_sources(program)
    if format == "onnx":
        return _write_onnx(program, x, path, batch_size, description)
    if format == "torch":
        torch.export.save(program, path, extra_files={_DESCRIPTION: json.dumps(description)})
        return torch.export.load(path).module()
    return _write_aot(program, path, description)


def _forget_sources(program: ExportedProgram) -> None:
    """Leave out of the file which lines of which folders of this machine made each node."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _write_directory(network: nn.Module, path: Path, description: dict[str, Any], base: nn.Module | None) -> nn.Module:
    assert isinstance(network, EnsembleNet)
    device = next(network.parameters(), torch.zeros(0)).device
    return load(save(network, path, description), base).to(device)


def _write_onnx(
    program: ExportedProgram, x: Tensor, path: Path, batch_size: int | None, description: dict[str, Any]
) -> Predict:
    if x.dtype == torch.bfloat16:
        raise ExportError("NumPy has no bfloat16 to check an ONNX file with: export model.float().")
    if x.is_complex():
        raise ExportError(f"ONNX files take no inputs of {x.dtype}: write format 'torch' or 'aot'.")
    try:
        *_, runtime = map(importlib.import_module, _PACKAGES)
    except ImportError as error:
        raise ExportError(f"ONNX needs more packages: pip install 'ensemblenet[export]' ({error})") from error
    try:
        onnx = torch.onnx.export(
            program,
            (x,),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=None if batch_size else ({0: "batch"},),
            verbose=False,
        )
        assert onnx is not None
        onnx.model.metadata_props.update({key: json.dumps(value) for key, value in description.items()})
        onnx.save(path, external_data=False)
    except Exception as error:  # an operator that ONNX lacks, or more than the 2 GB that one file can hold
        raise ExportError(f"torch.onnx cannot write the model: {first_line(error)}") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["output"], {"input": x.cpu().numpy()})[0])


def _write_aot(program: ExportedProgram, path: Path, description: dict[str, Any]) -> Predict:
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {_DESCRIPTION: json.dumps(description)}},
        )
    except Exception as error:  # no compiler, or one that fails
        raise ExportError(
            f"AOTInductor cannot compile the model; it needs a C++ compiler such as g++: {first_line(error)}"
        ) from error
    return torch._inductor.aoti_load_package(str(path))


# -- checks


def _compare(predict: Predict, network: nn.Module, x: Tensor, format: Format) -> float:
    """The largest difference between a file's outputs and PyTorch's, as a share of the largest output.

    Raises:
        ExportError: it is more than rounding.
    """
    expected, got = network(x), predict(x).to(x.device)
    if not torch.isfinite(expected).all():
        raise ExportError(f"The model's own outputs are not finite on random inputs of shape {tuple(x.shape)}.")
    if got.shape != expected.shape:
        raise ExportError(
            f"The {format} file gives {tuple(got.shape)} for inputs of shape {tuple(x.shape)}, PyTorch gives "
            f"{tuple(expected.shape)}. Nothing was kept."
        )
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    difference = ((got - expected).abs().max() / scale).item()
    most = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if not difference <= most:  # also for NaN
        raise ExportError(
            f"The {format} file differs from PyTorch by {difference:.2g} of the largest output, for {len(x)} random "
            f"inputs; {most:g} is allowed. Nothing was kept."
        )
    return difference


def _time(predict: Predict, network: nn.Module, x: Tensor) -> tuple[float, float]:
    steps = {"pytorch": partial(_run, network, x), "file": partial(_run, predict, x)}
    seconds = measure(steps, repeats=1)
    repeats = min(25, int(_TIMED_SECONDS / sum(seconds.values())))
    if repeats > 1:
        seconds = measure(steps, repeats)
    return seconds["pytorch"], seconds["file"]


def _run(predict: Predict, x: Tensor) -> None:
    predict(x)
