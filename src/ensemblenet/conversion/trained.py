"""Whether a network has been trained, by what its weights look like."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["looks_trained"]

# In deviations of a sum of squares that chance gives: rows of independent entries stay far below.
_CHANCE = 8.0
_FEWEST = 8  # rows, and entries of a row, of which a statistic says anything


def looks_trained(network: nn.Module) -> bool:
    """Whether a network's weights are other than initialisation makes them; batches seen alone do not count.

    Initialisation gives the channels of a normalisation equal scales and shifts, which a single step makes unequal: so
    half of the normalisations decide, where there are any. In other networks half of the matrices do: of entries drawn
    one by one, no rows or columns have more energy, or another mean, than chance allows.

    Example:
        >>> import torch
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 3))
        >>> looks_trained(base)
        False
        >>> base(torch.randn(4, 8)).square().sum().backward()
        >>> torch.optim.SGD(base.parameters(), 0.01).step()
        >>> looks_trained(base)
        True
    """
    vectors = [found for layer in network.modules() if (found := _scales(layer))]
    if vectors:
        return _half([all(len(own.unique()) > 1 for own in found) for found in vectors])
    embeddings = {id(layer.weight) for layer in network.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))}
    matrices = [own.detach().flatten(1) for own in network.parameters() if own.ndim > 1 and id(own) not in embeddings]
    matrices = [own for own in matrices if min(own.shape) >= _FEWEST and own.is_floating_point()]
    return _half([_is_uneven(own) or _is_uneven(own.T) for own in matrices])


def _half(votes: list[bool]) -> bool:
    return any(votes) and 2 * sum(votes) >= len(votes)


def _scales(layer: nn.Module) -> list[Tensor]:
    """The parameters of a layer that has nothing but vectors of one length: a normalisation, or a scale by hand."""
    own = [parameter.detach() for parameter in layer.parameters(recurse=False)]
    is_scale = "weight" in layer._parameters and all(part.ndim == 1 and len(part) > 1 for part in own)
    return own if is_scale else []


def _is_uneven(rows: Tensor) -> bool:
    """Whether rows differ in mean or energy by more than independent entries of one distribution would."""
    values = rows.double()
    values = values - values.mean()
    for entries in (values, values.square()):
        spread = entries.var()
        if spread > 0:
            away = (entries.mean(1) - entries.mean()).square().mean() * entries.shape[1] / spread  # about 1
            if (away - 1) * (len(rows) / 2) ** 0.5 > _CHANCE:
                return True
    return False
