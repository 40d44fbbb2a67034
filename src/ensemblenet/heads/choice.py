"""Choose how heads run by measuring it on the real shapes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.errors import FusionError
from ensemblenet.heads.fused import FusedEnsembleNet, fuse, unfuse
from ensemblenet.heads.rules import JoinedConvolution

__all__ = ["Choice", "HeadsMode", "choose", "measure", "step", "tune"]

HeadsMode = Literal["auto", "looped", "fused", "compiled", "recomputed"]

_TURNS, _SECONDS = 5, 2.0  # of a measurement that decides: at least so many turns, and more until the time is up


@dataclass(frozen=True)
class Choice:
    """How heads run, and why.

    Attributes:
        heads: "looped", "fused", "compiled" or "recomputed".
        reason: in words.
        seconds: of one step, by the way the heads run; empty where nothing was measured.
        separate: names of the convolutions of fused heads that run head by head.
    """

    heads: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    separate: tuple[str, ...] = ()


def choose(model: EnsembleNet, x: Tensor, heads: HeadsMode = "auto") -> tuple[EnsembleNet, Choice]:
    """The model with its heads run in the way that is asked for, or else in the faster one.

    Args:
        model: in training mode to measure a step of forward and backward, else the forward pass alone.
        x: inputs of the real shape, (N, *).
        heads: "looped" runs one head after another; "fused" is [`ensemblenet.fuse`][], in which every convolution runs
            grouped or head by head as [`ensemblenet.heads.tune`][] finds faster; "compiled" is that under
            `torch.compile`, whose first steps take a minute or more; "recomputed" is looped with
            `EnsembleNet.recompute`, for less memory. "auto" measures the first two, and takes the faster one.

    Returns:
        The model, with the very trunk and heads, and the choice.

    Raises:
        FusionError: heads of unlike structure were to be fused.

    Example:
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(4)])
        >>> model, choice = choose(model, torch.randn(5, 8), "looped")
        >>> choice
        Choice(heads='looped', reason='as asked', seconds={}, separate=())
    """
    if heads not in get_args(HeadsMode):
        raise FusionError(f"heads must be one of {', '.join(map(repr, get_args(HeadsMode)))}; got {heads!r}.")
    if heads in ("looped", "recomputed") or (heads == "auto" and model.num_heads == 1):
        model = unfuse(model)
        model.recompute = heads == "recomputed"
        return model, Choice("looped", "there is one head") if heads == "auto" else Choice(heads, "as asked")
    try:
        fused = fuse(model, x)
    except FusionError as error:
        if heads != "auto":
            raise
        return model, Choice("looped", str(error))
    trial = copy.deepcopy(unfuse(model))  # a step changes statistics
    fused_trial = fuse(trial, x)
    separate = tuple(sorted(tune(fused_trial, x)))
    fused.separate(separate, model.training)
    if heads != "auto":
        if heads == "compiled":
            fused.compile()
        return fused, Choice(heads, "as asked", separate=separate)
    seconds = measure({"looped": step(trial, x), "fused": step(fused_trial, x)}, _TURNS, _SECONDS)
    reason = (
        f"a {'training step' if model.training else 'prediction'} of {len(x)} examples took "
        f"{1000 * seconds['fused']:.1f} ms fused and {1000 * seconds['looped']:.1f} ms looped"
    )
    if seconds["looped"] < seconds["fused"]:
        return unfuse(model), Choice("looped", reason, seconds)
    return fused, Choice("fused", reason, seconds, separate)


def tune(model: FusedEnsembleNet, x: Tensor, repeats: int = 5) -> set[str]:
    """Find the convolutions that are faster head by head than grouped, and let them run so.

    Which is faster depends on the library, the threads and the shapes; so it is measured on the tensors that each
    convolution meets, with its backward pass if the model is in training mode.

    Args:
        model: in the mode that counts; a training step changes its statistics.
        x: inputs of the real shape, (N, *).
        repeats: of each measurement, of which the median counts.

    Returns:
        Names of the convolutions that run head by head.
    """
    inputs: dict[JoinedConvolution, tuple[Any, ...]] = {}

    def keep(layer: JoinedConvolution, args: tuple[Any, ...]) -> None:
        inputs[layer] = args

    layers = model.convolutions
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    with torch.random.fork_rng(_devices(x)), torch.set_grad_enabled(model.training):
        model(x)
    for hook in hooks:
        hook.remove()
    slower = set()
    for name, layer in layers.items():
        seconds = measure({how: _trial(layer, inputs[layer], how, model.training) for how in (False, True)}, repeats)
        if seconds[True] < seconds[False]:
            slower.add(name)
    model.separate(slower, model.training)
    return slower


def _trial(layer: JoinedConvolution, args: tuple[Any, ...], separate: bool, training: bool) -> Callable[[], None]:
    tensors = [arg.detach().requires_grad_(training) for arg in args if arg is not None]

    def run() -> None:
        layer.separate[training] = separate
        with torch.set_grad_enabled(training):
            out = layer(*tensors, *(None for _ in range(len(args) - len(tensors))))
        if training:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One training step without its optimizer, or one prediction, as the model's mode says."""

    def run() -> None:
        with torch.random.fork_rng(_devices(x)), torch.set_grad_enabled(model.training):
            out = model(x)
        if model.training:
            model.zero_grad(set_to_none=True)
            out.float().square().mean().backward()

    return run


def measure(steps: Mapping[Any, Callable[[], None]], repeats: int = 5, at_least: float = 0.0) -> dict[Any, float]:
    """The median seconds of each step, taken in turns so that a change in the machine's load meets all of them.

    Args:
        steps: by name.
        repeats: turns, behind one that warms up.
        at_least: more turns are taken until this many seconds are up, or ten times as many.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + at_least
    for turn in range(10 * repeats + 1):
        if turn > repeats and time.perf_counter() > end:
            break
        for name, run in steps.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []
