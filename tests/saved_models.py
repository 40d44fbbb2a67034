"""Models whose saved folders stand in `storage/saved/`, one folder for each format of recipes that there has been.

Run this file to save the models in the format of today: `python tests/saved_models.py`.

All weights and inputs are small multiples of 1/4, and every sum in these networks is exact in float32. So the outputs
are the same to the bit on every machine, whatever order it adds in.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemblenet import EnsembleNet, convert, save
from ensemblenet.conversion.convert import rebuild
from ensemblenet.inputs import call, map_tensors
from ensemblenet.models import MNIST1DNet

SAVED = Path(__file__).parent / "storage" / "saved"


class PinnedNet(nn.Module):
    """A user's own network; a head pins the sizes around its grouped, transposed convolution, a plain function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.weight = nn.Parameter(torch.randn(16, 2, 2))
        self.second = nn.Linear(16, 32)
        self.third = nn.Linear(32, 32)
        self.last = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).unsqueeze(2)  # (N, 16, 1)
        x = F.conv_transpose1d(x, self.weight, groups=8).sum(2)  # (N, 16)
        return self.last(torch.relu(self.third(torch.relu(self.second(x)))))


class MaskedNet(nn.Module):
    """A network of two inputs, which returns a dictionary; the mask is used behind the split."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.second = nn.Linear(16, 32)
        self.last = nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.second(self.embed(ids))) * mask[..., None]
        return {"hidden": h, "scores": self.last(h.sum(1))}


def _layers() -> nn.Sequential:
    """Like layers that follow each other, of which heads drop some."""
    like = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), *like, nn.Linear(16, 3))


BASES = {
    "known": (lambda: MNIST1DNet(width=8, num_classes=4), (8,)),
    "pinned": (PinnedNet, (4,)),
    "several": (MaskedNet, (6,)),  # from format 3 on
    "short": (_layers, (4,)),  # from format 4 on
    "classes": (_layers, (4,)),  # from format 5 on: with a classifier of other classes, behind a frozen trunk
}


def inputs(name: str) -> Any:
    """Five examples for a model."""
    _, shape = BASES[name]
    numbers = torch.randint(-4, 5, (5, *shape), generator=torch.Generator().manual_seed(0))
    return {"ids": numbers.abs(), "mask": (numbers > 0).float()} if name == "several" else numbers / 4


def make(name: str) -> EnsembleNet:
    """Convert a base, and round the weights; what batch normalisation divides by becomes 2."""
    torch.manual_seed(0)
    base, _ = BASES[name]
    split_at = {"known": "conv1", "several": "embed", "classes": "0"}.get(name, "input")
    output = "scores" if name == "several" else None
    options: dict[str, Any] = {"short": {"depth": 0.5}, "classes": {"num_classes": 5, "freeze": "trunk"}}.get(name, {})
    model = convert(base(), inputs(name), 2, init="inherit", split_at=split_at, output=output, **options)
    assert model.recipe is not None
    if name == "pinned":  # no version but the first two pinned this function by itself
        head = replace(model.recipe.head, pinned=("conv_transpose1d",))
        model = rebuild(base(), replace(model.recipe, head=head))
    with torch.no_grad():
        for part, tensor in model.state_dict().items():
            if part.endswith("running_var"):
                tensor.fill_(4 - 1e-5)
            elif tensor.is_floating_point():
                tensor.copy_((8 * tensor).round().clamp(-4, 4) / 4)
    return model.eval()


def main() -> None:
    """Save the models, and what they give."""
    outputs = {}
    for name in BASES:
        model = make(name)
        assert model.recipe is not None
        version = json.loads(model.recipe.to_json())["format"]
        save(model, SAVED / f"format{version}" / name)
        with torch.no_grad():
            outputs[name] = call(model, inputs(name), per_head=True).tolist()
            doubled = map_tensors(lambda x: x.double() if x.is_floating_point() else x, inputs(name))
            exact = call(model.double(), doubled, per_head=True)
        assert (exact - torch.tensor(outputs[name])).abs().max() < 1e-8 * exact.abs().max()
    (SAVED / f"format{version}" / "outputs.json").write_text(json.dumps(outputs, indent=1) + "\n")


if __name__ == "__main__":
    main()
