"""From the tiles of a whole-slide image to the slide."""

from glpretrain.evaluate.slides.attention import SlideAttention
from glpretrain.evaluate.slides.multiple_instance import GatedAttention, fit_gated_attention

__all__ = ["GatedAttention", "SlideAttention", "fit_gated_attention"]
