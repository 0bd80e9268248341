"""One self-contained page on which a person clicks and sees, in every backbone, what resembles the place: what all kinds of items share.

The page holds the patches themselves, so any prompt and any threshold is computed in the browser. What is stored for each item and
backbone, and how exact it is:

- L2-normalised patches, turned to their principal axes (a rotation changes no cosine), cut where at most `_LOST` of any patch's
  squared length is left out (so no cosine is off by more), as int16 of value * 32767. Rounding adds up to sqrt(axes) / 32767, in
  practice some 1e-5. The largest error over all pairs is measured and shown on the page.
- attention of the class token: uint8, 255 is the map's own maximum, which is stored too.

What is shown of an item has a module per kind (`image_page`, `cloud_page`, `sound_page`). Scores are left out (`glpretrain.evaluate`), and
so is the report of a run, which shows its items with the same parts (`glpretrain.run_report`).
"""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import glpretrain
from glpretrain.encoders import Encoder
from glpretrain.encoders.attention import cls_attention_of_blocks
from glpretrain.report.figures import COLOURS
from glpretrain.report.maps import Layers, layer_numbers, own_threshold

_LOST = 1e-4
_UNIT = 32767
_CHUNK = 1024  # patches whose cosines with all others are checked at a time
_GUIDE = "<!-- guide -->"  # between the options and the guide of a kind of items

Plain = dict[str, object]  # becomes a JSON object
Threshold = float | Mapping[str, float] | None  # one cosine for all backbones, or by the names of some; others are computed


class Opening(NamedTuple):
    """The threshold that a page opens with for a backbone."""

    threshold: float
    origin: str  # where it comes from, in words


def write_page(
    encoders: Mapping[str, Encoder],
    files: Sequence[str | Path],
    *,
    modality: str,
    part: str,
    contents: Callable[[Sequence[Path]], Plain],
    out: str | Path,
    threshold: Threshold,
    layers: Layers,
    script: str | None = None,
) -> Path:
    """Write the page of one kind of items; the other arguments and the result are those of `write_report`.

    Args:
        modality: name of the kind of items, which every encoder must be for.
        part: name of the .html and the .js file beside this one that show such items.
        contents: makes `images`, `backbones` and `views` of the files, once all arguments have been checked.
        script: name of the .js file where it is that of another kind of items.

    Raises:
        ValueError: `out` exists or is no .html file, or an argument does not fit an encoder.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"inspect: out={out}; accepted: a new file that ends in .html")
    if out.exists():
        raise ValueError(f"inspect: {out} exists and nothing is overwritten; choose another --out")
    if not encoders or not files:
        raise ValueError(f"inspect: {len(encoders)} backbones and {len(files)} files given; accepted: at least one of each")
    check(encoders, modality=modality, threshold=threshold, layers=layers)
    paths = [Path(file) for file in files]
    page = _rendered(common() | contents(paths), names=[path.name for path in paths], part=part, script=script or f"{part}.js")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="ascii") as file:
        file.write(page)
    return out


def check(encoders: Mapping[str, Encoder], *, modality: str, threshold: Threshold, layers: Layers) -> None:
    """Refuse, with a ValueError, what cannot be shown on a page of one kind of items. Arguments as of `write_page`."""
    given = [] if threshold is None else [threshold] if isinstance(threshold, int | float) else threshold.values()
    if any(not -1 <= value <= 1 for value in given):
        raise ValueError(f"inspect: threshold={threshold}; accepted: a cosine, -1 to 1")
    for name, encoder in encoders.items():
        if encoder.card.modality != modality:
            raise ValueError(f"inspect: {name} is for {encoder.card.modality}; accepted on this page: backbones for {modality}")
        if encoder.training:
            raise ValueError(f"inspect: {name} is in training mode; call eval() first")
        layer_numbers(encoder, layers)


def opening(name: str, threshold: Threshold, patches: Sequence[Tensor]) -> Opening:
    """The threshold that a page opens with for a backbone.

    Args:
        name: name of the backbone.
        threshold: what was given for the page.
        patches: Float[N D] of each item, from which it is computed where nothing was given.
    """
    if isinstance(threshold, int | float):
        return Opening(float(threshold), "as given")
    if threshold is not None and name in threshold:
        return Opening(round(threshold[name], 3), "calibrated on masks")
    return Opening(own_threshold(patches), "computed from these items")


def common() -> Plain:
    """What the data of every page hold."""
    colours = np.rint(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return {"version": glpretrain.__version__, "colours": base64_of(colours)}


def as_json(data: Plain) -> str:
    """Data for a script element. Only `<` can end one or open a comment in it; as \\u003c it is the same JSON."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def scripts(*names: str) -> str:
    """Some of the scripts beside this file, which the last one needs."""
    return "\n".join((resources.files("glpretrain.report") / name).read_text() for name in names)


def guide_of(part: str) -> tuple[str, str]:
    """The options of a kind of items, and how its pictures are read, as HTML."""
    options, _, guide = (resources.files("glpretrain.report") / f"{part}.html").read_text().partition(_GUIDE)
    return options.strip(), guide.strip()


def _rendered(data: Plain, *, names: Sequence[str], part: str, script: str) -> str:
    """A page around its data: one file, ASCII, that refers to nothing outside itself."""
    folder, (options, guide) = resources.files("glpretrain.report"), guide_of(part)
    return Template((folder / "page.html").read_text()).substitute(
        title=html.escape(f"Inspection of {', '.join(names)}").encode("ascii", "xmlcharrefreplace").decode(),
        style=(folder / "page.css").read_text(),
        options=options,
        guide=guide,
        data=as_json(data),
        script=scripts("maps.js", "drawing.js", script),
    )


def described(name: str, encoder: Encoder, *, layers: Layers, opening: Opening) -> Plain:
    """What the page says of a backbone, and the threshold that it opens with."""
    card = encoder.card
    return {
        "name": name,
        **opening._asdict(),
        "encoder": str(card.arguments.get("name", card.encoder)),
        "source": card.source,
        "licence": card.licence,
        "parameters": sum(tensor.numel() for tensor in encoder.backbone_state().values()),
        "dim": card.embed_dim,
        "layers": layer_numbers(encoder, layers),
        "depth": encoder.num_layers,
    }


def stored(encoder: Encoder, items: Tensor, patches: Tensor, *, layers: Layers, order: Tensor | None = None) -> tuple[Plain, float]:
    """What the page holds of one item in one backbone, and the largest error of a cosine.

    Args:
        encoder: the backbone.
        items: Float[1 *item], the item as the encoder takes it, on its device.
        patches: Float[N D], its patches.
        layers: blocks whose attention is stored.
        order: Int[N], the numbers of the encoder's tokens in the order of `patches`; None where it is their own.
    """
    if not patches.isfinite().all():
        raise ValueError("inspect: the encoder's patch features are not finite; nothing can be drawn from them")
    features, error = compact(patches)
    view: Plain = {"axes": features.shape[1], "features": base64_of(features.numpy().astype("<i2"))}
    try:
        found = cls_attention_of_blocks(encoder, items, blocks=layer_numbers(encoder, layers))  # [L 1 heads *grid]
    except ValueError as reason:  # no ViT, no class token, or a block with two attentions: the page says so
        return view | {"attention": None, "reason": str(reason).removeprefix("attention maps: ")}, error
    maps = found[:, 0].flatten(2).cpu()  # [L heads N]
    maps = maps if order is None else maps[:, :, order]
    peaks = maps.amax(dim=-1)  # [L heads]
    shades = (maps / peaks.unsqueeze(-1).clamp(min=1e-12) * 255).round().byte()
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
    kept = features.double() / _UNIT
    chunks = zip(unit.split(_CHUNK), kept.split(_CHUNK), strict=True)
    error = max((own @ unit.T - part @ kept.T).abs().max().item() for own, part in chunks)
    return features, error


def base64_of(array: np.ndarray) -> str:
    """The bytes of an array, row by row, as text."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
