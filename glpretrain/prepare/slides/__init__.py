"""Cutting the tissue of whole-slide images into tiles, in shards that `glpretrain.data.TileFolder` reads.

No module here except `synthetic` imports torch: many processes cut at once, and each of them would hold torch in memory.
"""

from glpretrain.prepare.slides.cutting import cut_slides
from glpretrain.prepare.slides.folder import Settings
from glpretrain.prepare.slides.opening import find_slides, open_slide
from glpretrain.prepare.slides.plan import thumbnail_of

__all__ = ["Settings", "cut_slides", "find_slides", "open_slide", "thumbnail_of"]
