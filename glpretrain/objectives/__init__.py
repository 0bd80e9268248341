"""Tensors in, one float32 scalar out."""
