"""Write a model for other programs to run: ONNX, torch.export, AOTInductor, safetensors; each file is checked first.

Shapes: N examples, C outputs.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.node import Argument

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError, first_line
from ensemblenet.heads import FusedEnsembleNet, fuse
from ensemblenet.inputs import Inputs, Tree, call, num_examples, tensors_in
from ensemblenet.storage.checkpoint import load, save
from ensemblenet.timing import measure

__all__ = ["Exported", "Format", "export"]

Format = Literal["onnx", "torch", "aot", "safetensors"]

_CHECKED_SIZES = (1, 4)
_TIMED_SECONDS = 1.0  # at each batch size
_FEWEST_TRACED = 2  # a size of 1 would be taken for a constant
_DESCRIPTION = "data.json"
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2", "safetensors": ""}
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Predict = Callable[[Tree], Any]
Places = Mapping[tuple[int, int], int]  # sizes of some dimensions: by the tensor's number and the dimension


@dataclass(frozen=True)
class Exported:
    """A file that gives what the model gives.

    Attributes:
        path: of the file, or of the directory for "safetensors".
        format: of the file.
        size: in bytes.
        difference: the largest between the file's outputs and PyTorch's, as a share of PyTorch's largest output.
        seconds: for each batch size that was tried, the median seconds of a prediction in PyTorch and in the file.
        dynamic: for each input, the dimensions of which the file takes any size that the model takes.
    """

    path: Path
    format: Format
    size: int
    difference: float
    seconds: Mapping[int, tuple[float, float]]
    dynamic: Mapping[str, tuple[int, ...]]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: Format = "onnx",
    *,
    example_inputs: Tree | None = None,
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

    The file's inputs are called as the network's arguments, a lone tensor "input". Batches may have any size, and so
    may other dimensions of which a converted model takes any (`InputSpec.fixed` lists those that must not change) if
    the format can follow them; else they keep the sizes that the model was converted for.

    Args:
        model: a base or a multi-headed model.
        path: the file to create, `*.onnx` or `*.pt2`; for "safetensors" a directory.
        format: "onnx" for any ONNX runtime; "torch" for `torch.export.load`; "aot" for a library compiled for this
            kind of machine, which `torch._inductor.aoti_load_package` runs from Python and from C++; "safetensors" for
            [`ensemblenet.load`][].
        example_inputs: a tensor (N, *), or a tuple or a dictionary of tensors; not needed for a converted model. Their
            values are used where the model cannot take random ones.
        head: write this head alone.
        first: write the first so many heads.
        batch_size: N, if all sizes must be fixed; None takes batches of any size. "safetensors" always does.
        description: what else is known of the data, as plain data: `{"classes": [...], "preprocessing": {...}}`. It
            goes into the file with the task, the inputs' shapes and the number of heads: as `metadata_props` of ONNX,
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
    known = network.recipe if isinstance(network, EnsembleNet) else None
    if example_inputs is None and known is None:
        raise ExportError("The model does not know the shape of its inputs: pass example_inputs.")
    inputs = known.inputs if known and example_inputs is None else Inputs.of(example_inputs)
    for tensor in tensors_in(inputs.zeros(like=network)):
        if format == "onnx" and tensor.is_complex():
            raise ExportError(f"ONNX files take no inputs of {tensor.dtype}: write format 'torch' or 'aot'.")
    given = _Given(network, inputs, [] if example_inputs is None else tensors_in(example_inputs))
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if isinstance(model, FusedEnsembleNet) and isinstance(network, EnsembleNet):
            given = replace(given, network=fuse(network, given.batch(2)))  # first(k) of fused heads is a plain model
        free = given.other_sizes() if known and example_inputs is None and not batch_size else []
        wanted = _Wanted(path, format, batch_size, given.describe(description), base)
        try:
            return _export(given, wanted, free)
        except ExportError:
            if not free:
                raise
        return _export(given, wanted, [])


@dataclass(frozen=True)
class _Wanted:
    """What is to be written."""

    path: Path
    format: Format
    batch_size: int | None
    description: Mapping[str, Any]
    base: nn.Module | None


def _export(given: _Given, wanted: _Wanted, free: Sequence[Places]) -> Exported:
    """Write the file and check it; other sizes of its inputs are free."""
    path, sizes = wanted.path, (wanted.batch_size,) if wanted.batch_size else _CHECKED_SIZES
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        x = given.batch(wanted.batch_size or given.unlike_other_sizes())
        predict, dynamic = _write(given, x, unfinished, wanted, free)
        batches = [given.batch(size, seed) for seed, size in enumerate(sizes * (2 // len(sizes)))]
        others = [given.batch(sizes[-1], sizes=places) for places in free if dynamic.issuperset(places)]
        difference = max(_compare(predict, given.network, batch, wanted.format) for batch in (*batches, *others))
        seconds = {num_examples(batch): _time(predict, given.network, batch) for batch in batches}
        size = sum(file.stat().st_size for file in (unfinished, *unfinished.rglob("*")) if file.is_file())
        unfinished.rename(path)
    named = {
        name: tuple(sorted(dim for tensor, dim in dynamic if tensor == index)) for index, name in enumerate(given.names)
    }
    return Exported(path, wanted.format, size, difference, seconds, named)


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
    if format == "onnx":
        _onnx_runtime()
        if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
            raise ExportError("NumPy has no bfloat16 to check an ONNX file with: export model.float().")
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


@dataclass(frozen=True)
class _Given:
    """A network, and what its inputs are.

    Attributes:
        network: in evaluation mode.
        inputs: what they are.
        example: the user's own; may be empty.
    """

    network: nn.Module
    inputs: Inputs
    example: Sequence[Tensor]

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return self.inputs.names(self.network)

    def batch(self, size: int, seed: int = 0, sizes: Places | None = None) -> Tree:
        """Random inputs for N examples, on which the network's outputs are finite.

        Floats are normal; integers are 0 and 1, which every embedding knows, or all 1 or all 0: a mask may not hide
        all of an example, and an index must exist. The last resort are the user's own examples.

        Args:
            size: N.
            seed: of the random numbers.
            sizes: of some dimensions, where they are not those of the specification.

        Raises:
            ExportError: the network takes none of them.
        """
        shapes = [list(spec.whole(size)) for spec in self.inputs.tensors]
        for (index, dim), other in (sizes or {}).items():
            shapes[index][dim] = other
        kinds = [spec.zeros(like=self.network) for spec in self.inputs.tensors]
        problem = ""
        for tensors in self._fillings(shapes, seed):
            x = self.inputs.build([tensor.to(kind) for tensor, kind in zip(tensors, kinds, strict=True)])
            try:
                with redirect_stderr(io.StringIO()):  # torch.fx prints the line that fails
                    outputs = tensors_in(call(self.network, x))
            except Exception as error:  # whatever a network objects to
                problem = problem or f"The model fails on random inputs of shape {_shapes(x)}: {first_line(error)}"
                continue
            if all(torch.isfinite(output).all() for output in outputs):
                return x
            problem = problem or f"The model's own outputs are not finite on random inputs of shape {_shapes(x)}."
        raise ExportError(problem)

    def _fillings(self, shapes: Sequence[Sequence[int]], seed: int) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        kinds = [getattr(torch, spec.dtype) for spec in self.inputs.tensors]
        normal = [
            torch.randn(shape, generator=generator, dtype=torch.complex64 if kind.is_complex else torch.float32)
            for shape, kind in zip(shapes, kinds, strict=True)
        ]
        is_exact = [not (kind.is_floating_point or kind.is_complex) for kind in kinds]
        for integers in (lambda values: values > 0, torch.ones_like, torch.zeros_like):
            yield [integers(values) if exact else values for values, exact in zip(normal, is_exact, strict=True)]
            if not any(is_exact):
                break
        if self.example:
            yield [_repeated(tensor, shape) for tensor, shape in zip(self.example, shapes, strict=True)]

    def unlike_other_sizes(self) -> int:
        """A number of examples that is no other size, so that none is taken for it."""
        sizes = {size for spec in self.inputs.tensors for size in spec.shape}
        return next(size for size in count(_FEWEST_TRACED) if size not in sizes)

    def other_sizes(self) -> list[Places]:
        """Sizes unlike those of the specification that the network takes; inputs of one size change together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, spec in enumerate(self.inputs.tensors):
            for dim, size in enumerate(spec.whole(0)):
                if size > 1:
                    groups.setdefault((dim, size), []).append(index)
        found: list[Places] = []
        for (dim, size), members in groups.items():
            if any(dim in self.inputs.tensors[index].fixed for index in members):
                continue
            for other in {size // 2, 2 * size, size + 1} - {0, 1, size}:
                places = {(index, dim): other for index in members}
                try:
                    self.batch(2, sizes=places)
                except ExportError:
                    continue
                found.append(places)
                break
        return found

    def describe(self, description: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the file says of itself."""
        described: dict[str, Any] = {"num_heads": 1}
        if self.inputs.tree == 0:
            described["input_shape"] = list(self.inputs.shape)
        else:
            kinds = zip(self.names, self.inputs.tensors, strict=True)
            described["inputs"] = {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in kinds}
        if isinstance(self.network, EnsembleNet):
            described |= {"task": self.network.task, "num_heads": self.network.num_heads}
        return described | dict(description or {})


def _repeated(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first so many elements of each dimension, over and over."""
    for dim, size in enumerate(shape):
        tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
    return tensor


def _shapes(x: Tree) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(x))


# -- formats


def _write(
    given: _Given, x: Tree, path: Path, wanted: _Wanted, free: Sequence[Places]
) -> tuple[Predict, set[tuple[int, int]]]:
    """Write the file; return a function that runs it, and the dimensions that may have any size in it."""
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
        torch.export.save(program, path, extra_files={_DESCRIPTION: json.dumps(wanted.description)})
        predict = partial(call, torch.export.load(path).module())
    else:
        predict = partial(call, _write_aot(program, path, wanted.description))
    return predict, set(symbols)


def _as_arguments(x: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x if isinstance(x, tuple) else (x,)), {}


def _with_names(given: _Given, x: Tree) -> nn.Module:
    """The network with its arguments' names in its signature, from which torch.export takes them."""
    graph = Graph()
    names = given.inputs.arguments(given.network, tensors_in(x))
    arguments: dict[str, Argument] = {name: graph.placeholder(name) for name in names}
    by_name = isinstance(x, Mapping)
    outputs = graph.call_module("network", () if by_name else tuple(arguments.values()), arguments if by_name else {})
    graph.output(outputs)
    return GraphModule({"network": given.network}, graph)


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


def _write_directory(network: nn.Module, path: Path, wanted: _Wanted) -> nn.Module:
    assert isinstance(network, EnsembleNet)
    device = next(network.parameters(), torch.zeros(0)).device
    return load(save(network, path, wanted.description), wanted.base).to(device)


def _write_onnx(
    program: ExportedProgram,
    given: _Given,
    x: Tree,
    path: Path,
    wanted: _Wanted,
    symbols: Mapping[tuple[int, int], str],
) -> Predict:
    args, kwargs = _as_arguments(x)
    names, outputs = given.names, _output_names(given.network, len(program.graph_signature.user_outputs))
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
    except Exception as error:  # an operator that ONNX lacks, or more than the 2 GB that one file can hold
        raise ExportError(f"torch.onnx cannot write the model: {first_line(error)}") from error
    runtime = _onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(x: Tree) -> tuple[Tensor, ...]:
        arrays = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors_in(x), strict=True)}
        return tuple(map(torch.from_numpy, session.run(outputs, arrays)))

    return predict


def _onnx_runtime() -> Any:
    """What runs ONNX files; the other packages are there too."""
    try:
        *_, runtime = map(importlib.import_module, _PACKAGES)
    except ImportError as error:
        raise ExportError(f"ONNX needs more packages: pip install 'ensemblenet[export]' ({error})") from error
    return runtime


def _axis_names(given: _Given, symbols: Mapping[tuple[int, int], str]) -> dict[str, str]:
    """What to call the sizes of a file: "batch", and after the first input that has them."""
    found: dict[str, str] = {}
    for (index, dim), symbol in symbols.items():
        is_batch = dim == 0 and given.inputs.tensors[index].is_batched
        found.setdefault(symbol, "batch" if is_batch else f"{given.names[index]}_{dim}")
    return found


def _output_names(network: nn.Module, several: int) -> list[str]:
    """Of the file's outputs: as the conversion named them, if it did."""
    wanted = network.recipe.output if isinstance(network, EnsembleNet) and network.recipe else None
    if isinstance(wanted, tuple):
        return [name if isinstance(name, str) else f"output_{name}" for name in wanted]
    return ["output"] if several == 1 else [f"output_{index}" for index in range(several)]


def _write_aot(program: ExportedProgram, path: Path, description: Mapping[str, Any]) -> Callable[..., Any]:
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


def _compare(predict: Predict, network: nn.Module, x: Tree, format: Format) -> float:
    """The largest difference between a file's outputs and PyTorch's, as a share of the largest output.

    Raises:
        ExportError: it is more than rounding.
    """
    pairs = zip(tensors_in(call(network, x)), tensors_in(predict(x)), strict=True)
    return max(_difference(expected, got.to(expected.device), x, format) for expected, got in pairs)


def _difference(expected: Tensor, got: Tensor, x: Tree, format: Format) -> float:
    if got.shape != expected.shape:
        raise ExportError(
            f"The {format} file gives {tuple(got.shape)} for inputs of shape {_shapes(x)}, PyTorch gives "
            f"{tuple(expected.shape)}. Nothing was kept."
        )
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    difference = ((got - expected).abs().max() / scale).item()
    most = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    if not difference <= most:  # also for NaN
        raise ExportError(
            f"The {format} file differs from PyTorch by {difference:.2g} of the largest output, for "
            f"{num_examples(x)} random inputs; {most:g} is allowed. Nothing was kept."
        )
    return difference


def _time(predict: Predict, network: nn.Module, x: Tree) -> tuple[float, float]:
    steps = {"pytorch": partial(_run, partial(call, network), x), "file": partial(_run, predict, x)}
    seconds = measure(steps, repeats=1)
    repeats = min(25, int(_TIMED_SECONDS / sum(seconds.values())))
    if repeats > 1:
        seconds = measure(steps, repeats)
    return seconds["pytorch"], seconds["file"]


def _run(predict: Predict, x: Tree) -> None:
    predict(x)
