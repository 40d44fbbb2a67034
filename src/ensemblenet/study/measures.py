"""The scores of a trial's predictions, and how much its heads differ; streaming over batches."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ensemblenet.functional import Task, codistillation
from ensemblenet.metrics.diversity import disagreement, divergence_from_ensemble, kl_between_heads, same_class
from ensemblenet.metrics.heads import HeadMetrics
from ensemblenet.metrics.scores import SCORES, TASKS
from ensemblenet.metrics.tagging import TaggingMetrics

__all__ = ["Measures"]


class Measures:
    """Errors of a prediction and of the heads behind it, diversity and calibration.

    The prediction need not be the mean of the heads: a method may weigh them. `compute()` gives plain data:

    | key | meaning |
    |---|---|
    | `error`, `head_errors` | of the prediction and of each head, in percent; for multilabel 100 (1 - GAP@20) |
    | `nll`, `ece`, ... | the other scores of the prediction that [`ensemblenet.metrics.scores`][] names |
    | `head_nll` | negative log-likelihood of a head, mean over heads |
    | `disagreement` | share of pairs of heads whose most likely classes differ |
    | `pairs` | how often two heads have the same most likely class, in percent, K lists of K |
    | `divergence` | mean KL divergence of the heads from the mean of their logits, in nats |
    | `head_kl` | mean KL(p_j || p_k) over pairs of heads j != k, in nats; 0 for one head |

    Args:
        num_classes: C.
        num_heads: K.
        task: "multiclass" or "multilabel".

    Example:
        >>> measures = Measures(num_classes=3, num_heads=2)
        >>> z = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [[4.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> measures.update(z, z.mean(0), torch.tensor([0, 1]))
        >>> values = measures.compute()
        >>> values["error"], values["head_errors"], values["disagreement"]
        (0.0, [0.0, 50.0], 0.5)
    """

    def __init__(self, num_classes: int, num_heads: int, task: Task = "multiclass") -> None:
        self.task: Task = task
        self.num_heads = num_heads
        kind = HeadMetrics if task == "multiclass" else TaggingMetrics
        self.together, self.heads = kind(num_classes, 1), kind(num_classes, num_heads)
        self.examples = 0
        self.sums: dict[str, float] = defaultdict(float)
        self.pairs = torch.zeros(num_heads, num_heads)

    def update(self, head_outputs: Tensor, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (K, N, C) and (N, C), and the targets that the loss takes."""
        z, prediction, target = head_outputs.detach().float().cpu(), prediction.detach().float().cpu(), target.cpu()
        self.together.update(prediction.unsqueeze(0), target)
        self.heads.update(z, target)
        self.examples += len(target)
        votes = z.argmax(2)
        self.pairs += same_class(votes) * len(target)
        for name, value in (
            ("head_nll", codistillation(z, target, 1.0, self.task)),
            ("disagreement", disagreement(votes).mean()),
            ("divergence", divergence_from_ensemble(z, self.task).mean()),
            ("head_kl", kl_between_heads(z, self.task)),
        ):
            self.sums[name] += value.item() * len(target)

    def compute(self) -> dict[str, Any]:
        """All values over all batches; see the class."""
        together, heads = self.together.compute(), self.heads.compute()
        main = TASKS[self.task].main
        others = [name for name, score in SCORES.items() if name in together and name != main and not score.of_several]
        return {
            "error": _error(together[main]),
            "head_errors": [_error(heads[f"head_{main}_{k}"]) for k in range(self.num_heads)],
            **{name: together[name].item() for name in others if not name.startswith("head_")},
            **{name: total / self.examples for name, total in self.sums.items()},
            "pairs": (100 * self.pairs / self.examples).tolist(),
        }


def _error(right: Tensor) -> float:
    return 100 * (1 - right.item())
