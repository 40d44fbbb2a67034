"""CUDA graphs of predictions: what is refused. tests/test_cuda.py has the rest."""

import pytest
import torch
from torch import nn

from ensemblenet import EnsembleNet
from ensemblenet.errors import FusionError
from ensemblenet.heads import capture


def test_what_cannot_be_captured_is_refused() -> None:
    model = EnsembleNet(nn.Identity(), [nn.Linear(4, 2) for _ in range(2)])
    with pytest.raises(FusionError, match=r"capture\(\) needs .* got training mode"):
        capture(model.train(), torch.zeros(3, 4))
    with pytest.raises(FusionError, match="got inputs on cpu"):
        capture(model.eval(), torch.zeros(3, 4))
