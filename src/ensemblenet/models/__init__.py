"""Networks that timm lacks, as ordinary modules."""

from ensemblenet.models.mnist1d import MNIST1DNet
from ensemblenet.models.resnet import CifarResNet

__all__ = ["CifarResNet", "MNIST1DNet"]
