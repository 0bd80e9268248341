"""Faces with the regions of their parts: detectors, parsers and the preparation of a folder."""

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
