"""The command `predict`."""

from ensemblenet.evaluation.predictions import predict

__all__ = ["predict"]
