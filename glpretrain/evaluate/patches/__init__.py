"""Evaluators of patches and of attention: segmentation, object discovery, label propagation."""
