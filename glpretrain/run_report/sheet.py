"""All small pictures of a report in one JPEG, from which the page draws each of them."""

import base64
import io
import math
from collections.abc import Sequence

from PIL import Image

from glpretrain.report.page import Plain

# Multiples of 16, the blocks of a JPEG, so that no picture has colours of the next one.
_SIDES = (160, 128, 96, 80, 64, 48, 32)
_QUALITY = 80
MOST_BYTES = 2_000_000


def sheet(pictures: Sequence[Image.Image], *, most_bytes: int = MOST_BYTES) -> Plain:
    """The pictures side by side in square cells, as large as a number of bytes allows, each in the upper left corner of its cell.

    Args:
        pictures: pictures in RGB.
        most_bytes: number of bytes of the JPEG at most; the smallest cells are taken where none fit.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    largest = max(max(picture.size) for picture in pictures)
    sides = [side for side in _SIDES if side < largest + 16]
    for side in sides:
        whole = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), (128, 128, 128))
        sizes: list[tuple[int, int]] = []
        for number, picture in enumerate(pictures):
            small = picture.copy()
            small.thumbnail((side, side), Image.Resampling.BICUBIC)
            whole.paste(small, (number % columns * side, number // columns * side))
            sizes.append(small.size)
        file = io.BytesIO()
        whole.save(file, "JPEG", quality=_QUALITY, optimize=True)
        if file.tell() <= most_bytes or side == sides[-1]:
            break
    return {
        "picture": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        "side": side,
        "columns": columns,
        "sizes": sizes,
    }
