"""A picture of a slide for a person to check: the thumbnail, the border of the tissue, and the tiles that are cut."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from glpretrain.prepare.slides.plan import Overview

_OUTLINE, _GRID, _TINT = (0, 140, 60), (20, 20, 20), (255, 215, 0)
_TINT_SHARE = 0.12
_LEAST_TILE = 12  # pixels of the picture, below which a grid hides what it shows
_LARGEST_PICTURE = 4096
_MARGIN = 22  # pixels above, for the caption


def draw_overview(overview: Overview, *, corners: np.ndarray, side: float, caption: str) -> np.ndarray:
    """Draw what is cut.

    Args:
        overview: thumbnail and mask.
        corners: Float[N 2], x, y of the tiles in pixels of level 0.
        side: of a tile in pixels of level 0.
        caption: one line.

    Returns:
        UInt8[H W 3].
    """
    height, width = overview.mask.shape
    zoom = int(min(max(1, np.ceil(_LEAST_TILE * overview.factor / side)), max(1, _LARGEST_PICTURE // max(height, width))))
    picture = Image.fromarray(overview.thumbnail).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    boxes = np.rint(np.concatenate([corners, corners + side], axis=1) * zoom / overview.factor).astype(int).tolist()
    tint = picture.copy()
    draw = ImageDraw.Draw(tint)
    for x0, y0, x1, y1 in boxes:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_TINT)
    picture = Image.blend(picture, tint, _TINT_SHARE)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in boxes:
        draw.rectangle((x0, y0, x1, y1), outline=_GRID)
    pixels = np.array(picture)  # [H W 3]
    mask = overview.mask.repeat(zoom, axis=0).repeat(zoom, axis=1)
    pixels[ndimage.binary_dilation(mask, iterations=2) & ~mask] = _OUTLINE
    framed = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + _MARGIN), "white")
    framed.paste(Image.fromarray(pixels), (0, _MARGIN))
    ImageDraw.Draw(framed).text((4, 4), caption, fill=_GRID)
    return np.asarray(framed)
