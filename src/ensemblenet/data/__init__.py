"""Data modules; each yields batches of inputs and class indices."""

from ensemblenet.data.images import ParquetImages
from ensemblenet.data.mnist1d import MNIST1D

__all__ = ["MNIST1D", "ParquetImages"]
