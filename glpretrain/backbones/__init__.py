"""Trained encoders in files: export one, load one back, load one that others published."""

from glpretrain.backbones.experts import load_expert
from glpretrain.backbones.folders import export
from glpretrain.backbones.loading import load_backbone, load_backbone_with_report
from glpretrain.backbones.report import LoadReport

__all__ = ["LoadReport", "export", "load_backbone", "load_backbone_with_report", "load_expert"]
