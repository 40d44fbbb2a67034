"""A run that begins with trained weights: heads are chosen and repaired by its own data, and judged before it trains.

Shapes: K heads, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ensemblenet.ensemble import EnsembleNet
from ensemblenet.inputs import first_batches, inputs_and_targets, num_examples

__all__ = ["calibration_batches", "scores_in_words"]

_MOST_BATCHES, _ENOUGH = 8, 1000  # examples


def calibration_batches(loader: Iterable[Any]) -> list[Any]:
    """A few batches of a loader: enough for statistics, and few enough for memory."""
    return list(islice(first_batches(loader, _ENOUGH), _MOST_BATCHES))


def scores_in_words(
    networks: Mapping[str, nn.Module],
    loader: Iterable[Any] | None,
    outputs_of: Any,
    make_metric: Any,
    score: str,
) -> str | None:
    """What networks, each head of them and their mean reach on the first examples of a loader.

    Args:
        networks: by name, each a base or an `EnsembleNet`; they are left in evaluation mode.
        loader: of validation data.
        outputs_of: from a network and inputs to head outputs, (K, N, C).
        make_metric: from K to a metric of head outputs and targets.
        score: which of the metric's values is told.

    Returns:
        One line; None where there are no examples.
    """
    metrics: dict[str, Any] = {}
    count = 0
    for batch in first_batches(() if loader is None else loader, _ENOUGH):
        x, y = inputs_and_targets(batch)
        count += num_examples(x)
        for name, network in networks.items():
            with torch.no_grad():
                outputs: Tensor = outputs_of(network.eval(), x)
            parts = {name: outputs}
            if isinstance(network, EnsembleNet):
                parts = {f"head {k}": outputs[k : k + 1] for k in range(len(outputs))} | {"mean of the heads": outputs}
            for part, own in parts.items():
                if part not in metrics:
                    metrics[part] = make_metric(len(own)).to(own.device)
                metrics[part].update(own, y.to(own.device))
    values = [f"{part} {100 * float(metric.compute()[score]):.2f}" for part, metric in metrics.items()]
    return f"Before training, {score} in % on {count:,} validation examples: {', '.join(values)}." if values else None
