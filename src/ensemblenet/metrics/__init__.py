"""How good an ensemble and its heads are, and how much the heads differ; streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ensemblenet.extras import require

__all__ = ["HeadMetrics", "TaggingMetrics"]

if TYPE_CHECKING:
    from ensemblenet.metrics.heads import HeadMetrics
    from ensemblenet.metrics.tagging import TaggingMetrics


def __getattr__(name: str) -> Any:
    # torchmetrics is slow to import, and the table of scores does not need it
    if name in __all__:
        require("train")
    if name == "HeadMetrics":
        from ensemblenet.metrics.heads import HeadMetrics

        return HeadMetrics
    if name == "TaggingMetrics":
        from ensemblenet.metrics.tagging import TaggingMetrics

        return TaggingMetrics
    raise AttributeError(f"module 'ensemblenet.metrics' has no attribute {name!r}")
