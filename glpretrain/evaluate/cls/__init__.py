"""Evaluators of the class token: classification and retrieval from frozen features."""
