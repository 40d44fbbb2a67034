"""What a study measures of predictions, streaming over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensemblenet.functional import Task, codistillation
from ensemblenet.metrics import HeadMetrics
from ensemblenet.study.methods.losses import log_probabilities

__all__ = ["Measures", "kl_between_heads"]


class Measures:
    """Errors of a prediction and of the heads behind it, diversity and calibration.

    The prediction need not be the mean of the heads: a method may weigh them. `compute()` gives plain data:

    | key | meaning |
    |---|---|
    | `error`, `head_errors` | of the prediction and of each head, in percent; for multilabel 100 (1 - GAP@20) |
    | `nll`, `head_nll` | negative log-likelihood in nats, of the prediction and of a head, mean over heads |
    | `ece` | expected calibration error of the prediction, 15 bins; multiclass only |
    | `disagreement` | share of pairs of heads whose most likely classes differ |
    | `agreement` | mean divergence of heads from their mean, see [`ensemblenet.functional.divergence`][] |
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
        kind = HeadMetrics if task == "multiclass" else _tagging_metrics()
        self.together, self.heads = kind(num_classes, 1), kind(num_classes, num_heads)
        self.examples = 0
        self.head_nll = self.disagreements = self.head_kl = 0.0

    def update(self, head_outputs: Tensor, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: logits (K, N, C) and (N, C), and the targets that the loss takes."""
        z, prediction, target = head_outputs.detach().float().cpu(), prediction.detach().float().cpu(), target.cpu()
        self.together.update(prediction.unsqueeze(0), target)
        self.heads.update(z, target)
        self.examples += len(target)
        self.head_nll += codistillation(z, target, 1.0, self.task, reduction="sum").item()
        self.head_kl += kl_between_heads(z, self.task).item() * len(target)
        votes = z.argmax(2)
        pairs = max(1, self.num_heads * (self.num_heads - 1))
        self.disagreements += (votes[:, None] != votes).sum().item() / pairs

    def compute(self) -> dict[str, Any]:
        """All values over all batches; see the class."""
        together, heads = self.together.compute(), self.heads.compute()
        right = "accuracy" if self.task == "multiclass" else "gap"
        values = {
            "error": _error(together[right]),
            "head_errors": [_error(heads[f"head_{right}_{k}"]) for k in range(self.num_heads)],
            "nll": together["nll"].item(),
            "head_nll": self.head_nll / self.examples,
            "disagreement": self.disagreements / self.examples,
            "agreement": heads["agreement"].item(),
            "head_kl": self.head_kl / self.examples,
        }
        return values | ({"ece": together["ece"].item()} if "ece" in together else {})


def kl_between_heads(head_outputs: Tensor, task: Task = "multiclass") -> Tensor:
    """The mean of KL(p_j || p_k) over examples and pairs of heads j != k, in nats; 0 for a single head.

    Args:
        head_outputs: logits, shape (K, N, C).
        task: "multiclass" or "multilabel", where it is summed over labels.

    Example:
        >>> kl_between_heads(torch.zeros(3, 2, 4)).item()
        0.0
    """
    log_p = log_probabilities(head_outputs, task)
    cross = torch.einsum("jnc,knc->jk", log_p.exp(), log_p)
    pairs = max(1, len(log_p) * (len(log_p) - 1))
    return (cross.diagonal()[:, None] - cross).sum() / (pairs * log_p.shape[1])


def _error(right: Tensor) -> float:
    return 100 * (1 - right.item())


def _tagging_metrics() -> type[Any]:
    from ensemblenet.metrics.tagging import TaggingMetrics

    return TaggingMetrics
