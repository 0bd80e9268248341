"""Evaluators of encoders of faces."""

from glpretrain.evaluate.faces.forgery import ForgeryDetection

__all__ = ["ForgeryDetection"]
