"""One self-contained page on which clouds of points turn: click a point and see, in every backbone, what resembles it.

The counterpart of `report` for points. Features are stored as there; the browser carries values from tokens to points as the
evaluators do (inverse squared distances to the nearest three centres), so a mask on the page is the evaluator's.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

import glpretrain
from glpretrain.encoders import Encoder, PointTransformer
from glpretrain.encoders.attention import cls_attention_of_blocks
from glpretrain.report.figures import COLOURS
from glpretrain.report.maps import Layers, layer_numbers
from glpretrain.report.page import Plain, base64_of, checked_out, compact, render, written


def write_cloud_report(
    encoders: Mapping[str, Encoder],
    clouds: Mapping[str, Tensor],
    *,
    out: str | Path,
    threshold: float = 0.5,
    layers: Layers = "all",
) -> Path:
    """Write the page.

    Args:
        encoders: by the name that they are shown under; in evaluation mode, of points.
        clouds: Float[P 3] by name, in the unit sphere.
        out: a new .html file; its folder is made where it is missing.
        threshold: that the page opens with.
        layers: blocks whose attention is stored, counted from 0, or from the last in negative numbers; or "all", or "last".

    Returns:
        The file.

    Raises:
        ValueError: `out` exists or is no .html file, or an argument does not fit an encoder.
    """
    out = checked_out(out)
    if not encoders or not clouds:
        raise ValueError(f"inspect: {len(encoders)} backbones and {len(clouds)} clouds given; accepted: at least one of each")
    if not -1 <= threshold <= 1:
        raise ValueError(f"inspect: threshold={threshold}; accepted: a cosine, -1 to 1")
    for name, encoder in encoders.items():
        if not isinstance(encoder, PointTransformer):
            raise ValueError(f"inspect: {name} is for {encoder.card.modality}; accepted beside clouds: backbones for points")
        if encoder.training:
            raise ValueError(f"inspect: {name} is in training mode; call eval() first")
        layer_numbers(encoder, layers)
    data = {
        "version": glpretrain.__version__,
        "threshold": threshold,
        "colours": base64_of(np.rint(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).astype(np.uint8)),
        "images": [{"name": name, "points": base64_of(points.numpy().astype("<f4"))} for name, points in clouds.items()],
        "backbones": [_describe(name, encoder, layers=layers) for name, encoder in encoders.items()],
        "views": [[_view(encoder, points, layers=layers) for encoder in encoders.values()] for points in clouds.values()],
    }
    return written(render(data, page="clouds.html", scripts=("maps.js", "clouds.js")), out=out)


def _describe(name: str, encoder: PointTransformer, *, layers: Layers) -> Plain:
    card = encoder.card
    return {
        "name": name,
        "encoder": str(card.arguments["name"]),
        "source": card.source,
        "parameters": sum(tensor.numel() for tensor in encoder.backbone_state().values()),
        "layers": layer_numbers(encoder, layers),
    }


@torch.no_grad()
def _view(encoder: PointTransformer, points: Tensor, *, layers: Layers) -> Plain:
    """What the page holds of one cloud in one backbone."""
    items = points[None].to(next(encoder.parameters()).device)
    patches = encoder(items).patches[0].float().cpu()  # [N D]
    if not patches.isfinite().all():
        raise ValueError("inspect: the encoder's patch features are not finite; nothing can be drawn from them")
    features, error = compact(patches)
    view: Plain = {
        "centres": encoder.group(items).centre_index[0].tolist(),
        "axes": features.shape[1],
        "features": base64_of(features.numpy().astype("<i2")),
        "error": error,
        "attention": None,
    }
    if encoder.num_prefix_tokens == 0:
        return view
    maps = cls_attention_of_blocks(encoder, items, blocks=layer_numbers(encoder, layers))[:, 0].cpu()  # [L heads N]
    shades = (maps / maps.amax(dim=-1, keepdim=True).clamp(min=1e-12) * 255).round().byte()
    return view | {"attention": base64_of(shades.numpy()), "heads": maps.shape[1]}
