"""The page of pictures: click a patch and see, in every backbone, what resembles it. The PCA picture is stored as uint8.

Backbones see pictures stretched to their own size. The page shows them in their true proportions, the picture itself as a JPEG.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from glpretrain.encoders import Encoder
from glpretrain.report.figures import DIMMED, OPACITY
from glpretrain.report.maps import Layers, Picture, Seen, Size, look, patch_pca, read, shape_of
from glpretrain.report.page import Plain, Threshold, base64_of, described, opening, stored, write_page

_SHOWN, _QUALITY = 480, 82  # longer side of a picture as it is shown, in pixels, and of its JPEG


class Named(NamedTuple):
    """A picture and what it is called on the page."""

    name: str
    picture: Picture


def write_report(
    encoders: Mapping[str, Encoder],
    files: Sequence[str | Path],
    *,
    out: str | Path,
    size: Size = None,
    threshold: Threshold = None,
    layers: Layers = "all",
) -> Path:
    """Write the page of some pictures.

    Args:
        encoders: encoders of images, by the name that they are shown under; in evaluation mode.
        files: the pictures.
        out: a new .html file; its folder is made where it is missing.
        size: side of the square, or height and width, that pictures are stretched to; None is each card's own.
        threshold: threshold that the page opens with, for all backbones or by their names; what is not given is computed for each backbone
            from these pictures (`own_threshold`).
        layers: blocks whose attention is stored, counted from 0, or from the last in negative numbers; or "all", or "last".

    Returns:
        The file.

    Raises:
        ValueError: a picture cannot be read, or see `write_page`.
    """

    def contents(paths: Sequence[Path]) -> Plain:
        return image_data(encoders, [Named(path.name, path) for path in paths], size=size, threshold=threshold, layers=layers)

    return write_page(encoders, files, modality="image", part="image_page", contents=contents, out=out, threshold=threshold, layers=layers)


def image_data(encoders: Mapping[str, Encoder], shown: Sequence[Named], *, size: Size, threshold: Threshold, layers: Layers) -> Plain:
    """What a page holds of some pictures. Other arguments and errors are those of `write_report`.

    Args:
        shown: the pictures.
    """
    # What is wrong with an argument is said before minutes are spent on the others.
    shapes = {name: shape_of(encoder, size) for name, encoder in encoders.items()}
    ways = {name: (encoder.card.item_shape[0], encoder.card.value_range) for name, encoder in encoders.items()}
    originals: dict[tuple[int, object], list[Tensor]] = {}
    for name, encoder in encoders.items():
        if ways[name] not in originals:
            originals[ways[name]] = [read(one.picture, card=encoder.card) for one in shown]
    distinct = list(dict.fromkeys((shapes[name], ways[name]) for name in encoders))
    pictures: list[list[str]] = [[""] * len(distinct) for _ in shown]
    views: list[list[Plain]] = [[] for _ in shown]
    backbones: list[Plain] = []
    for name, encoder in encoders.items():
        shape, errors, seen_patches = shapes[name], [], []
        picture = distinct.index((shape, ways[name]))
        for number, original in enumerate(originals[ways[name]]):
            seen = look(encoder, original, size=size)
            pictures[number][picture] = data_url(_image(seen.pixels), "PNG", optimize=True)
            view, error = _view(encoder, seen, layers=layers)
            views[number].append(view)
            errors.append(error)
            seen_patches.append(seen.patches)
        card = encoder.card
        sizes = {"patch": list(card.patch_size), "trained": list(card.item_shape[1:]), "size": list(shape[1:])}
        own = {"grid": list(encoder.grid(shape)), "picture": picture, "error": max(errors)}
        opens = opening(name, threshold, seen_patches)
        backbones.append(described(name, encoder, layers=layers, opening=opens) | sizes | own)
    widest = originals[max(originals, key=lambda way: way[0])]  # in colour where one of the backbones sees colours
    images = [
        {"name": one.name, "size": list(original.shape[1:]), "shown": _shown(original), "pictures": own}
        for one, original, own in zip(shown, widest, pictures, strict=True)
    ]
    return {"opacity": OPACITY, "dimmed": DIMMED, "images": images, "backbones": backbones, "views": views}


def _view(encoder: Encoder, seen: Seen, *, layers: Layers) -> tuple[Plain, float]:
    """What the page holds of one picture in one backbone, and the largest error of a cosine."""
    view, error = stored(encoder, seen.items, seen.patches, layers=layers)
    return view | {"pca": base64_of((patch_pca(seen) * 255).round().byte().numpy())}, error


def _image(pixels: Tensor) -> Image.Image:
    """A picture of UInt8[C H W]."""
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _shown(pixels: Tensor) -> str:
    """A data URL of UInt8[C H W], in its own proportions."""
    image = _image(pixels)
    image.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return data_url(image, "JPEG", quality=_QUALITY)


def data_url(image: Image.Image, form: str, **how: int) -> str:
    """A picture as a data URL, as PNG or JPEG."""
    file = io.BytesIO()
    image.save(file, form, **how)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
