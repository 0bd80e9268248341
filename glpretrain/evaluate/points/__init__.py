"""Evaluators of encoders of point clouds."""
