"""Whole-slide images: their tissue in tiles, in shards that `glpretrain.data.TileFolder` reads.

Nothing here imports torch (`synthetic` aside): many processes cut at once, and each would hold it in memory.
"""
