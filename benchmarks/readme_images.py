"""The README's two pictures, for light and dark screens: ResNet-50 with heads, and a study's error against cost.

python benchmarks/readme_images.py
"""

import json
from pathlib import Path

import timm
import torch

from ensemblenet import convert
from ensemblenet.reports.comparison_figures import draw_against_cost
from ensemblenet.reports.figures import BLUE, THEMES, Figure
from ensemblenet.reports.network_figures import Design, draw_design
from ensemblenet.reports.tables import short_number
from ensemblenet.storage.atomic import atomic_path

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "results" / "compare_mnist1d_residual" / "results.json"


def network() -> Design:
    """ResNet-50 as `convert` plans it."""
    x = torch.randn(2, 3, 224, 224)
    model = convert(timm.create_model("resnet50"), x, num_heads=2, budget=0.95)
    assert model.recipe is not None
    assert model.base_cost is not None
    costs = [cost for cost in (model.trunk_cost, model.head_cost) if cost is not None]
    trunk, head = (f"{short_number(cost.parameters)} params\n{short_number(cost.macs)} MACs" for cost in costs)
    with torch.inference_mode():
        features = tuple(model.trunk(x).shape[1:])
    return Design({"image": (3, 224, 224)}, features, (1000,), model.recipe.split_at, 2, trunk, head, "mean of\nlogits")


def main() -> None:
    """Draw both."""
    design, rows, costs = network(), json.loads(STUDY.read_text())["rows"], {"macs": "MACs", "time": "estimated time"}
    for figure in (
        Figure("network", "", lambda: draw_design(design, BLUE)),
        Figure("error-against-cost", "", lambda: draw_against_cost(rows, costs, "test error, %", lower_is_better=True)),
    ):
        for theme in THEMES:
            with atomic_path(ROOT / "docs" / "images" / f"{figure.name}-{theme}.svg") as unfinished:
                unfinished.write_bytes(figure.image(theme, "svg"))


if __name__ == "__main__":
    main()
