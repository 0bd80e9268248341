"""Faces with the regions of their parts: sources, parsers, detectors and the preparation of a folder."""

from glpretrain.data.faces.detection import CascadeDetector, FaceDetector
from glpretrain.data.faces.parsers import Box, FaceParser, FacerParser, MapParser, TemplateParser
from glpretrain.data.faces.preparation import Outcome, Preparation
from glpretrain.data.faces.regions import TABLES
from glpretrain.data.faces.sources import Faces, FaceSwaps, LFWSubset, holds_faces

__all__ = [
    "TABLES",
    "Box",
    "CascadeDetector",
    "FaceDetector",
    "FaceParser",
    "FaceSwaps",
    "FacerParser",
    "Faces",
    "LFWSubset",
    "MapParser",
    "Outcome",
    "Preparation",
    "TemplateParser",
    "holds_faces",
]
