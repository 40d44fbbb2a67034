"""Write a network in a format, and read the file back as a function."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.node import Argument

from ensemblenet.deploy import Format
from ensemblenet.deploy.network_inputs import ALL_ANSWERS, NetworkInputs, Places
from ensemblenet.deploy.quantise import quantise
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError, first_line
from ensemblenet.inputs import Tree, call, tensors_in
from ensemblenet.storage.checkpoint import load, write_model
from ensemblenet.storage.descriptions import DESCRIPTION

__all__ = ["Predict", "Wanted", "onnx_runtime", "read_onnx", "write"]

Predict = Callable[[Tree], Any]

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        calibration: inputs by which the file gets integers of 8 bits; empty leaves its numbers as they are.

    Example:
        >>> Wanted(Path("model.onnx"), "onnx", None, {}, None).batch_size is None
        True
    """

    path: Path
    format: Format
    batch_size: int | None
    description: Mapping[str, Any]
    base: nn.Module | None
    calibration: Sequence[Tree] = ()


def write(
    given: NetworkInputs, x: Tree, path: Path, wanted: Wanted, free: Sequence[Places]
) -> tuple[Predict, set[tuple[int, int]]]:
    """Write the file; return a function that runs it, and the dimensions that may have any size in it.

    Args:
        given: the network.
        x: inputs to trace it on, without a size that could be taken for another.
        path: of the file, or of the directory for "safetensors".
        wanted: what else is asked.
        free: sizes of the inputs that the network takes besides.

    Raises:
        ExportError: the format cannot hold the network.

    Example:
        >>> import tempfile
        >>> from ensemblenet.inputs import Inputs
        >>> given = NetworkInputs(nn.Linear(8, 3).eval(), Inputs.of(torch.zeros(2, 8)), [])
        >>> path = Path(tempfile.mkdtemp(), "model.pt2")
        >>> predict, dynamic = write(given, given.batch(2), path, Wanted(path, "torch", None, {}, None), [])
        >>> predict(torch.zeros(5, 8)).shape, dynamic
        (torch.Size([5, 3]), {(0, 0)})
    """
    specs = given.inputs.tensors
    batch = {(index, 0) for index, spec in enumerate(specs) if spec.is_batched and not wanted.batch_size}
    others = {place for places in free for place in places}
    if wanted.format == "safetensors":
        return partial(call, _write_directory(given.network, path, wanted)), batch | others
    # AUTO: where the network itself needs one size, that one
    kinds = {**dict.fromkeys(batch, Dim.DYNAMIC), **dict.fromkeys(others, Dim.AUTO)}
    shapes = [{dim: kind for (tensor, dim), kind in kinds.items() if tensor == index} for index in range(len(specs))]
    args, kwargs = _as_arguments(x)
    try:
        program = torch.export.export(
            _with_names(given, x),
            args,
            kwargs,
            dynamic_shapes=given.inputs.arguments(given.network, shapes),
        )
    except Exception as error:  # whatever keeps a network from being traced
        advice = "" if wanted.batch_size else "; if it works for one size only, fix the batch size"
        raise ExportError(f"torch.export cannot write the model{advice}: {first_line(error)}") from error
    _forget_sources(program)
    symbols = _symbols(program)
    if wanted.format == "onnx":
        predict = _write_onnx(program, given, x, path, wanted, symbols)
    elif wanted.format == "torch":
        file = io.BytesIO()  # PyTorch's own writer aborts the process where the disk is full
        torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(wanted.description)})
        path.write_bytes(file.getbuffer())
        predict = partial(call, torch.export.load(path).module())
    elif wanted.format == "executorch":
        predict = _write_executorch(program, path, wanted.description)
    else:
        predict = partial(call, _write_aot(program, path, wanted.description))
    return predict, set(symbols)


def _as_arguments(x: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x if isinstance(x, tuple) else (x,)), {}


def _with_names(given: NetworkInputs, x: Tree) -> nn.Module:
    """The network with its arguments' names in its signature, from which torch.export takes them."""
    graph = Graph()
    names = given.inputs.arguments(given.network, tensors_in(x))
    arguments: dict[str, Argument] = {name: graph.placeholder(name) for name in names}
    by_name = isinstance(x, Mapping)
    outputs = graph.call_module("network", () if by_name else tuple(arguments.values()), arguments if by_name else {})
    graph.output(outputs)
    return GraphModule({"network": given.written}, graph)


def _symbols(program: ExportedProgram) -> dict[tuple[int, int], str]:
    """The symbols of the dimensions that may have any size, by the input's number and the dimension."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return {
        (index, dim): str(size)
        for index, name in enumerate(program.graph_signature.user_inputs)
        for dim, size in enumerate(values[name].shape)
        if isinstance(size, torch.SymInt)
    }


def _forget_sources(program: ExportedProgram) -> None:
    """Leave out of the file which lines of which folders of this machine made each node."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _write_directory(network: nn.Module, path: Path, wanted: Wanted) -> nn.Module:
    assert isinstance(network, EnsembleNet)
    device = next(network.parameters(), torch.zeros(0)).device
    write_model(network, path, wanted.description)
    return load(path, wanted.base, trust=True).to(device)  # its code has made the model already


def _write_onnx(
    program: ExportedProgram,
    given: NetworkInputs,
    x: Tree,
    path: Path,
    wanted: Wanted,
    symbols: Mapping[tuple[int, int], str],
) -> Predict:
    args, kwargs = _as_arguments(x)
    names, outputs = given.names, _output_names(given, len(program.graph_signature.user_outputs))
    axes = _axis_names(given, symbols)
    shapes = [{dim: axes[symbols[i, dim]] for i, dim in symbols if i == index} for index in range(len(names))]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*axis name", category=UserWarning)  # of sizes that inputs share
            onnx = torch.onnx.export(
                program,
                args,
                kwargs=kwargs,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=given.inputs.arguments(given.network, shapes) if symbols else None,
                verbose=False,
            )
            assert onnx is not None
            onnx.model.metadata_props.update({key: json.dumps(value) for key, value in wanted.description.items()})
            onnx.save(path, external_data=False)
            if wanted.calibration:
                quantise(path, names, wanted.calibration)
    except OSError:
        raise
    except Exception as error:  # an operator that ONNX lacks, or more than the 2 GB that one file can hold
        raise ExportError(f"torch.onnx cannot write the model: {first_line(error)}") from error
    return read_onnx(path, names)


def read_onnx(path: Path, names: Sequence[str]) -> Predict:
    """A file as a function of tensors, on the processor.

    Args:
        path: of the ONNX file.
        names: of its inputs, in the order of the network's tensors.
    """
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(x: Tree) -> tuple[Tensor, ...]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors_in(x), strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, arrays)))

    return predict


def onnx_runtime() -> Any:
    """What runs ONNX files; the other packages are there too.

    Example:
        >>> onnx_runtime().__name__
        'onnxruntime'
    """
    try:
        *_, runtime = map(importlib.import_module, _PACKAGES)
    except ImportError as error:
        raise ExportError(f"ONNX needs more packages: pip install 'ensemblenet[export]' ({error})") from error
    return runtime


def _axis_names(given: NetworkInputs, symbols: Mapping[tuple[int, int], str]) -> dict[str, str]:
    """What to call the sizes of a file: "batch", and after the first input that has them."""
    found: dict[str, str] = {}
    for (index, dim), symbol in symbols.items():
        is_batch = dim == 0 and given.inputs.tensors[index].is_batched
        found.setdefault(symbol, "batch" if is_batch else f"{given.names[index]}_{dim}")
    return found


def _output_names(given: NetworkInputs, several: int) -> list[str]:
    """Of the file's outputs: as the conversion named them, if it did."""
    if given.all_answers:
        return list(ALL_ANSWERS)
    network = given.network
    wanted = network.recipe.output if isinstance(network, EnsembleNet) and network.recipe else None
    if isinstance(wanted, tuple):
        return [name if isinstance(name, str) else f"output_{name}" for name in wanted]
    return ["output"] if several == 1 else [f"output_{index}" for index in range(several)]


def _write_executorch(program: ExportedProgram, path: Path, description: Mapping[str, Any]) -> Predict:
    """A file for devices, by XNNPACK where that can; the description is a method of it that gives JSON."""
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]  # an extra
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]  # an extra
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ExportError(f"ExecuTorch needs more packages: pip install 'ensemblenet[executorch]' ({error})") from error
    try:
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={"description": json.dumps(description)}
        ).to_executorch()
    except Exception as error:  # an operator that it lacks
        raise ExportError(f"ExecuTorch cannot hold the model: {first_line(error)}") from error
    path.write_bytes(lowered.buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None
    return lambda x: tuple(output.clone() for output in method.execute(tensors_in(x)))


def _write_aot(program: ExportedProgram, path: Path, description: Mapping[str, Any]) -> Callable[..., Any]:
    file = io.BytesIO()  # as above
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=file,
            inductor_configs={"aot_inductor.metadata": {DESCRIPTION: json.dumps(description)}},
        )
    except OSError:
        raise
    except Exception as error:  # no compiler, or one that fails, in Inductor's words
        reason = next((number for number in _FULL_DISK if os.strerror(number) in str(error)), None)
        if reason is not None:
            where = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())  # PyTorch sets it when it begins
            raise OSError(reason, f"{os.strerror(reason)} in {where}, where it is compiled", str(path)) from error
        raise ExportError(
            f"AOTInductor cannot compile the model; it needs a C++ compiler such as g++: {first_line(error)}"
        ) from error
    path.write_bytes(file.getbuffer())
    return torch._inductor.aoti_load_package(str(path))
