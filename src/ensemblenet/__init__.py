"""EnsembleNet: turn any network into a smaller and better multi-headed one.

The claim is that of Li, Ng and Natsev, "EnsembleNet: End-to-End Optimization of Multi-headed Models"
(arXiv 1905.09979); the derivations and the procedure are this project's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported when they are first used, so that the command line answers --help without loading PyTorch.
_HOMES = {
    "Budget": "surgery.budget",
    "BudgetError": "errors",
    "Capacity": "capacity",
    "CoDistillationLoss": "losses",
    "ConversionError": "errors",
    "Cost": "cost",
    "EnsembleNet": "ensemble",
    "EnsembleNetError": "errors",
    "ExportError": "errors",
    "FusionError": "errors",
    "LoadError": "errors",
    "Plan": "surgery.budget",
    "Recipe": "recipe",
    "SplitPoint": "surgery.split",
    "TrainingError": "errors",
    "convert": "conversion",
    "export": "deployment",
    "fuse": "heads",
    "load": "checkpoint",
    "measure_cost": "cost",
    "plans": "conversion",
    "predict_anytime": "anytime",
    "push_to_hub": "sharing",
    "register_timm": "timm_models",
    "save": "checkpoint",
    "spare_capacity": "capacity",
    "split_points": "conversion",
    "unfuse": "heads",
}

__all__ = [
    "Budget",
    "BudgetError",
    "Capacity",
    "CoDistillationLoss",
    "ConversionError",
    "Cost",
    "EnsembleNet",
    "EnsembleNetError",
    "ExportError",
    "FusionError",
    "LoadError",
    "Plan",
    "Recipe",
    "SplitPoint",
    "TrainingError",
    "convert",
    "export",
    "functional",
    "fuse",
    "load",
    "measure_cost",
    "plans",
    "predict_anytime",
    "push_to_hub",
    "register_timm",
    "save",
    "spare_capacity",
    "split_points",
    "unfuse",
]

if TYPE_CHECKING:
    from ensemblenet import functional
    from ensemblenet.anytime import predict_anytime
    from ensemblenet.capacity import Capacity, spare_capacity
    from ensemblenet.checkpoint import load, save
    from ensemblenet.conversion import convert, plans, split_points
    from ensemblenet.cost import Cost, measure_cost
    from ensemblenet.deployment import export
    from ensemblenet.ensemble import EnsembleNet
    from ensemblenet.errors import (
        BudgetError,
        ConversionError,
        EnsembleNetError,
        ExportError,
        FusionError,
        LoadError,
        TrainingError,
    )
    from ensemblenet.heads import fuse, unfuse
    from ensemblenet.losses import CoDistillationLoss
    from ensemblenet.recipe import Recipe
    from ensemblenet.sharing import push_to_hub
    from ensemblenet.surgery.budget import Budget, Plan
    from ensemblenet.surgery.split import SplitPoint
    from ensemblenet.timm_models import register_timm


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ensemblenet.functional")
    if name not in _HOMES:
        raise AttributeError(f"module 'ensemblenet' has no attribute {name!r}")
    value = getattr(import_module(f"ensemblenet.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
