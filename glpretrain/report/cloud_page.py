"""The page of clouds of points, which turn: click a point and see, in every backbone, what resembles it.

The browser carries values from tokens to points as the evaluators do (inverse squared distances to the nearest three centres), so a mask on
the page is the evaluator's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.clouds import farthest_points
from glpretrain.data.sources.points import cloud_item, read_points
from glpretrain.encoders import Encoder
from glpretrain.report.maps import Layers, Size
from glpretrain.report.page import Plain, Threshold, base64_of, described, opening, stored, write_page


def write_cloud_report(
    encoders: Mapping[str, Encoder],
    files: Sequence[str | Path],
    *,
    out: str | Path,
    size: Size = None,
    threshold: Threshold = None,
    layers: Layers = "all",
) -> Path:
    """Write the page of some clouds. The arguments are those of `write_report`, except:

    Args:
        encoders: encoders of points.
        files: clouds and meshes, which are moved into the unit sphere.
        size: number of points; None is that of the first card.

    Raises:
        ValueError: a file cannot be read, or see `write_page`.
    """

    def contents(paths: Sequence[Path]) -> Plain:
        modality = modalities.get("points")
        shape = modality.item_shape(next(iter(encoders.values())).card, size)
        clouds: list[Tensor] = []
        for path in paths:
            item = cloud_item(read_points(path, num_points=shape[0]), name=path, label=-1, normalise=True)
            clouds.append(modality.resize(item, shape, fit="stretch").values)  # [P 3]
        images = [
            {"name": path.name, "points": base64_of(points.numpy().astype("<f4"))} for path, points in zip(paths, clouds, strict=True)
        ]
        views: list[list[Plain]] = [[] for _ in clouds]
        backbones: list[Plain] = []
        for name, encoder in encoders.items():
            patches = [_patches(encoder, points) for points in clouds]
            for points, own, found in zip(clouds, patches, views, strict=True):
                found.append(_view(encoder, points, own, layers=layers))
            backbones.append(described(name, encoder, layers=layers, opening=opening(name, threshold, patches)))
        return {"images": images, "backbones": backbones, "views": views}

    return write_page(encoders, files, modality="points", part="cloud_page", contents=contents, out=out, threshold=threshold, layers=layers)


@torch.no_grad()
def _patches(encoder: Encoder, points: Tensor) -> Tensor:
    """Float[N D] of one cloud."""
    return encoder(points[None].to(next(encoder.parameters()).device)).patches[0].float().cpu()


@torch.no_grad()
def _view(encoder: Encoder, points: Tensor, patches: Tensor, *, layers: Layers) -> Plain:
    """What the page holds of one cloud in one backbone."""
    items = points[None].to(next(encoder.parameters()).device)
    view, error = stored(encoder, items, patches, layers=layers)
    return view | {"centres": farthest_points(items, count=len(patches))[0].tolist(), "error": error}
