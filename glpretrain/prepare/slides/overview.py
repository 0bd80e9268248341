"""An image of a slide with which a person can check the result: the thumbnail, the outline of the tissue, and the tiles."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from glpretrain.prepare.slides.plan import Overview

_OUTLINE, _GRID, _TINT = (0, 140, 60), (20, 20, 20), (255, 215, 0)
_TINT_SHARE = 0.12
_LEAST_TILE = 12  # pixels along the side of a drawn tile; below it the grid would hide the slide
_LARGEST_IMAGE = 4096  # pixels along the longer side
_MARGIN = 22  # pixels above the image, for the caption


def draw_overview(overview: Overview, *, corners: np.ndarray, side: float, caption: str) -> np.ndarray:
    """Draw tissue and tiles on the thumbnail of a slide.

    Args:
        overview: thumbnail and mask of the tissue.
        corners: Float[N 2], x, y of the upper left corners of the tiles, in pixels of level 0.
        side: side of a tile, in pixels of level 0.
        caption: one line of text.

    Returns:
        UInt8[H W 3].
    """
    height, width = overview.mask.shape
    zoom = int(min(max(1, np.ceil(_LEAST_TILE * overview.factor / side)), max(1, _LARGEST_IMAGE // max(height, width))))
    image = Image.fromarray(overview.thumbnail).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    boxes = np.rint(np.concatenate([corners, corners + side], axis=1) * zoom / overview.factor).astype(int).tolist()
    tint = image.copy()
    draw = ImageDraw.Draw(tint)
    for x0, y0, x1, y1 in boxes:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=_TINT)
    image = Image.blend(image, tint, _TINT_SHARE)
    draw = ImageDraw.Draw(image)
    for x0, y0, x1, y1 in boxes:
        draw.rectangle((x0, y0, x1, y1), outline=_GRID)
    pixels = np.array(image)  # [H W 3]
    mask = overview.mask.repeat(zoom, axis=0).repeat(zoom, axis=1)
    pixels[ndimage.binary_dilation(mask, iterations=2) & ~mask] = _OUTLINE
    framed = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + _MARGIN), "white")
    framed.paste(Image.fromarray(pixels), (0, _MARGIN))
    ImageDraw.Draw(framed).text((4, 4), caption, fill=_GRID)
    return np.asarray(framed)
