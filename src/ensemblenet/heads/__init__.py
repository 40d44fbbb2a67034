"""Run the K heads of a model as one network."""

from ensemblenet._moved import renamed
from ensemblenet.heads.capture import capture
from ensemblenet.heads.choice import Choice, HeadsMode, choose, current_mode, tune
from ensemblenet.heads.fused import FusedEnsembleNet, fuse, unfuse
from ensemblenet.heads.program import Program
from ensemblenet.operations import Value
from ensemblenet.operations.deprecated import fusion_rule

__all__ = [
    "Choice",
    "FusedEnsembleNet",
    "HeadsMode",
    "Program",
    "Value",
    "capture",
    "choose",
    "current_mode",
    "fuse",
    "fusion_rule",
    "tune",
    "unfuse",
]

__getattr__ = renamed(__name__, {"measure": "ensemblenet.timing.measure", "step": "ensemblenet.timing.step"})
