"""What a run that begins with trained weights says before it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemblenet import EnsembleNet
from ensemblenet.metrics import HeadMetrics
from ensemblenet.training.inheriting import calibration_batches, scores_in_words

CLASSES = 4


class Shifted(nn.Module):
    """Says the class behind the right one by so many places."""

    def __init__(self, places: int, certainty: float) -> None:
        super().__init__()
        self.places, self.certainty = places, certainty
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.certainty * nn.functional.one_hot((x + self.places) % CLASSES, CLASSES).float() + 0 * self.unused


def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, per_head=True) if isinstance(network, EnsembleNet) else network(x).unsqueeze(0)


def test_base_each_head_and_their_mean_have_scores_of_their_own() -> None:
    labels = torch.arange(20) % CLASSES
    half = labels.clone()
    half[::2] = (half[::2] + 1) % CLASSES  # what a head that is never wrong says half of the time of other labels
    loader = [(labels, half)] * 3
    model = EnsembleNet(nn.Identity(), [Shifted(0, 2.0), Shifted(1, 1.0), Shifted(2, 1.0)])
    said = scores_in_words(
        {"base": Shifted(1, 1.0), "heads": model},
        loader,
        _outputs,
        lambda heads: HeadMetrics(CLASSES, heads),
        "accuracy",
    )
    assert said == (
        "Before training, accuracy in % on 60 validation examples: base 50.00, head 0 50.00, head 1 50.00, "
        "head 2 0.00, mean of the heads 50.00."
    )
    right = scores_in_words(
        {"heads": model}, [(labels, labels)], _outputs, lambda heads: HeadMetrics(CLASSES, heads), "accuracy"
    )
    assert right is not None
    assert right.endswith("head 0 100.00, head 1 0.00, head 2 0.00, mean of the heads 100.00.")


def test_a_few_batches_are_enough() -> None:
    batches = [(torch.zeros(100, 2), torch.zeros(100)) for _ in range(20)]
    assert len(calibration_batches(batches)) == 8
    assert len(calibration_batches([(torch.zeros(600, 2), torch.zeros(600)) for _ in range(20)])) == 2
    none = scores_in_words({"base": nn.Identity()}, None, _outputs, lambda heads: HeadMetrics(4, heads), "accuracy")
    assert none is None
