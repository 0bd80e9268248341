"""Evaluators of patches and of attention: segmentation, object discovery, label propagation."""

from glpretrain.evaluate.patches.attention_segmentation import AttentionSegmentation
from glpretrain.evaluate.patches.clustering import ClusterSegmentation
from glpretrain.evaluate.patches.discovery import ObjectDiscovery
from glpretrain.evaluate.patches.in_context import InContextSegmentation
from glpretrain.evaluate.patches.linear_segmentation import LinearSegmentation
from glpretrain.evaluate.patches.multilabel import PatchMultilabel
from glpretrain.evaluate.patches.prompt_segmentation import PromptSegmentation
from glpretrain.evaluate.patches.propagation import LabelPropagation

__all__ = [
    "AttentionSegmentation",
    "ClusterSegmentation",
    "InContextSegmentation",
    "LabelPropagation",
    "LinearSegmentation",
    "ObjectDiscovery",
    "PatchMultilabel",
    "PromptSegmentation",
]
