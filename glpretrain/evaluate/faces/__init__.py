"""Evaluators of encoders of faces."""
