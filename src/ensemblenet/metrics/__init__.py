"""How good an ensemble and its heads are, and how much the heads differ; streaming."""

from ensemblenet.metrics.heads import HeadMetrics
from ensemblenet.metrics.tagging import TaggingMetrics

__all__ = ["HeadMetrics", "TaggingMetrics"]
