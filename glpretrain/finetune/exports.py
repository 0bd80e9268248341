"""Fine-tuned models as programs that need neither this package nor timm: torch.export (.pt2) and ONNX.

Input `images`, Float[B C H W], as the transform of the card makes them; output `logits`, Float[B K *S]. The number of images is free. The
card is in the file and beside it, so that whoever opens the program knows how a picture is prepared and what the classes are called.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from glpretrain.core.files import new_folder, write_json
from glpretrain.weights.exports.base import check_items
from glpretrain.weights.exports.programs import opened_onnx, require_onnx, save_onnx, save_torch
from glpretrain.weights.folders import CARD

FORMATS = ("torch", "onnx")
Format = Literal["torch", "onnx"]
_FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
_OUTPUTS = ["logits"]


class ExportedModel(NamedTuple):
    """One finished export."""

    file: Path
    difference: float | None  # largest absolute difference of logits to the model on the check batches; None where nothing could run it

    def __str__(self) -> str:
        """The line that the command prints."""
        found = "not compared: onnxruntime is not installed"
        if self.difference is not None:
            found = f"largest difference of logits to the model {self.difference:.1e}"
        return f"exported to {self.file}: {found}; {self.file.parent / CARD} has the transform and the classes"


def export_model(
    model: nn.Module, folder: Path, *, format: Format, item_shape: tuple[int, ...], card: Mapping[str, object]
) -> ExportedModel:
    """Write a program to a new folder and compare what was written with the model.

    Args:
        model: Float[B C H W] to logits, in evaluation mode on the CPU.
        folder: a new or empty folder.
        format: `torch` or `onnx`.
        item_shape: channels, height and width of an image.
        card: card of the model.

    Raises:
        ValueError: the format is unknown, its packages are not installed, or the folder has something in it.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format={format!r} given; accepted for a fine-tuned model: {', '.join(FORMATS)}")
    if format == "onnx":
        require_onnx()
    axes = ({0: Dim("batch", min=1)},)
    with new_folder(folder, last=CARD, argument="export") as part:
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(2, *item_shape),), dynamic_shapes=axes)  # one item would be a constant
        file, difference = part / _FILES[format], None
        if format == "torch":
            again = save_torch(program, file, card=card)
            difference = max(_apart(again(images), model, images) for images in check_items(item_shape))
        else:
            words = {name: json.dumps(card[name], allow_nan=False) for name in ("classes", "transform")}
            save_onnx(program, file, outputs=_OUTPUTS, axes=axes, card=card, words=words)
            if find_spec("onnxruntime") is not None:
                run = opened_onnx(file, outputs=_OUTPUTS)
                difference = max(_apart(run(images)[0], model, images) for images in check_items(item_shape))
        write_json(part / CARD, card)
    return ExportedModel(folder / _FILES[format], difference)


@torch.no_grad()
def _apart(logits: Tensor | tuple[Tensor, ...], model: nn.Module, images: Tensor) -> float:
    assert isinstance(logits, Tensor)
    return (logits - model(images)).abs().max().item()
