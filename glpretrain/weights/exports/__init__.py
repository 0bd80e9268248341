"""Trained encoders in the formats of other tools: timm and Hugging Face folders, torch.export programs, ONNX."""

from collections.abc import Sequence
from pathlib import Path

from glpretrain.core.files import new_folder
from glpretrain.encoders import Encoder
from glpretrain.weights.exports.base import Exported, prepare, write_timm
from glpretrain.weights.exports.huggingface import write_huggingface
from glpretrain.weights.exports.programs import write_onnx, write_torch
from glpretrain.weights.folders import CARD

__all__ = ["FORMATS", "Exported", "export_as"]

# timm opens our own folder, so the two names mean the same.
_FOLDERS = {"folder": write_timm, "timm": write_timm, "huggingface": write_huggingface}
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
        encoder: encoder to write; its mask token is left out.
        folder: folder to write to, which must not exist or be empty.
        format: one of `FORMATS`; "folder" and "timm" mean the same.
        img_size: height and width that the written encoder is made for, with positions resized; None keeps the encoder's own.
        any_size: whether a program (torch, onnx) should take images of every size, which not every model can.
        licence: licence of the weights; None keeps the one on the card.
        source: where the weights come from; None keeps what the card says.

    Returns:
        What was written, with its size and the maximum absolute difference to the encoder on the check batches.

    Raises:
        ValueError: the folder has something in it, another process is writing to it, a package is not installed, or the format cannot
            hold this encoder.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format={format!r} given; accepted: {', '.join(FORMATS)}")
    if any_size and format not in _PROGRAMS:
        raise ValueError(f"export: any_size given with format={format!r}; accepted: {', '.join(_PROGRAMS)}; folders have no fixed size")
    folder = Path(folder)
    with new_folder(folder, last=CARD, argument="export") as part:
        prepared = prepare(encoder, img_size=img_size, licence=licence, source=source)
        if format in _PROGRAMS:
            written = _PROGRAMS[format](prepared, part, any_size=any_size)
        else:
            written = _FOLDERS[format](prepared, part)
    written = written._replace(file=folder / written.file.relative_to(part))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return Exported(folder=folder, format=format, megabytes=size, **written._asdict())
