"""Trained encoders in files: export one, load one back, load one that others published."""

from glpretrain.backbones.folders import export
from glpretrain.backbones.loading import export_checkpoint, load_backbone, load_backbone_with_report
from glpretrain.backbones.report import LoadReport

__all__ = ["LoadReport", "export", "export_checkpoint", "load_backbone", "load_backbone_with_report"]
