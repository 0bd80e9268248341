"""Preparing a folder of faces with region maps: detectors, parsers, and the preparation itself."""

from glpretrain.prepare.faces.detection import CascadeDetector, FaceDetector
from glpretrain.prepare.faces.parsers import Box, FaceParser, FacerParser, MapParser, TemplateParser
from glpretrain.prepare.faces.preparation import Outcome, Preparation

__all__ = [
    "Box",
    "CascadeDetector",
    "FaceDetector",
    "FaceParser",
    "FacerParser",
    "MapParser",
    "Outcome",
    "Preparation",
    "TemplateParser",
]
