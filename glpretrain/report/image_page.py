"""The page of pictures: click a patch and see, in every backbone, what resembles it. The PCA picture is stored as uint8."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from glpretrain.encoders import Encoder
from glpretrain.report.figures import DIMMED, OPACITY
from glpretrain.report.maps import Layers, Size, look, patch_pca, read, shape_of
from glpretrain.report.page import Plain, base64_of, described, stored, write_page


def write_report(
    encoders: Mapping[str, Encoder],
    files: Sequence[str | Path],
    *,
    out: str | Path,
    size: Size = None,
    threshold: float = 0.5,
    layers: Layers = "all",
) -> Path:
    """Write the page of some pictures.

    Args:
        encoders: encoders of images, by the name that they are shown under; in evaluation mode.
        files: the pictures.
        out: a new .html file; its folder is made where it is missing.
        size: side of the square, or height and width, that pictures are stretched to; None is each card's own.
        threshold: threshold that the page opens with.
        layers: blocks whose attention is stored, counted from 0, or from the last in negative numbers; or "all", or "last".

    Returns:
        The file.

    Raises:
        ValueError: a picture cannot be read, or see `write_page`.
    """

    def contents(paths: Sequence[Path]) -> Plain:
        # What is wrong with an argument is said before minutes are spent on the others.
        shapes = {name: shape_of(encoder, size) for name, encoder in encoders.items()}
        originals = {channels: [read(path, channels=channels) for path in paths] for channels, _, _ in shapes.values()}
        distinct = list(dict.fromkeys(shapes.values()))
        pictures: list[list[str]] = [[""] * len(distinct) for _ in paths]
        views: list[list[Plain]] = [[] for _ in paths]
        backbones: list[Plain] = []
        for name, encoder in encoders.items():
            shape, errors = shapes[name], []
            picture = distinct.index(shape)
            for number, original in enumerate(originals[shape[0]]):
                seen = look(encoder, original, size=size)
                pictures[number][picture] = _png(seen.pixels)
                view, error = stored(encoder, seen.items, seen.patches, layers=layers)
                views[number].append(view | {"pca": base64_of((patch_pca(seen) * 255).round().byte().numpy())})
                errors.append(error)
            card = encoder.card
            sizes = {"patch": list(card.patch_size), "trained": list(card.item_shape[1:]), "size": list(shape[1:])}
            own = {"grid": list(encoder.grid(shape)), "picture": picture, "error": max(errors)}
            backbones.append(described(name, encoder, layers=layers) | sizes | own)
        sizes = [list(original.shape[1:]) for original in next(iter(originals.values()))]
        images = [{"name": path.name, "size": sides, "pictures": own} for path, sides, own in zip(paths, sizes, pictures, strict=True)]
        return {"opacity": OPACITY, "dimmed": DIMMED, "images": images, "backbones": backbones, "views": views}

    return write_page(encoders, files, modality="image", part="image_page", contents=contents, out=out, threshold=threshold, layers=layers)


def _png(pixels: Tensor) -> str:
    """A data URL of UInt8[C H W]."""
    array = pixels.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
