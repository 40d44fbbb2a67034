"""Choose how heads run by measuring it on the real shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ensemblenet.ensemble import EnsembleNet, as_tuple
from ensemblenet.errors import FusionError, first_line
from ensemblenet.heads.fused import FusedEnsembleNet, evaluating, fuse, unfuse
from ensemblenet.inputs import Tree, call, num_examples, tensors_in
from ensemblenet.operations.convolution import FusedConvolution
from ensemblenet.timing import cuda_devices, measure, step

__all__ = ["Choice", "HeadsMode", "choose", "current_mode", "tune"]

HeadsMode = Literal["auto", "looped", "fused", "compiled", "checkpointed", "recomputed"]  # the last is an old name

_TURNS, _SECONDS = 5, 2.0  # of a measurement that decides: at least so many turns, and more until the time is up


@dataclass(frozen=True)
class Choice:
    """How heads run, and why.

    Attributes:
        heads: "looped", "fused", "compiled" or "checkpointed".
        reason: in words.
        seconds: of one step, by the way the heads run; empty where nothing was measured.
        separate: names of the convolutions of fused heads that run head by head.

    Example:
        >>> Choice("looped", "there is one head").separate
        ()
    """

    heads: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    separate: tuple[str, ...] = ()


def choose(model: EnsembleNet, x: Tree, heads: HeadsMode = "auto") -> tuple[EnsembleNet, Choice]:
    """The model with its heads run as asked, or else in the faster of two ways.

    Args:
        model: in training mode to measure a step of forward and backward, else the forward pass alone.
        x: inputs of the real shape, (N, *), or a tuple or a dictionary of tensors.
        heads: "looped" runs one head after another; "fused" is [`ensemblenet.fuse`][], in which every convolution runs
            grouped or head by head as [`ensemblenet.heads.tune`][] finds faster; "compiled" is that under
            `torch.compile`, whose first steps take a minute or more; "checkpointed" is looped with
            `EnsembleNet.checkpoint_activations`, for less memory. "auto" measures the first two, and takes the faster
            one; checkpointed heads where `checkpoint_activations` was set by hand, or where a training step does not
            fit the memory of a GPU without.

    Returns:
        The model, with the very trunk and heads, and the choice.

    Raises:
        FusionError: heads were to be fused that cannot be, or that do not give what looped ones give. "auto" takes
            looped heads then, and warns.

    Example:
        >>> from torch import nn
        >>> model = EnsembleNet(nn.Linear(8, 16), [nn.Linear(16, 3) for _ in range(4)])
        >>> model, choice = choose(model, torch.randn(5, 8), "looped")
        >>> choice
        Choice(heads='looped', reason='as asked', seconds={}, separate=())
    """
    heads = current_mode(heads)
    if heads == "auto" and model.checkpoint_activations:
        return unfuse(model), Choice("checkpointed", "checkpoint_activations was set by hand")
    if heads in ("looped", "checkpointed") or (heads == "auto" and model.num_heads == 1):
        model = unfuse(model)
        model.checkpoint_activations = heads == "checkpointed"
        return model, Choice("looped", "there is one head") if heads == "auto" else Choice(heads, "as asked")
    trial = copy.deepcopy(unfuse(model))  # a step changes statistics
    try:
        step(trial, x)()  # what fails here is no matter of how heads run, but for the memory
    except torch.OutOfMemoryError:
        if heads != "auto" or not model.training:
            raise
        del trial
        torch.cuda.empty_cache()
        model = unfuse(model)
        model.checkpoint_activations = True
        reason = f"a training step of {num_examples(x)} examples does not fit the memory without"
        return model, Choice("checkpointed", reason)
    try:
        fused, fused_trial = fuse(model, x), fuse(trial, x)
        with torch.random.fork_rng(cuda_devices(x)):
            _compare(fused_trial, trial, x)
        separate = tuple(sorted(tune(fused_trial, x)))
        steps = {"looped": step(trial, x), "fused": step(fused_trial, x)}
        seconds = measure(steps, _TURNS, _SECONDS) if heads == "auto" else {}
    except Exception as error:  # whatever it is, looped heads have just run
        reason = str(error) if isinstance(error, FusionError) else f"Fused heads fail: {first_line(error)}"
        if heads != "auto":
            raise FusionError(reason) from error
        warnings.warn(f"The heads run looped. {reason}", stacklevel=2)
        return unfuse(model), Choice("looped", reason)
    fused.separate(separate, model.training)
    if heads != "auto":
        if heads == "compiled":
            fused.compile()
        return fused, Choice(heads, "as asked", separate=separate)
    reason = (
        f"a {'training step' if model.training else 'prediction'} of {num_examples(x)} examples took "
        f"{1000 * seconds['fused']:.1f} ms fused and {1000 * seconds['looped']:.1f} ms looped"
    )
    if seconds["looped"] < seconds["fused"]:
        return unfuse(model), Choice("looped", reason, seconds)
    return fused, Choice("fused", reason, seconds, separate)


def _compare(fused: EnsembleNet, looped: EnsembleNet, x: Tree) -> None:
    """See that fused heads give what looped ones give, in evaluation and, in training mode, in training too.

    What two runs of looped heads do not agree on is left to chance. The bound lies far above rounding.

    Raises:
        FusionError: what differs, and by how much.
    """
    for mode in (evaluating, nullcontext) if looped.training else (nullcontext,):
        runs = []
        for model in (looped, looped, fused):  # one after another, so that each draws other random numbers
            with mode(model):
                runs.append(_results(model, x))
        for name, first in runs[0].items():
            scale = first.abs().max().clamp(min=1e-6)
            again, got = (((run[name] - first).abs().max() / scale).item() for run in runs[1:])
            most = torch.finfo(first.dtype).eps ** 0.25
            if again <= most and not got <= most:  # also for NaN
                raise FusionError(f"Fused heads differ from looped ones: their {name} by {got:.2g} of the largest.")


def _results(model: EnsembleNet, x: Tree) -> dict[str, Tensor]:
    """The outputs and, of a step in training mode, all gradients in one vector; in the precision of the weights."""
    training = model.training
    device = tensors_in(x)[0].device
    with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(training):
        stacks = as_tuple(call(model, x, per_head=True))
    outputs = torch.cat([stack.flatten() for stack in stacks])
    if not training:
        return {"outputs": outputs}
    model.zero_grad(set_to_none=True)
    outputs.float().square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in trained]
    flat = [(torch.view_as_real(grad) if grad.is_complex() else grad).flatten() for grad in grads]
    return {"outputs": outputs.detach(), "gradients": torch.cat(flat)}


def current_mode(heads: HeadsMode) -> HeadsMode:
    """Translate the name of a way to run heads; stored configurations may have an old one.

    Raises:
        FusionError: there is no such way.

    Example:
        >>> current_mode("fused")
        'fused'
    """
    if heads == "recomputed":
        warnings.warn("heads='recomputed' is now heads='checkpointed'.", DeprecationWarning, stacklevel=3)
        return "checkpointed"
    if heads not in get_args(HeadsMode):
        modes = ", ".join(map(repr, get_args(HeadsMode)[:-1]))
        raise FusionError(f"heads must be one of {modes}; got {heads!r}.")
    return heads


def tune(model: FusedEnsembleNet, x: Tree, repeats: int = 5) -> set[str]:
    """Find the convolutions that run faster head by head than grouped, and switch them.

    Which is faster depends on the library, the threads and the shapes; so it is measured on the tensors that each
    convolution meets, with its backward pass if the model is in training mode.

    Args:
        model: in the mode that counts; a training step changes its statistics.
        x: inputs of the real shape, (N, *), or a tuple or a dictionary of tensors.
        repeats: of each measurement, of which the median counts.

    Returns:
        Names of the convolutions that run head by head.

    Example:
        >>> from torch import nn
        >>> model = EnsembleNet(nn.Identity(), [nn.Conv1d(8, 8, 3) for _ in range(2)]).eval()
        >>> x = torch.randn(2, 8, 16)
        >>> tune(fuse(model, x), x, repeats=1)  # the trunk's output is read once: nothing to choose
        set()
    """
    inputs: dict[FusedConvolution, tuple[Any, ...]] = {}

    def keep(layer: FusedConvolution, args: tuple[Any, ...]) -> None:
        inputs[layer] = args

    layers = model.convolutions
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    with torch.random.fork_rng(cuda_devices(x)), torch.set_grad_enabled(model.training):
        call(model, x)
    for hook in hooks:
        hook.remove()
    slower = set()
    for name, layer in layers.items():
        seconds = measure({how: _trial(layer, inputs[layer], how, model.training) for how in (False, True)}, repeats)
        if seconds[True] < seconds[False]:
            slower.add(name)
    model.separate(slower, model.training)
    return slower


def _trial(layer: FusedConvolution, args: tuple[Any, ...], separate: bool, training: bool) -> Callable[[], None]:
    tensors = [arg.detach().requires_grad_(training) for arg in args if arg is not None]

    def run() -> None:
        layer.separate[training] = separate
        with torch.set_grad_enabled(training):
            out = layer(*tensors, *(None for _ in range(len(args) - len(tensors))))
        if training:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run
