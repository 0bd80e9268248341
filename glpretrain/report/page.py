"""One self-contained page on which a person clicks a patch of a picture and sees, in every backbone, what resembles it.

The page holds the patches themselves, so any prompt and any threshold is computed in the browser. What is stored for each picture and
backbone, and how exact it is:

- L2-normalised patches, turned to their principal axes (a rotation changes no cosine), cut where at most `_LOST` of any patch's
  squared length is left out (so no cosine is off by more), as int16 of value * 32767. Rounding adds up to sqrt(axes) / 32767, in
  practice some 1e-5. The largest error over all pairs is measured and shown on the page.
- attention of the class token: uint8, 255 is the map's own maximum, which is stored too; the PCA picture: uint8.

Left out: scores (`glpretrain.evaluate`).
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import glpretrain
from glpretrain.encoders import Encoder
from glpretrain.report.figures import COLOURS, DIMMED, OPACITY
from glpretrain.report.maps import Layers, Seen, attention, layer_numbers, look, patch_pca, read, shape_of

_LOST = 1e-4
_UNIT = 32767
_CHUNK = 1024  # patches whose cosines with all others are checked at a time

Plain = dict[str, object]  # becomes a JSON object


def write_report(
    encoders: Mapping[str, Encoder],
    images: Sequence[str | Path],
    *,
    out: str | Path,
    size: int | tuple[int, int] | None = None,
    threshold: float = 0.5,
    layers: Layers = "all",
) -> Path:
    """Write the page.

    Args:
        encoders: by the name that they are shown under; in evaluation mode.
        images: files.
        out: a new .html file; its folder is made where it is missing.
        size: side of the square, or height and width, that pictures are stretched to; None is each card's own.
        threshold: that the page opens with.
        layers: blocks whose attention is stored, counted from 0, or from the last in negative numbers; or "all", or "last".

    Returns:
        The file.

    Raises:
        ValueError: `out` exists or is no .html file, a picture cannot be read, or an argument does not fit an encoder.
    """
    out = checked_out(out)
    if not encoders or not images:
        raise ValueError(f"inspect: {len(encoders)} backbones and {len(images)} images given; accepted: at least one of each")
    if not -1 <= threshold <= 1:
        raise ValueError(f"inspect: threshold={threshold}; accepted: a cosine, -1 to 1")
    page = render(_page_data(encoders, [Path(image) for image in images], size=size, threshold=threshold, layers=layers))
    return written(page, out=out)


def checked_out(out: str | Path) -> Path:
    """Where a page goes.

    Raises:
        ValueError: the file exists or is no .html file.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"inspect: out={out}; accepted: a new file that ends in .html")
    if out.exists():
        raise ValueError(f"inspect: {out} exists and nothing is overwritten; choose another --out")
    return out


def written(page: str, *, out: Path) -> Path:
    """The file, once the page is in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="ascii") as file:
        file.write(page)
    return out


def render(data: Plain, *, page: str = "page.html", scripts: Sequence[str] = ("maps.js", "drawing.js", "page.js")) -> str:
    """A page around its data: one file, ASCII, that refers to nothing outside itself.

    Args:
        data: what the page shows; `images` has the names for its title.
        page: the frame, a file beside this one.
        scripts: likewise, in their order.
    """
    part = resources.files("glpretrain.report")
    names = ", ".join(str(image["name"]) for image in data["images"])
    # Inside a script element only `<` can end it or open a comment; as \u003c it is the same JSON.
    return Template((part / page).read_text()).substitute(
        title=html.escape(f"Inspection of {names}").encode("ascii", "xmlcharrefreplace").decode(),
        style=(part / "page.css").read_text(),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script="\n".join((part / name).read_text() for name in scripts),
    )


def _page_data(
    encoders: Mapping[str, Encoder], images: Sequence[Path], *, size: int | tuple[int, int] | None, threshold: float, layers: Layers
) -> Plain:
    # What is wrong with an argument is said before minutes are spent on the others.
    shapes = {name: shape_of(encoder, size) for name, encoder in encoders.items()}
    for encoder in encoders.values():
        layer_numbers(encoder, layers)
    originals = {channels: [read(image, channels=channels) for image in images] for channels, _, _ in shapes.values()}
    distinct = list(dict.fromkeys(shapes.values()))
    pictures: list[list[str]] = [[""] * len(distinct) for _ in images]
    views: list[list[Plain]] = [[] for _ in images]
    backbones: list[Plain] = []
    for name, encoder in encoders.items():
        picture = distinct.index(shapes[name])
        largest_error = 0.0
        seen: Seen | None = None
        for number, original in enumerate(originals[shapes[name][0]]):
            seen = look(encoder, original, size=size)
            pictures[number][picture] = _png(seen.pixels)
            view, error = _view(encoder, seen, layers=layers)
            views[number].append(view)
            largest_error = max(largest_error, error)
        backbones.append(_describe(name, encoder, shapes[name], layers=layers) | {"picture": picture, "error": largest_error})
    sizes = [original.shape[1:] for original in next(iter(originals.values()))]
    return {
        "version": glpretrain.__version__,
        "threshold": threshold,
        "opacity": OPACITY,
        "dimmed": DIMMED,
        "colours": base64_of(np.rint(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).astype(np.uint8)),
        "images": [
            {"name": path.name, "size": list(shape), "pictures": own} for path, shape, own in zip(images, sizes, pictures, strict=True)
        ],
        "backbones": backbones,
        "views": views,
    }


def _describe(name: str, encoder: Encoder, shape: tuple[int, int, int], *, layers: Layers) -> Plain:
    card = encoder.card
    return {
        "name": name,
        "encoder": str(card.arguments.get("name", card.encoder)),
        "source": card.source,
        "licence": card.licence,
        "parameters": sum(tensor.numel() for tensor in encoder.backbone_state().values()),
        "dim": card.embed_dim,
        "patch": list(card.patch_size),
        "trained": list(card.item_shape[1:]),
        "size": list(shape[1:]),
        "grid": list(encoder.grid(shape)),
        "layers": layer_numbers(encoder, layers),
        "depth": encoder.num_layers,
    }


def _view(encoder: Encoder, seen: Seen, *, layers: Layers) -> tuple[Plain, float]:
    """What the page holds of one picture in one backbone, and the largest error of a cosine."""
    features, error = compact(seen.patches)
    view: Plain = {
        "axes": features.shape[1],
        "features": base64_of(features.numpy().astype("<i2")),
        "pca": base64_of((patch_pca(seen) * 255).round().byte().numpy()),
    }
    try:
        maps = attention(encoder, seen, layers=layers)  # [L heads h w]
    except ValueError as reason:  # no ViT, no class token, or a block with two attentions: the page says so
        return view | {"attention": None, "reason": str(reason).removeprefix("attention maps: ")}, error
    peaks = maps.amax(dim=(-2, -1), keepdim=True)  # [L heads 1 1]
    shades = (maps / peaks.clamp(min=1e-12) * 255).round().byte()
    return view | {"attention": base64_of(shades.numpy()), "heads": maps.shape[1], "peaks": peaks.flatten().tolist()}, error


def compact(patches: Tensor) -> tuple[Tensor, float]:
    """Features small enough for a page, that keep every cosine.

    Args:
        patches: Float[N D].

    Returns:
        Int16[N K], whose products are cosines * 32767^2, and the largest error of any of the N^2 cosines.
    """
    unit = functional.normalize(patches.double(), dim=-1)  # [N D]
    _, _, axes = torch.linalg.svd(unit, full_matrices=False)
    turned = unit @ axes.T  # [N min(N, D)]
    left_out = (1 - turned.square().cumsum(dim=1)).amax(dim=0)  # of the worst patch, when cut behind each axis
    num_axes = int((left_out > _LOST).sum()) + 1
    features = (turned[:, :num_axes] * _UNIT).round().short()  # [N K]
    stored = features.double() / _UNIT
    chunks = zip(unit.split(_CHUNK), stored.split(_CHUNK), strict=True)
    error = max((own @ unit.T - kept @ stored.T).abs().max().item() for own, kept in chunks)
    return features, error


def _png(pixels: Tensor) -> str:
    """A data URL of UInt8[C H W]."""
    array = pixels.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def base64_of(array: np.ndarray) -> str:
    """The bytes of an array, row by row, as text."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
