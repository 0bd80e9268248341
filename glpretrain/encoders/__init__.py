"""Encoders: importing this package registers all of them, so that a card can be built."""

from glpretrain.encoders.base import Encoder, build, register
from glpretrain.encoders.features import FeatureMap
from glpretrain.encoders.vit import ViT

__all__ = ["Encoder", "FeatureMap", "ViT", "build", "register"]
