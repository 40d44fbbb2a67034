"""Networks that timm lacks, as ordinary modules."""

from ensemblenet.models.mnist1d import MNIST1DNet, MNIST1DResNet
from ensemblenet.models.resnet import CifarResNet
from ensemblenet.models.s3d import S3D
from ensemblenet.models.sources import create
from ensemblenet.models.youtube8m import (
    DeepBagOfFrames,
    GatedNetVLAD,
    GRUTagger,
    LogisticTagger,
    MLPTagger,
    MoETagger,
    NeXtVLAD,
)

__all__ = [
    "S3D",
    "CifarResNet",
    "DeepBagOfFrames",
    "GRUTagger",
    "GatedNetVLAD",
    "LogisticTagger",
    "MLPTagger",
    "MNIST1DNet",
    "MNIST1DResNet",
    "MoETagger",
    "NeXtVLAD",
    "create",
]
