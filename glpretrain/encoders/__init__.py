"""Encoders. Importing this package registers all of them, so that a card can be built."""

from timm import is_model
from timm.models import is_model_in_modules

from glpretrain.encoders.base import Encoder, build, build_from, register
from glpretrain.encoders.feature_maps import FEATURE_MAP_MODULES, FeatureMap
from glpretrain.encoders.points import PointTransformer
from glpretrain.encoders.pooled import PooledViT
from glpretrain.encoders.states import fingerprint
from glpretrain.encoders.vit import VIT_MODULES, ViT

__all__ = [
    "Encoder",
    "FeatureMap",
    "PointTransformer",
    "PooledViT",
    "ViT",
    "build",
    "build_from",
    "fingerprint",
    "register",
    "timm_adapter",
]


def timm_adapter(name: str) -> str:
    """Registered name of the encoder that wraps this model of timm.

    Raises:
        ValueError: no encoder wraps it.
    """
    for encoder, modules in (("ViT", VIT_MODULES), ("FeatureMap", FEATURE_MAP_MODULES)):
        if is_model(name) and is_model_in_modules(name, modules):
            return encoder
    raise ValueError(f"encoders: name={name!r} given; accepted: models of timm's {', '.join((*VIT_MODULES, *FEATURE_MAP_MODULES))}")
