"""Networks by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ensemblenet.models import CifarResNet, MNIST1DNet
from ensemblenet.models.sources import ModelNameError, create, default_input_shape


def test_create_knows_timm_torchvision_and_callables() -> None:
    assert create("test_resnet", num_classes=7)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert isinstance(create("ensemblenet.models:CifarResNet"), CifarResNet)
    torchvision = pytest.importorskip("torchvision")
    assert isinstance(create("torchvision:squeezenet1_1"), torchvision.models.SqueezeNet)


def test_default_input_shapes() -> None:
    assert default_input_shape(create("test_resnet")) == (3, 160, 160)
    assert default_input_shape(MNIST1DNet()) == (40,)
    assert default_input_shape(nn.ReLU()) is None


@pytest.mark.parametrize(("name", "size"), [("r3d_18", 112), ("s3d", 224), ("swin3d_t", 224)])
def test_video_networks_know_their_inputs(name: str, size: int) -> None:
    assert default_input_shape(create(f"torchvision:{name}")) == (3, 16, size, size)


@pytest.mark.parametrize(("name", "near"), [("resnet18x", "resnet18"), ("torchvision:mvit_v2", "mvit_v2_s")])
def test_an_unknown_name_suggests_near_ones(name: str, near: str) -> None:
    with pytest.raises(ModelNameError, match=rf"Did you mean .*{near}"):
        create(name)
