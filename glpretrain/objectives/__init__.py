"""Objectives: keyword tensors in, a float32 loss out, one number per item wherever that has a meaning."""

from glpretrain.objectives.base import Objective
from glpretrain.objectives.chamfer import ChamferL1, ChamferL2
from glpretrain.objectives.contrastive import InfoNCE, NegativeCosine, NPair, PatchInfoNCE, QueueInfoNCE
from glpretrain.objectives.distillation import PatchDistillation, TokenDistillation, ViewDistillation
from glpretrain.objectives.experts import CosineDistance, FeatureDistance, TokenRelations, WhitenedFeatures
from glpretrain.objectives.gram import GramDistance
from glpretrain.objectives.reconstruction import CorruptedPixels, PatchPixels
from glpretrain.objectives.regularization import KoLeo, MeanCosine

__all__ = [
    "ChamferL1",
    "ChamferL2",
    "CorruptedPixels",
    "CosineDistance",
    "FeatureDistance",
    "GramDistance",
    "InfoNCE",
    "KoLeo",
    "MeanCosine",
    "NPair",
    "NegativeCosine",
    "Objective",
    "PatchDistillation",
    "PatchInfoNCE",
    "PatchPixels",
    "QueueInfoNCE",
    "TokenDistillation",
    "TokenRelations",
    "ViewDistillation",
    "WhitenedFeatures",
]
