"""Sources of items. `glpretrain.data.module` (Lightning) and `glpretrain.data.views` (kornia) are imported by their own names,
so reading images needs neither."""

from glpretrain.data.base import Item, Source, Subset, UnreadableItemError
from glpretrain.data.images import ImageFolder, ImageList, MaskedFolder
from glpretrain.data.scenes import Scenes

__all__ = ["ImageFolder", "ImageList", "Item", "MaskedFolder", "Scenes", "Source", "Subset", "UnreadableItemError"]
