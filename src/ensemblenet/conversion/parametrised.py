"""Weights that are computed from others: by spectral normalisation, which narrows, and by pruning, which does not."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from ensemblenet.errors import ConversionError

__all__ = ["refuse_pruned", "refuse_quantised", "restart_power_iterations", "singular_vectors"]

_ITERATIONS = 15  # as PyTorch begins with


def singular_vectors(layer: nn.Module) -> Iterator[Tensor]:
    """The buffers of spectral normalisation, of either kind, in a layer and below it; narrow with their weights."""
    for module in layer.modules():
        if isinstance(module, _SpectralNorm) and hasattr(module, "_u"):
            yield from (module._u, module._v)
        for hook in _spectral_hooks(module):
            yield from (getattr(module, f"{hook.name}_u"), getattr(module, f"{hook.name}_v"))


def restart_power_iterations(part: nn.Module) -> None:
    """Find the singular vectors of new weights, as PyTorch does where it begins to normalise them."""
    for layer in part.modules():
        for hook in _spectral_hooks(layer):
            for _ in range(_ITERATIONS):
                hook.compute_weight(layer, do_power_iteration=True)
        norm = layer[0] if isinstance(layer, ParametrizationList) else None
        if isinstance(norm, _SpectralNorm) and hasattr(norm, "_u"):
            norm._power_method(norm._reshape_weight_to_matrix(layer.original), _ITERATIONS)  # type: ignore[operator]


def _spectral_hooks(layer: nn.Module) -> list[SpectralNormHook]:
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, SpectralNormHook)]


def refuse_pruned(base: nn.Module) -> None:
    """Refuse a network with masks on its weights: new weights of another size have no use for them.

    Raises:
        ConversionError: a layer is pruned.
    """
    for name, layer in base.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                raise ConversionError(
                    f"{hook._tensor_name} of {name or 'the base'} ({type(layer).__name__}) is pruned, and a mask does "
                    f"not fit narrower layers: make it part of the weight by torch.nn.utils.prune.remove(layer, "
                    f"{hook._tensor_name!r}) first."
                )


def refuse_quantised(base: nn.Module) -> None:
    """Refuse a network whose weights PyTorch has packed as integers: nothing can be read or trained of them.

    Raises:
        ConversionError: a layer is quantised.
    """
    for name, layer in base.named_modules():
        if type(layer).__module__.startswith("torch.ao.nn.") and "quantized" in type(layer).__module__:
            raise ConversionError(
                f"{name or 'the base'} ({type(layer).__name__}) is quantised, and its weights can be neither narrowed "
                "nor trained: convert the network that it was made from, and quantise what comes of it."
            )
