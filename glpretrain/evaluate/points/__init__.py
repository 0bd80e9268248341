"""Evaluators of encoders of point clouds."""

from glpretrain.evaluate.points.episodes import Episodes
from glpretrain.evaluate.points.linear_svm import LinearSVM, ShapeHistogram
from glpretrain.evaluate.points.part_segmentation import PartSegmentation
from glpretrain.evaluate.points.prompts import PointPrompts

__all__ = ["Episodes", "LinearSVM", "PartSegmentation", "PointPrompts", "ShapeHistogram"]
