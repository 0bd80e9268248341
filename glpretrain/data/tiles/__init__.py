"""Whole-slide images: tissue tiles in shards (`cut_slides`), and the source that reads them (`TileFolder`)."""

from glpretrain.data.tiles.cutting import Summary, cut_slides
from glpretrain.data.tiles.opening import find_slides, open_slide
from glpretrain.data.tiles.plan import Settings, thumbnail_of
from glpretrain.data.tiles.slide import Level, Slide, UnreadableSlideError
from glpretrain.data.tiles.source import TileFolder
from glpretrain.data.tiles.synthetic import write_synthetic_slide

__all__ = [
    "Level",
    "Settings",
    "Slide",
    "Summary",
    "TileFolder",
    "UnreadableSlideError",
    "cut_slides",
    "find_slides",
    "open_slide",
    "thumbnail_of",
    "write_synthetic_slide",
]
