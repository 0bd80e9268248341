"""A backbone at work: features of your items in memory and in files, and the nearest neighbours of an item.

An `Encoder` offers `Transform` and `embed` as its own `transform` and `embed`. Scores are left out (`glpretrain.evaluate`).
"""

from glpretrain.use.embedding import embed, own_source
from glpretrain.use.files import write_features
from glpretrain.use.neighbours import neighbours
from glpretrain.use.transform import Transform

__all__ = ["Transform", "embed", "neighbours", "own_source", "write_features"]
