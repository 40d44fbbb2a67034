"""Names of version 0.1 that are others now: the old ones work still, with a warning that names the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install", "renamed"]

# A module that is several now gives the names of all of them.
MOVED: dict[str, str | tuple[str, ...]] = {
    "ensemblenet.anytime": "ensemblenet.heads.anytime",
    "ensemblenet.capacity": "ensemblenet.conversion.capacity",
    "ensemblenet.checkpoint": "ensemblenet.storage.checkpoint",
    "ensemblenet.commands": ("ensemblenet.cli.benchmark", "ensemblenet.cli.convert", "ensemblenet.cli.info"),
    "ensemblenet.data.batches": "ensemblenet.data.tensors",
    "ensemblenet.data.folders": "ensemblenet.data.images",
    "ensemblenet.deployment": "ensemblenet.deploy.export",
    "ensemblenet.heads.rules": "ensemblenet.operations",
    "ensemblenet.hub": "ensemblenet.storage.hub",
    "ensemblenet.models.named": "ensemblenet.models.sources",
    "ensemblenet.sharing": "ensemblenet.deploy.model_card",
    "ensemblenet.losses.codistillation": "ensemblenet.losses",
    "ensemblenet.losses.peers": (
        "ensemblenet.metrics.diversity",
        "ensemblenet.study.methods.losses",
        "ensemblenet.study.methods.one",
        "ensemblenet.study.methods.dml",
        "ensemblenet.study.methods.okddip",
        "ensemblenet.study.methods.kdcl",
        "ensemblenet.study.methods.co_training",
    ),
    "ensemblenet.study.cells": "ensemblenet.study.trials",
    "ensemblenet.study.demo": "ensemblenet.cli.demo",
    "ensemblenet.study.findings": "ensemblenet.evaluation.findings",
    "ensemblenet.study.pages": "ensemblenet.reports.comparison",
    "ensemblenet.study.report": (
        "ensemblenet.reports.tables",
        "ensemblenet.reports.figures",
        "ensemblenet.reports.comparison_figures",
        "ensemblenet.reports.page",
    ),
    "ensemblenet.study.run_figures": "ensemblenet.reports.network_figures",
    "ensemblenet.study.run_report": "ensemblenet.reports.networks",
    "ensemblenet.study.thumbnails": "ensemblenet.reports.thumbnails",
    "ensemblenet.surgery": "ensemblenet.conversion",
    "ensemblenet.surgery.axes": "ensemblenet.operations.axes",
    "ensemblenet.surgery.budget": "ensemblenet.conversion.planning",
    "ensemblenet.surgery.initialise": "ensemblenet.conversion.initialise",
    "ensemblenet.surgery.layers": "ensemblenet.operations.deprecated",
    "ensemblenet.surgery.narrow": "ensemblenet.conversion.build",
    "ensemblenet.surgery.rules": "ensemblenet.conversion.equations",
    "ensemblenet.surgery.split": "ensemblenet.conversion.split",
    "ensemblenet.surgery.translate": "ensemblenet.operations",
    "ensemblenet.surgery.trace": "ensemblenet.conversion.trace",
    "ensemblenet.tagging_metrics": "ensemblenet.metrics.tagging",
    "ensemblenet.timm_models": "ensemblenet.deploy.timm_names",
    "ensemblenet.training.averaging": "ensemblenet.training.callbacks",
    "ensemblenet.training.cli": "ensemblenet.training.fit",
    "ensemblenet.training.evaluate": "ensemblenet.evaluation.scoring",
    "ensemblenet.training.export": "ensemblenet.cli.export",
    "ensemblenet.evaluation.files": "ensemblenet.data.files",
    "ensemblenet.training.files": "ensemblenet.data.files",
    "ensemblenet.training.predict": "ensemblenet.evaluation.predictions",
    "ensemblenet.training.progress": "ensemblenet.training.callbacks",
    "ensemblenet.training.restore": "ensemblenet.storage.restore",
    "ensemblenet.training.run": "ensemblenet.storage.runs",
    "ensemblenet.training.submission": "ensemblenet.evaluation.submission",
}


class _Finder:
    """Finds and loads old names; the base classes in `importlib.abc` would double the time of `import ensemblenet`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=True)  # pyright: ignore[reportArgumentType]  it has what counts

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MOVED[old]
        if isinstance(new, str):
            warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=2)
            sys.modules[old] = import_module(new)  # the import system takes what stands there
            return
        warnings.warn(f"{old} is now {', '.join(new)}.", DeprecationWarning, stacklevel=2)
        for part in map(import_module, new):
            vars(module).update({name: getattr(part, name) for name in part.__all__})


def install() -> None:
    """Let the import system find the old names."""
    # in front: an old folder's name leads to a new folder, in which another finder would load files a second time
    sys.meta_path.insert(0, _Finder())


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module some of whose names were renamed.

    Args:
        module: its name.
        names: the new name of each old one: of the module itself, or `module.name` of another one.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {home or module}.{new}.", DeprecationWarning, stacklevel=2)
        return getattr(import_module(home or module), new)

    return find
