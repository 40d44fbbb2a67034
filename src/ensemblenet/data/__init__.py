"""Data modules; each yields batches of inputs and targets."""

from ensemblenet.data.images import ImageData
from ensemblenet.data.kinetics import Kinetics
from ensemblenet.data.mnist1d import MNIST1D
from ensemblenet.data.parquet_images import ParquetImages
from ensemblenet.data.youtube8m import YouTube8M

__all__ = ["MNIST1D", "ImageData", "Kinetics", "ParquetImages", "YouTube8M"]
