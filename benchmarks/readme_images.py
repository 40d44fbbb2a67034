"""The README's two pictures, for light and dark screens: ResNet-50 with heads, and a study's error against cost.

python benchmarks/readme_images.py
"""

import json
from pathlib import Path

import timm
import torch

from ensemblenet import convert
from ensemblenet.inputs import Inputs
from ensemblenet.reports.comparison_figures import draw_against_cost
from ensemblenet.reports.figures import BLUE, THEMES, Figure
from ensemblenet.reports.network_figures import Design, draw_design
from ensemblenet.reports.networks import design_of
from ensemblenet.storage.atomic import atomic_path

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "results" / "compare_mnist1d_residual" / "results.json"
NAMES = ("base", "2 heads", "one shorter, wider network", "two whole bases")  # of its rows, as in the table


def network() -> Design:
    """ResNet-50 as `convert` plans it."""
    x = torch.randn(2, 3, 224, 224)
    model = convert(timm.create_model("resnet50"), x, num_heads=2, budget=0.95)
    return design_of(model.eval(), Inputs.of(x), num_classes=1000)


def main() -> None:
    """Draw both."""
    design, rows = network(), json.loads(STUDY.read_text())["rows"]
    rows = [row | {"method": name} for row, name in zip(rows, NAMES, strict=True)]
    costs = {"time": "estimated time"}
    for figure in (
        Figure("network", "", lambda: draw_design(design, BLUE)),
        Figure("error-against-cost", "", lambda: draw_against_cost(rows, costs, "test error, %", lower_is_better=True)),
    ):
        for theme in THEMES:
            with atomic_path(ROOT / "docs" / "images" / f"{figure.name}-{theme}.svg") as unfinished:
                unfinished.write_bytes(figure.image(theme, "svg"))


if __name__ == "__main__":
    main()
