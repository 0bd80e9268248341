"""Trained encoders in files: load one of ours or one that others published, and export one in our layout or in that of other tools."""

from glpretrain.weights.experts import load_expert
from glpretrain.weights.exports import FORMATS, Exported, export_as
from glpretrain.weights.folders import export
from glpretrain.weights.load import load_backbone, load_backbone_with_report, load_heads
from glpretrain.weights.report import LoadOptions, LoadReport

__all__ = [
    "FORMATS",
    "Exported",
    "LoadOptions",
    "LoadReport",
    "export",
    "export_as",
    "load_backbone",
    "load_backbone_with_report",
    "load_expert",
    "load_heads",
]
