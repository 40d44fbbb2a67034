"""Run the K heads of a model as one network."""

from ensemblenet.heads.choice import Choice, HeadsMode, choose, measure, step, tune
from ensemblenet.heads.fused import FusedEnsembleNet, fuse, unfuse
from ensemblenet.heads.program import Program, Value, fusion_rule

__all__ = [
    "Choice",
    "FusedEnsembleNet",
    "HeadsMode",
    "Program",
    "Value",
    "choose",
    "fuse",
    "fusion_rule",
    "measure",
    "step",
    "tune",
    "unfuse",
]
