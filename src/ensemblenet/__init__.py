"""EnsembleNet: turn any network into a smaller and better multi-headed one.

The claim is that of Li, Ng and Natsev, "EnsembleNet: End-to-End Optimization of Multi-headed Models"
(arXiv 1905.09979); the derivations and the procedure are this project's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ensemblenet import _moved

__version__ = "0.1.0"

_moved.install()

# Names are imported when they are first used, so that the command line answers --help without loading PyTorch.
_HOMES = {
    "Budget": "cost",
    "BudgetError": "errors",
    "Capacity": "conversion.capacity",
    "CoDistillationLoss": "losses",
    "ConversionError": "errors",
    "Cost": "cost",
    "EnsembleNet": "ensemble",
    "EnsembleNetError": "errors",
    "ExportError": "errors",
    "FusionError": "errors",
    "InputError": "errors",
    "LoadError": "errors",
    "Plan": "conversion.planning",
    "Recipe": "recipe",
    "SplitPoint": "conversion.split",
    "TrainingError": "errors",
    "convert": "conversion.convert",
    "export": "deploy.export",
    "fuse": "heads",
    "load": "storage.checkpoint",
    "measure_cost": "cost",
    "plans": "conversion.convert",
    "predict_anytime": "heads.anytime",
    "push_to_hub": "deploy.model_card",
    "register_timm": "deploy.timm_names",
    "save": "storage.checkpoint",
    "spare_capacity": "conversion.capacity",
    "split_points": "conversion.convert",
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
    "InputError",
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
    from ensemblenet.conversion.capacity import Capacity, spare_capacity
    from ensemblenet.conversion.convert import convert, plans, split_points
    from ensemblenet.conversion.planning import Plan
    from ensemblenet.conversion.split import SplitPoint
    from ensemblenet.cost import Budget, Cost, measure_cost
    from ensemblenet.deploy.export import export
    from ensemblenet.deploy.model_card import push_to_hub
    from ensemblenet.deploy.timm_names import register_timm
    from ensemblenet.ensemble import EnsembleNet
    from ensemblenet.errors import (
        BudgetError,
        ConversionError,
        EnsembleNetError,
        ExportError,
        FusionError,
        InputError,
        LoadError,
        TrainingError,
    )
    from ensemblenet.heads import fuse, unfuse
    from ensemblenet.heads.anytime import predict_anytime
    from ensemblenet.losses import CoDistillationLoss
    from ensemblenet.recipe import Recipe
    from ensemblenet.storage.checkpoint import load, save


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("ensemblenet.functional")
    if name not in _HOMES:
        raise AttributeError(f"module 'ensemblenet' has no attribute {name!r}")
    value = getattr(import_module(f"ensemblenet.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
