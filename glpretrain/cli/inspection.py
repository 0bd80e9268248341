"""From the words of `glpretrain inspect` to a page: names of backbones, sizes, layers.

Left out: the page (`glpretrain.report`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from glpretrain.data.sources.points import cloud_item, read_points
from glpretrain.encoders import Encoder
from glpretrain.modalities.points import with_count
from glpretrain.report import untrained, write_cloud_report, write_report
from glpretrain.weights import load_backbone

_EXPORTED = "backbone"  # what a run calls the folder of its encoder


def inspect(
    backbones: Sequence[str],
    images: Sequence[Path],
    *,
    out: Path,
    with_untrained: bool,
    size: str | None,
    threshold: float,
    layers: str,
) -> Path:
    """Write the page of some backbones and pictures.

    Args:
        backbones: exported folders, each PATH or NAME=PATH.
        images: files; of clouds or meshes where the backbones are for points.
        out: a new .html file.
        with_untrained: put the first backbone's architecture with fresh weights before the others.
        size: PIXELS or HEIGHTxWIDTH; None is each card's own.
        threshold: that the page opens with.
        layers: all, last, or numbers with commas between.

    Raises:
        ValueError: a word is not what is accepted, or see `write_report`.
    """
    sides, blocks = _size(size), _layers(layers)
    encoders: dict[str, Encoder] = {}
    for given in backbones:
        name, path = _name(given)
        if name in encoders:
            raise ValueError(f"inspect: two backbones are called {name!r}; name them, as in before={path}")
        encoders[name] = load_backbone(path)
    if with_untrained:
        if "untrained" in encoders:
            raise ValueError("inspect: a backbone is called 'untrained' and --untrained adds another; choose another name")
        encoders = {"untrained": untrained(next(iter(encoders.values()))), **encoders}
    if any(encoder.card.modality == "points" for encoder in encoders.values()):
        return _of_clouds(encoders, images, out=out, size=sides, threshold=threshold, layers=blocks)
    return write_report(encoders, images, out=out, size=sides, threshold=threshold, layers=blocks)


def _of_clouds(
    encoders: dict[str, Encoder],
    files: Sequence[Path],
    *,
    out: Path,
    size: int | tuple[int, int] | None,
    threshold: float,
    layers: Literal["all", "last"] | list[int],
) -> Path:
    """The page of clouds; `size` is their number of points."""
    if isinstance(size, tuple):
        raise ValueError(f"inspect: --size {size[0]}x{size[1]}; accepted for clouds: a number of points")
    count = next(iter(encoders.values())).card.item_shape[0] if size is None else size
    clouds = {
        path.name: with_count(cloud_item(read_points(path, num_points=count), label=-1, normalise=True), count).image for path in files
    }
    return write_cloud_report(encoders, clouds, out=out, threshold=threshold, layers=layers)


def _name(given: str) -> tuple[str, str]:
    """What a backbone is called on the page, and its folder: NAME=PATH, or the end of the path that tells it from others."""
    name, equals, path = given.partition("=")
    if equals and name and not Path(given).exists():
        return name, path
    parts = Path(given).parts
    if len(parts) > 1 and parts[-1] == _EXPORTED:
        parts = parts[:-1]
    return "/".join(parts[-2:]), given


def _size(given: str | None) -> int | tuple[int, int] | None:
    if given is None:
        return None
    sides = given.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"inspect: --size {given}; accepted: PIXELS, or HEIGHTxWIDTH, as in 224 or 224x320")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _layers(given: str) -> Literal["all", "last"] | list[int]:
    if given == "all" or given == "last":
        return given
    try:
        return [int(number) for number in given.split(",")]
    except ValueError as error:
        raise ValueError(f"inspect: --layers {given}; accepted: all, last, or numbers such as 0,5,11") from error
