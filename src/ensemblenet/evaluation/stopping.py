"""What it saves to stop after as many heads as an example needs, at the whole model's accuracy.

Shapes: K heads, N examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ensemblenet.evaluation.findings import Best, Findings, agreeing, stopping

__all__ = ["savings", "settling"]

_THRESHOLDS = 20
_TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2)


def settling(firsts: Best, window: int, tolerance: float) -> Tensor:
    """Where the confidence of the first heads has settled, as [`settled`][ensemblenet.heads.anytime.settled] does.

    Args:
        firsts: of the first 1, 2, ... K heads together.
        window: over how many heads.
        tolerance: by how much it may have changed.

    Returns:
        (K, N), bool.

    Example:
        >>> firsts = Best(torch.tensor([[1], [1], [1]]), torch.tensor([[0.5], [0.9], [0.92]]), torch.ones(3, 1).bool())
        >>> settling(firsts, 1, 0.05).flatten().tolist()
        [False, False, True]
    """
    stops = torch.zeros_like(firsts.hits)
    for k in range(window, len(stops)):
        confidence, classes = firsts.confidence[k - window : k + 1], firsts.classes[k - window : k + 1]
        stops[k] = (confidence.amax(0) - confidence.amin(0) <= tolerance) & (classes == classes[-1]).all(0)
    return stops


def savings(findings: Findings, macs: Mapping[int, float]) -> list[dict[str, Any]]:
    """What each stop rule saves at no loss of accuracy.

    Its setting is the cheapest that loses nothing on one half of the examples, and is scored on the other half; then
    the other way round. So a setting is never scored on examples that chose it.

    Args:
        findings: what the heads say of examples of one true class.
        macs: of the trunk with 1 and with K heads, by their number.

    Returns:
        A row for the whole model and for each rule: `rule`, `heads` and `macs`, means over examples, `saved`, a share
        of the whole model's MACs, and `accuracy`.

    Example:
        >>> findings = Findings()
        >>> findings.update(None, torch.tensor([9.0, 0.0]).expand(3, 20, 2), torch.zeros(20, dtype=torch.int64))
        >>> [(row["rule"], round(row["saved"], 2)) for row in savings(findings, {1: 10.0, 3: 22.0})]
        [('never', 0.0), ('confidence', 0.55), ('agreement', 0.27), ('window', 0.27)]
    """
    firsts = findings.firsts
    several, number = firsts.hits.shape
    halves = [torch.arange(number) % 2 == side for side in (0, 1)]
    never = torch.zeros_like(firsts.hits)
    rules = {"never": [never]}
    for name, stops in _candidates(findings):
        rules.setdefault(name, [never]).append(stops)
    head = (macs[several] - macs[1]) / (several - 1)
    rows = []
    for rule, candidates in rules.items():
        used = right = 0.0
        for half, other in (halves, halves[::-1]):
            whole = firsts.hits[-1, other].double().mean().item()
            tried = [(*stopping(stops[:, other], firsts.hits[:, other]), stops) for stops in candidates]
            _, best = min(((heads, stops) for heads, hits, stops in tried if hits >= whole), key=lambda pair: pair[0])
            heads, hits = stopping(best[:, half], firsts.hits[:, half])
            used, right = used + heads * half.sum().item() / number, right + hits * half.sum().item() / number
        cost = macs[1] + (used - 1) * head
        rows.append({"rule": rule, "heads": used, "macs": cost, "saved": 1 - cost / macs[several], "accuracy": right})
    return rows


def _candidates(findings: Findings) -> Iterator[tuple[str, Tensor]]:
    """Each rule with several settings: where it stops, (K, N)."""
    firsts, several = findings.firsts, len(findings.firsts.hits)
    levels = firsts.confidence[:-1].flatten().quantile(torch.linspace(0, 1, _THRESHOLDS))
    yield from (("confidence", firsts.confidence >= level) for level in levels)
    yield from (("agreement", agreeing(findings.heads.classes, number)) for number in range(2, several))
    for window in range(1, several - 1):
        yield from (("window", settling(firsts, window, tolerance)) for tolerance in _TOLERANCES)
