import pytest
import torch

from ensemblenet import convert, measure_cost
from ensemblenet.models import S3D
from ensemblenet.models.sources import create
from ensemblenet.testing import check_conversion

CLIPS = torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("gating", "parameters"),
    [
        (False, 8_320_048),  # of torchvision's weights
        (True, 9_545_056),
    ],
)
def test_costs_what_is_published(gating: bool, parameters: int) -> None:
    with torch.device("meta"):
        cost = measure_cost(S3D(gating=gating), torch.zeros(1, 3, 16, 224, 224))
    assert cost.parameters == parameters
    assert cost.macs / 1e9 == pytest.approx(17.979, abs=2e-3)  # torchvision's `_ops`; gates cost next to nothing


def test_gates_stand_where_the_authors_code_has_them() -> None:
    branches = [  # the outputs of s3dg.py's blocks Mixed_3b to Mixed_5c, and before them of Conv2d_2c_3x3
        (64, 128, 32, 32),
        (128, 192, 96, 64),
        (192, 208, 48, 64),
        (160, 224, 64, 64),
        (128, 256, 64, 64),
        (112, 288, 64, 64),
        (256, 320, 128, 128),
        (256, 320, 128, 128),
        (384, 384, 128, 128),
    ]
    gates = sum(c * c + c for c in [192, *(c for block in branches for c in block)])
    plain, gated = (sum(p.numel() for p in S3D(gating=gating).parameters()) for gating in (False, True))
    assert gated - plain == gates


def test_computes_what_torchvisions_does() -> None:
    theirs = create("torchvision:s3d", num_classes=5).eval()
    ours = S3D(num_classes=5).eval()
    values = [
        torch.rand_like(v) if v.ndim == 1 else v for v in theirs.state_dict().values()
    ]  # norms are not identities
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    ours.load_state_dict(
        {name: value.reshape(shape) for (name, shape), value in zip(shapes.items(), values, strict=True)}
    )
    x = torch.randn(1, 3, 16, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_gate_weighs_channels_by_their_means() -> None:
    gate = S3D(num_classes=2, gating=True, width=0.1).stem[4]
    x = torch.randn(2, 19, 3, 4, 5)
    weights = torch.sigmoid(torch.nn.functional.linear(x.flatten(2).mean(2), gate.weigh.weight, gate.weigh.bias))  # pyright: ignore
    expected = torch.stack([torch.stack([x[n, c] * weights[n, c] for c in range(19)]) for n in range(2)])
    torch.testing.assert_close(gate(x), expected)


@pytest.mark.parametrize("shape", [(4, 16, 16), (7, 33, 50), (16, 56, 56)])
def test_takes_clips_of_any_size(shape: tuple[int, ...]) -> None:
    assert S3D(num_classes=3, width=0.1).eval()(torch.zeros(1, 3, *shape)).shape == (1, 3)


def test_width_must_be_above_0() -> None:
    with pytest.raises(ValueError, match=r"width must be above 0, got 0\."):
        S3D(width=0)


@pytest.mark.parametrize("gating", [False, True])
def test_converts(gating: bool) -> None:
    base = S3D(num_classes=5, gating=gating, width=0.125)
    report = check_conversion(base, CLIPS, num_heads=2)
    assert report.width < 1


def test_a_conversion_is_rebuilt_without_its_base() -> None:
    model = convert(S3D(num_classes=5, gating=True, width=0.125), CLIPS, num_heads=2)
    assert model.recipe is not None
    assert model.recipe.base is not None
    assert model.recipe.base.name == "S3D"


def test_a_network_of_torchvision_converts() -> None:
    # the others: benchmarks/kinetics_models.py
    check_conversion(create("torchvision:r2plus1d_18", num_classes=5), CLIPS[:, :, :4, :16, :16])
