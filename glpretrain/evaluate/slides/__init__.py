"""Evaluators of encoders of whole-slide images."""
