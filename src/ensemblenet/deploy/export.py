"""Write a model for other programs: ONNX, torch.export, AOTInductor, ExecuTorch, safetensors; each file is checked.

Shapes: N examples, C outputs.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ensemblenet.deploy import Format
from ensemblenet.deploy.formats import Predict, Wanted, onnx_runtime, write
from ensemblenet.deploy.network_inputs import NetworkInputs, Places, shapes_of
from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import ExportError, LoadError
from ensemblenet.heads import FusedEnsembleNet, fuse
from ensemblenet.inputs import Inputs, Tree, call, num_examples, tensors_in
from ensemblenet.storage.atomic import errors_name, folders_above
from ensemblenet.storage.descriptions import check_classes
from ensemblenet.timing import measure

__all__ = ["Exported", "Format", "export", "part"]

_CHECKED_SIZES = (1, 4)
_TIMED_SECONDS = 1.0  # at each batch size
_ALL_ANSWERS = ("onnx", "executorch")  # whose outputs have names or places; the others give what the model gives
_MOST_IN_INT8 = 0.3  # of the largest output; more than that is no rounding
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2", "executorch": ".pte", "safetensors": ""}


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
    all_answers: bool | None = None,
    calibration: Iterable[Tree] | None = None,
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
            kind of machine, which `torch._inductor.aoti_load_package` runs from Python and from C++; "executorch" for
            devices, by XNNPACK where that can, at one batch size; "safetensors" for [`ensemblenet.load`][].
        example_inputs: a tensor (N, *), or a tuple or a dictionary of tensors; not needed for a converted model. Their
            values are used where the model cannot take random ones.
        head: write this head alone.
        first: write the first so many heads.
        batch_size: N, if all sizes must be fixed; None takes batches of any size, "executorch" one example.
            "safetensors" always takes any.
        description: what else is known of the data, as plain data: `{"classes": [...], "preprocessing": {...}}`. It
            goes into the file with the task, the inputs' shapes and the number of heads: as `metadata_props` of ONNX,
            each value as JSON; as the extra file `data.json` of "torch"; under `data.json` in the metadata of "aot";
            as what the method `description` of "executorch" gives; as the file `data.json` in a directory.
        base: a fresh instance of the base, for "safetensors" of a model whose base no known factory makes.
        all_answers: whether the file of several heads gives, besides the prediction `output`, what each of the `heads`
            says and their `spread`, see `AllAnswers`. None does for "onnx" and "executorch".
        calibration: batches of inputs like those that the model will meet, for an ONNX file in 8-bit integers: static
            quantisation of convolutions and matrix products. Its outputs differ from PyTorch's by more than rounding;
            measure what that costs, as the command `export --int8` does.

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
    batches = [] if calibration is None else list(calibration)
    if calibration is not None and (format != "onnx" or not batches):
        raise ExportError(
            "calibration must hold a batch of inputs." if format == "onnx" else "8-bit integers are for format 'onnx'."
        )
    if format == "executorch":
        batch_size = batch_size or 1
    network = part(copy.deepcopy(model).eval(), head, first)
    known = network.recipe if isinstance(network, EnsembleNet) else None
    if example_inputs is None and known is None:
        raise ExportError("The model does not know the shape of its inputs: pass example_inputs.")
    inputs = known.inputs if known and example_inputs is None else Inputs.of(example_inputs)
    for tensor in tensors_in(inputs.zeros(like=network)):
        if format == "onnx" and tensor.is_complex():
            raise ExportError(f"ONNX files take no inputs of {tensor.dtype}: write format 'torch' or 'aot'.")
    given = NetworkInputs(network, inputs, [] if example_inputs is None else tensors_in(example_inputs))
    with torch.no_grad(), folders_above(path):
        if isinstance(model, FusedEnsembleNet) and isinstance(network, EnsembleNet):
            given = replace(given, network=fuse(network, given.batch(2)))  # first(k) of fused heads is a plain model
        free = given.other_sizes() if known and example_inputs is None and not batch_size else []
        if description and "classes" in description:
            _check_classes(description, tensors_in(call(network, given.batch(2)))[0].shape[1])
        if format in _ALL_ANSWERS if all_answers is None else all_answers:
            given = replace(given, all_answers=_has_all_answers(given, all_answers))
        wanted = Wanted(path, format, batch_size, given.describe(description), base, batches)
        try:
            return _export(given, wanted, free)
        except ExportError:
            if not free:
                raise
        return _export(given, wanted, [])


def _export(given: NetworkInputs, wanted: Wanted, free: Sequence[Places]) -> Exported:
    """Write the file and check it; other sizes of its inputs are free."""
    path, sizes = wanted.path, (wanted.batch_size,) if wanted.batch_size else _CHECKED_SIZES
    with (
        tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder,
        errors_name(path, Path(folder)),
    ):
        unfinished = Path(folder, path.name)
        x = given.batch(wanted.batch_size or given.unlike_other_sizes())
        predict, dynamic = write(given, x, unfinished, wanted, free)
        batches = [given.batch(size, seed) for seed, size in enumerate(sizes * (2 // len(sizes)))]
        others = [given.batch(sizes[-1], sizes=places) for places in free if dynamic.issuperset(places)]
        compared = wanted.calibration or (*batches, *others)
        difference = max(_compare(predict, given, batch, wanted) for batch in compared)
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
        onnx_runtime()
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


def _check_classes(description: Mapping[str, Any], num_outputs: int) -> None:
    try:
        check_classes(description, num_outputs)
    except LoadError as error:
        raise ExportError(str(error)) from error


def part(model: nn.Module, head: int | None, first: int | None) -> nn.Module:
    """The model of the heads that are wanted."""
    if not isinstance(model, EnsembleNet) or (head is None and first is None):
        return model
    if first is not None:
        return model.first(first)
    assert head is not None
    single = model.first(1)  # an EnsembleNet, unlike head(k): it has a recipe, so every format can hold it
    single.heads[0] = model.heads[head]
    return single


def _has_all_answers(given: NetworkInputs, wanted: bool | None) -> bool:
    """Whether a model can give them: one of several heads with one output.

    Raises:
        ExportError: they were asked for, and it cannot.
    """
    network = given.network
    can = isinstance(network, EnsembleNet) and network.num_heads > 1
    can = can and isinstance(call(network, given.batch(2)), Tensor)
    if wanted and not can:
        raise ExportError("Only a model of several heads that give one output each has all_answers.")
    return can


def _compare(predict: Predict, given: NetworkInputs, x: Tree, wanted: Wanted) -> float:
    """The largest difference between a file's outputs and PyTorch's, as a share of the largest output.

    Raises:
        ExportError: it is more than rounding.
    """
    pairs = list(zip(tensors_in(call(given.written, x)), tensors_in(predict(x)), strict=True))
    scales = [expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny) for expected, _ in pairs]
    if given.all_answers:
        scales[-1] = scales[-1].clamp(min=1.0)  # heads that hardly differ have a spread that is all rounding
    if wanted.calibration:
        del pairs[1:]  # the spread is a difference of what is rounded
    differences = [
        _difference(expected, got.to(expected.device), scale, x, wanted)
        for (expected, got), scale in zip(pairs, scales, strict=False)
    ]
    return max(differences)


def _difference(expected: Tensor, got: Tensor, scale: Tensor, x: Tree, wanted: Wanted) -> float:
    format = wanted.format
    if got.shape != expected.shape:
        raise ExportError(
            f"The {format} file gives {tuple(got.shape)} for inputs of shape {shapes_of(x)}, PyTorch gives "
            f"{tuple(expected.shape)}. Nothing was kept."
        )
    difference = ((got - expected).abs().max() / scale).item()
    most = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    most = _MOST_IN_INT8 if wanted.calibration else most
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
