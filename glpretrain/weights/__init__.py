"""Trained encoders in files: export one, load one back, load one that others published."""

from glpretrain.weights.experts import load_expert
from glpretrain.weights.folders import export
from glpretrain.weights.loading import load_backbone, load_backbone_with_report
from glpretrain.weights.report import LoadReport

__all__ = ["LoadReport", "export", "load_backbone", "load_backbone_with_report", "load_expert"]
