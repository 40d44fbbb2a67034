"""What a network of the zoo is, and a check of its conversion that shares no code with the library's own checks."""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet import convert, fuse, split_points
from ensemblenet.errors import ConversionError, FusionError, InputError
from ensemblenet.testing import check_conversion

Inputs = Callable[[int, int], Any]  # of a number of examples and a size
LINE = re.compile(r"\w+\.py:\d+")


@dataclass(frozen=True)
class Entry:
    """A network as its owner has it.

    Attributes:
        name: what it is.
        make: builds it, its weights drawn at random.
        inputs: inputs for a number of examples, and a size, such as a length.
        size: the size to convert it for.
        sizes: others that it takes itself.
        output: what `convert` is told of its output.
        others: more inputs that it must serve, such as other masks.
        way: where the conversion may be refused, a network that does what the refusal proposes.
        options: others of `convert`.
        tolerance: how far outputs may differ, as a share of the largest.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    size: int = 0
    sizes: tuple[int, ...] = ()
    output: Any = None
    others: Callable[[], list[Any]] = list
    way: Callable[[], nn.Module] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Finding:
    """What came of a conversion.

    Attributes:
        verdict: "converted"; "refused", with a line of the user's code, and a way that works where the entry has one;
            "wrong", where a model is not what it promises; "failed", with an error that is none of ours.
        seconds: how long all of it took.
        split_at: where the heads begin.
        trunk: the trunk's share of the MACs.
        width: of the heads.
        used: the model's cost as a share of the base's, parameters or MACs, whichever is more.
        refused_sizes: other sizes that the base takes and the model refuses.
        fused: whether the heads run as one.
        text: the refusal, or what is wrong.
    """

    verdict: str
    seconds: float = 0.0
    split_at: str = ""
    trunk: float = 0.0
    width: float = 0.0
    used: float = 0.0
    refused_sizes: tuple[str, ...] = ()
    fused: str = ""
    text: str = ""


class WrongError(AssertionError):
    """A model that is not what its base is."""


def check(entry: Entry, num_heads: int = 2, budget: float = 1.0) -> Finding:
    """Convert a network of the zoo, and compare what comes of it with the base."""
    start = time.perf_counter()
    try:
        found = _check(entry, num_heads, budget)
    except ConversionError as error:
        found = {"verdict": "refused", "text": str(error)}
        if not LINE.search(str(error)):
            found["text"] = "names no line: " + found["text"]
        if entry.way is not None:
            try:
                found |= {**_check(replace(entry, make=entry.way), num_heads, budget), "verdict": "refused, with a way"}
            except Exception as error:
                found["text"] += f" THE WAY FAILS: {type(error).__name__}: {error}"
    except AssertionError as error:
        found = {"verdict": "wrong", "text": str(error)}
    except Exception as error:
        found = {"verdict": "failed", "text": f"{type(error).__name__}: {error}"}
    found["text"] = " ".join(found.get("text", "").split())[:400]
    return Finding(**found, seconds=time.perf_counter() - start)


def _check(entry: Entry, num_heads: int, budget: float) -> dict[str, Any]:
    torch.manual_seed(0)
    base = entry.make()
    torch.manual_seed(1)
    example = entry.inputs(4, entry.size)
    options = {"output": entry.output, **entry.options}
    report = check_conversion(base, example, num_heads, budget, **options)
    points = {point.name: point for point in split_points(base, example, entry.output)}
    names = list(points)
    refused: tuple[str, ...] = ()
    for name in dict.fromkeys((report.split_at, entry.options.get("split_at", names[len(names) // 2]))):
        refused += _compare_whole(entry, base, example, name)
    return {
        "verdict": "converted",
        "split_at": report.split_at,
        "trunk": points[report.split_at].macs_share,
        "width": report.width,
        "used": max(report.parameters_share, report.macs_share),
        "refused_sizes": tuple(dict.fromkeys(refused)),
        "fused": _compare_fused(base, example, num_heads, budget, options, entry.tolerance),
    }


def _compare_whole(entry: Entry, base: nn.Module, example: Any, split_at: str) -> tuple[str, ...]:
    """At full width, the model is the base: outputs and gradients, at other sizes and values of the inputs."""
    options = {**entry.options, "init": "inherit", "output": entry.output, "split_at": split_at}
    whole = convert(base, example, 1, 2.0, **options)
    refused = []
    trials = [(f"{entry.size}", example)]
    torch.manual_seed(2)
    trials += [(f"N={n}", entry.inputs(n, entry.size)) for n in (1, 3, 7)]
    trials += [(f"size {size}", entry.inputs(4, size)) for size in entry.sizes]
    trials += [(f"others[{k}]", inputs) for k, inputs in enumerate(entry.others())]
    for name, inputs in trials:
        where = f"split at {split_at!r}, {name}"
        try:
            expected = _outputs(base.eval(), inputs, entry.output)
        except Exception:  # such inputs are not for it
            continue
        try:
            got = _outputs(whole.eval(), inputs)
        except InputError:
            refused.append(name)
            continue
        except Exception as error:
            raise WrongError(f"{where}: the model fails: {type(error).__name__}: {error}") from error
        _compare(expected, got, entry.tolerance, where)
    training = _is_sure(lambda: _again(entry, base), example, entry.output)
    if not training and _is_sure(lambda: copy.deepcopy(whole), example, None):
        raise WrongError(f"split at {split_at!r}: the base's chance in training mode is lost")
    _compare_gradients(entry, base, whole, example, training, split_at)
    return tuple(refused)


def _compare(expected: list[Tensor], got: list[Tensor], tolerance: float, where: str) -> None:
    for one, other in zip(expected, got, strict=True):
        if one.shape != other.shape:
            raise WrongError(f"{where}: shape {tuple(other.shape)} where the base gives {tuple(one.shape)}")
        error = ((one - other).abs().max() / one.abs().max().clamp(min=1e-6)).item() if one.numel() else 0.0
        if not error <= tolerance:
            raise WrongError(f"{where}: outputs differ by {error:.2g} of the largest")


def _outputs(network: nn.Module, inputs: Any, output: Any = None) -> list[Tensor]:
    """The learned outputs of a base or of a model."""
    if isinstance(inputs, dict):
        returned = network(**inputs)
    else:
        returned = network(*inputs) if isinstance(inputs, tuple) else network(inputs)
    names = output if isinstance(output, list) else [output]
    if isinstance(returned, Tensor):
        return [returned]
    if output is None:
        return [returned["logits"]] if isinstance(returned, dict) else list(returned)
    return [returned[name] for name in names]


def _compare_gradients(
    entry: Entry, base: nn.Module, whole: nn.Module, example: Any, training: bool, split_at: str
) -> None:
    """One backward pass; outputs in training mode too, where the base has no chance in it."""
    twin = _again(entry, base).train(training)
    whole.train(training)
    where = f"split at {split_at!r}, {'training' if training else 'evaluation'} mode"
    expected, got = _outputs(twin, example, entry.output), _outputs(whole, example)
    got = [part[0] for part in got] if training else got
    _compare(expected, got, entry.tolerance, where)
    _loss(expected).backward()
    _loss(got).backward()
    owners = {name: id(p) for name, p in twin.named_parameters(remove_duplicate=False)}
    gradients = {id(p): p.grad for p in twin.parameters()}
    found: dict[int, Tensor] = {}
    for name, parameter in whole.named_parameters():
        name = name.removeprefix("trunk.").removeprefix("heads.0.")
        owner = owners.get(name, owners.get(f"_orig_mod.{name}"))
        if owner is None:
            raise WrongError(f"{where}: {name} is no parameter of the base")
        if parameter.grad is not None:
            found[owner] = found.get(owner, 0) + parameter.grad
    largest = max((g.abs().max().item() for g in gradients.values() if g is not None), default=1.0)
    tolerance = 10 * entry.tolerance
    for name, owner in owners.items():
        one, other = gradients[owner], found.get(owner)
        zero = torch.zeros(()) if one is None else torch.zeros_like(one)
        error = ((zero if one is None else one) - (zero if other is None else other)).abs().max().item() / largest
        if not error <= tolerance:
            raise WrongError(f"{where}: the gradient of {name} differs by {error:.2g} of the largest")


def _again(entry: Entry, base: nn.Module) -> nn.Module:
    """The base anew: not all bases can be copied."""
    twin = entry.make()
    twin.load_state_dict(base.state_dict())
    return twin


def _is_sure(make: Callable[[], nn.Module], example: Any, output: Any) -> bool:
    """Whether a network gives the same every time in training mode."""
    values = []
    for seed in range(4):
        network = make().train()
        torch.manual_seed(seed)
        random.seed(seed)
        with torch.no_grad():
            values.append(_outputs(network, example, output))
    return all(torch.equal(*pair) for other in values[1:] for pair in zip(values[0], other, strict=True))


def _loss(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    return torch.stack([(w * output).sum() for w, output in zip(weights, outputs, strict=True)]).sum()


def _compare_fused(
    base: nn.Module, example: Any, num_heads: int, budget: float, options: Mapping[str, Any], tolerance: float
) -> str:
    """Fused heads give what they gave one by one."""
    model = convert(base, example, num_heads, budget, **options).eval()
    try:
        fused = fuse(model)
    except FusionError as error:
        return f"refused: {error}"
    with torch.no_grad():
        _compare(_outputs(model, example), _outputs(fused.eval(), example), tolerance, "fused")
    return "fused"


def check_base(entry: Entry) -> None:
    """A base itself runs, at all its sizes, and trains."""
    torch.manual_seed(0)
    base = entry.make()
    torch.manual_seed(1)
    trials = [entry.inputs(n, entry.size) for n in (4, 1, 3, 7)]
    trials += [entry.inputs(4, size) for size in entry.sizes] + entry.others()
    for inputs in trials:
        with torch.no_grad():
            outputs = _outputs(base.eval(), inputs, entry.output)
        assert all(torch.isfinite(output).all() for output in outputs), f"{entry.name} is not finite"
    _loss(_outputs(base.train(), trials[0], entry.output)).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in base.parameters()), f"{entry.name} does not train"
