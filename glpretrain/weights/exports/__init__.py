"""Trained encoders in the formats of other tools: timm and Hugging Face folders, torch.export programs, ONNX."""

from collections.abc import Callable, Sequence
from pathlib import Path

from glpretrain.encoders import Encoder
from glpretrain.weights.exports.base import Exported, Written, prepare, require_new, write_timm
from glpretrain.weights.exports.huggingface import write_huggingface
from glpretrain.weights.exports.programs import write_onnx, write_torch

__all__ = ["FORMATS", "Exported", "export_as"]

# Our own folder is the one that timm opens, so the two names mean the same.
_FOLDERS: dict[str, Callable[[Encoder, Path], Written]] = {
    "folder": write_timm,
    "timm": write_timm,
    "huggingface": write_huggingface,
}
_PROGRAMS = {"torch": write_torch, "onnx": write_onnx}
FORMATS = (*_FOLDERS, *_PROGRAMS)


def export_as(
    encoder: Encoder,
    folder: str | Path,
    *,
    format: str = "folder",
    img_size: int | Sequence[int] | None = None,
    any_size: bool = False,
    licence: str | None = None,
    source: str | None = None,
) -> Exported:
    """Write an encoder to a new folder and compare what was written with the encoder.

    Args:
        encoder: to write; the mask token stays behind.
        folder: must not exist, or be empty.
        format: one of `FORMATS`; `folder` and `timm` are one and the same.
        img_size: height and width that the written one is made for, positions resampled; the encoder's own when None.
        any_size: a program (torch, onnx) that takes images of every size; where a model allows it.
        licence: of the weights; the card's own when None.
        source: where they come from; the card's own when None.

    Returns:
        What was written, with its size and the maximum absolute difference on a check batch.

    Raises:
        ValueError: the folder has something in it, a package is not installed, or the format cannot hold this encoder.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format={format!r} given; accepted: {', '.join(FORMATS)}")
    if any_size and format not in _PROGRAMS:
        raise ValueError(f"export: any_size given with format={format!r}; accepted: {', '.join(_PROGRAMS)}, folders are not tied to a size")
    folder = Path(folder)
    require_new(folder)
    prepared = prepare(encoder, img_size=img_size, licence=licence, source=source)
    if format in _PROGRAMS:
        written = _PROGRAMS[format](prepared, folder, any_size=any_size)
    else:
        written = _FOLDERS[format](prepared, folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return Exported(folder=folder, format=format, megabytes=size, **written._asdict())
