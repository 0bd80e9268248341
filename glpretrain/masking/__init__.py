"""What is hidden from the student: masks over tokens, masks over the regions of a face, and groups of pixels that are replaced."""

from glpretrain.masking.corruption import Corruption, GroupCorruption
from glpretrain.masking.regions import FACE_REGIONS, CRFRPMask, CRFRRMask, FaskingMask, FRPMask, Hidden, RegionMask
from glpretrain.masking.tokens import BernoulliMask, BlockMask, DINOv2Mask, DINOv3Mask, Mask, RandomMask, UniformMask, VisibleBlocks

__all__ = [
    "FACE_REGIONS",
    "BernoulliMask",
    "BlockMask",
    "CRFRPMask",
    "CRFRRMask",
    "Corruption",
    "DINOv2Mask",
    "DINOv3Mask",
    "FRPMask",
    "FaskingMask",
    "GroupCorruption",
    "Hidden",
    "Mask",
    "RandomMask",
    "RegionMask",
    "UniformMask",
    "VisibleBlocks",
]
