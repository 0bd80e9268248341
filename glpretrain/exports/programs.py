"""Encoders as programs that need neither this package nor timm: torch.export (.pt2) and ONNX.

Input `images`, Float[B C H W], normalised with the card's mean and std; outputs `cls`, Float[B D], and `patches`, Float[B N D].
The number of items is free, height and width are those of the card. Left out: normalisation inside the program, since a caller
that resizes on its own also normalises; mean and std are in the file's metadata and in the card beside it.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from glpretrain.encoders import Encoder
from glpretrain.exports.base import CARD, Written, check_images, difference, write_card
from glpretrain.types import EncoderOutput

_TORCH_FILE, _ONNX_FILE = "encoder.pt2", "encoder.onnx"
_INPUTS, _OUTPUTS = ["images"], ["cls", "patches"]
_ONNX_PACKAGES = ("onnx", "onnxscript")
# Protocol buffers end at 2 GiB; larger weights go to a file of their own.
_LARGEST_ONNX_FILE = 2_000_000_000


class _Features(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float[B C H W] to Float[B D] and Float[B N D]."""
        output = self.encoder(images)
        return output.cls, output.patches


def _batch_is_free() -> tuple[dict[int, Dim]]:
    return ({0: Dim("batch", min=1)},)


def _trace(encoder: Encoder) -> ExportedProgram:
    # Two items: an axis of length one would be taken for a constant.
    example = torch.zeros(2, *encoder.card.item_shape)
    with torch.no_grad():
        return torch.export.export(_Features(encoder), (example,), dynamic_shapes=_batch_is_free())


def write_torch(encoder: Encoder, folder: Path) -> Written:
    """`encoder.pt2`, opened by `torch.export.load(file).module()`; the card is inside it too."""
    program = _trace(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _TORCH_FILE
    torch.export.save(program, file, extra_files={CARD: json.dumps(encoder.card.to_json())})
    write_card(encoder, folder)
    again = torch.export.load(file).module()
    with torch.no_grad():
        worst = max(difference(EncoderOutput(*again(images)), encoder(images)) for images in check_images(encoder))
    return Written(file, worst, "open with torch.export.load(FILE).module(), which gives (cls, patches)")


def write_onnx(encoder: Encoder, folder: Path) -> Written:
    """`encoder.onnx`, run in onnxruntime where that is installed; mean, std and the card are in its metadata.

    Raises:
        ValueError: onnx or onnxscript is not installed.
    """
    if missing := [name for name in _ONNX_PACKAGES if find_spec(name) is None]:
        raise ValueError(f"export: format='onnx' needs {' and '.join(missing)}: pip install 'glpretrain[onnx]'")
    # Decomposed first: the converter's own fused attention refuses the attention biases of BEiT and its kin.
    program = torch.onnx.export(
        _trace(encoder).run_decompositions(),
        dynamo=True,
        verbose=False,
        input_names=_INPUTS,
        output_names=_OUTPUTS,
        dynamic_shapes=_batch_is_free(),
    )
    card = encoder.card.to_json()
    program.model.metadata_props.update({name: json.dumps(card[name]) for name in ("mean", "std", "licence", "source")})
    program.model.metadata_props["card"] = json.dumps(card)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _ONNX_FILE
    weights = sum(tensor.numel() * tensor.element_size() for tensor in encoder.backbone_state().values())
    program.save(file, external_data=weights > _LARGEST_ONNX_FILE)
    write_card(encoder, folder)
    if find_spec("onnxruntime") is None:
        return Written(file, None, "onnxruntime is not installed, so the file was not run: pip install 'glpretrain[onnx]'")
    return Written(file, _difference_in_onnxruntime(encoder, file))


def _difference_in_onnxruntime(encoder: Encoder, file: Path) -> float:
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in check_images(encoder):
        output = EncoderOutput(*map(torch.from_numpy, session.run(_OUTPUTS, {_INPUTS[0]: images.numpy()})))
        with torch.no_grad():
            worst = max(worst, difference(output, encoder(images)))
    return worst
