"""Encoders as programs that need neither this package nor timm: torch.export (.pt2) and ONNX.

Input `images`, Float[B C H W], normalised with the card's mean and std; outputs `cls`, Float[B D], and `patches`, Float[B N D].
The number of items is free. Height and width are those of the card unless `any_size` is asked for.
Left out: normalisation inside the program, because a caller that resizes images also normalises them. Mean and std are in the metadata
of the file and in the card beside it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import Encoder
from glpretrain.weights.exports.base import Written, check_images, difference
from glpretrain.weights.folders import CARD, write_card

_TORCH_FILE, _ONNX_FILE = "encoder.pt2", "encoder.onnx"
_INPUTS, _OUTPUTS = ["images"], ["cls", "patches"]
_ONNX_PACKAGES = ("onnx", "onnxscript")
# Protocol buffers hold at most 2 GiB, so larger weights go to a file of their own.
_LARGEST_ONNX_FILE = 2_000_000_000


class _Features(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float[B C H W] to Float[B D] and Float[B N D]."""
        output = self.encoder(images)
        return output.cls, output.patches


def _free_axes(encoder: Encoder, *, any_size: bool) -> tuple[dict[int, Dim]]:
    axes = {0: Dim("batch", min=1)}
    if any_size:  # at least two rows and two columns, because the tracer takes an axis of length one for a constant
        height, width = encoder.card.patch_size
        axes |= {2: height * Dim("rows", min=2), 3: width * Dim("columns", min=2)}
    return (axes,)


def _one_size(encoder: Encoder, reason: str) -> ValueError:
    name = encoder.card.arguments["name"]
    return ValueError(f"export: any_size given; {name} can be traced at one size only ({reason}); leave any_size out")


def _trace(encoder: Encoder, *, any_size: bool) -> ExportedProgram:
    # Tracing does not end where the number of windows is unknown.
    model_args = encoder.library_config(encoder.card).get("model_args")
    if any_size and isinstance(model_args, dict) and "strict_img_size" in model_args:
        raise _one_size(encoder, "its windows are laid out for it")
    # Two items, because the tracer would take one for a constant.
    example = torch.zeros(2, *encoder.card.item_shape)
    with torch.no_grad():
        try:
            program = torch.export.export(_Features(encoder), (example,), dynamic_shapes=_free_axes(encoder, any_size=any_size))
            if any_size:  # a size that the model keeps outside its tensors shows only when images of another size come
                program.module()(_larger(example, encoder))
        except (AssertionError, RuntimeError) as error:
            if not any_size:
                raise
            raise _one_size(encoder, str(error).strip().splitlines()[0]) from error
    return program


def _larger(images: Tensor, encoder: Encoder) -> Tensor:
    """The same images with two more rows and one more column of tokens, Float[B C H+2p W+p]."""
    height, width = encoder.card.patch_size
    return nn.functional.pad(images, (0, width, 0, 2 * height), mode="circular")


def _checks(encoder: Encoder, *, any_size: bool) -> Iterator[Tensor]:
    for images in check_images(encoder):
        yield images
        if any_size:
            yield _larger(images, encoder)


def write_torch(encoder: Encoder, folder: Path, *, any_size: bool = False) -> Written:
    """`encoder.pt2`, opened by `torch.export.load(file).module()`; the card is inside it too.

    Args:
        encoder: encoder that `prepare` returned.
        folder: empty folder to write to.
        any_size: whether height and width are free, from two rows and two columns of tokens on.

    Raises:
        ValueError: any_size is asked for and the traced model takes one size only.
    """
    file = folder / _TORCH_FILE
    again = save_torch(_trace(encoder, any_size=any_size), file, card=encoder.card.to_json())
    write_card(encoder.card, folder)
    with torch.no_grad():
        worst = max(difference(EncoderOutput(*again(images)), encoder(images)) for images in _checks(encoder, any_size=any_size))
    return Written(file, worst, "open with torch.export.load(FILE).module(), which gives (cls, patches)")


def write_onnx(encoder: Encoder, folder: Path, *, any_size: bool = False) -> Written:
    """`encoder.onnx`, run in onnxruntime where that is installed; mean, std and the card are in its metadata.

    Args:
        encoder: encoder that `prepare` returned.
        folder: empty folder to write to.
        any_size: whether height and width are free, from two rows and two columns of tokens on.

    Raises:
        ValueError: onnx or onnxscript is not installed, or see `write_torch`.
    """
    card = encoder.card.to_json()
    file = folder / _ONNX_FILE
    words = {name: json.dumps(card[name], allow_nan=False) for name in ("mean", "std", "licence", "source")}
    axes = _free_axes(encoder, any_size=any_size)
    require_onnx()
    save_onnx(_trace(encoder, any_size=any_size), file, outputs=_OUTPUTS, axes=axes, card=card, words=words)
    write_card(encoder.card, folder)
    if find_spec("onnxruntime") is None:
        return Written(file, None, "onnxruntime is not installed, so the file was not run: pip install 'glpretrain[onnx]'")
    return Written(file, _difference_in_onnxruntime(encoder, file, any_size=any_size))


def _difference_in_onnxruntime(encoder: Encoder, file: Path, *, any_size: bool) -> float:
    run = opened_onnx(file, outputs=_OUTPUTS)
    worst = 0.0
    for images in _checks(encoder, any_size=any_size):
        with torch.no_grad():
            worst = max(worst, difference(EncoderOutput(*run(images)), encoder(images)))
    return worst


def save_torch(program: ExportedProgram, file: Path, *, card: Mapping[str, object]) -> Callable[[Tensor], Tensor | tuple[Tensor, ...]]:
    """Write a program with its card inside, and open it again."""
    torch.export.save(program, file, extra_files={CARD: json.dumps(card, allow_nan=False)})
    return torch.export.load(file).module()


def require_onnx() -> None:
    """Refuse, with a ValueError, to write ONNX where its packages are not installed."""
    if missing := [name for name in _ONNX_PACKAGES if find_spec(name) is None]:
        raise ValueError(f"export: format='onnx' needs {' and '.join(missing)}: pip install 'glpretrain[onnx]'")


def save_onnx(
    program: ExportedProgram,
    file: Path,
    *,
    outputs: Sequence[str],
    axes: tuple[dict[int, Dim], ...],
    card: Mapping[str, object],
    words: Mapping[str, str],
) -> None:
    """Write a program that takes `images` as ONNX.

    Args:
        program: the traced module.
        file: file to write.
        outputs: names of its outputs.
        axes: axes that are free, as for `torch.export`.
        card: card that goes into the metadata.
        words: further entries of the metadata.
    """
    # Decomposed first, because the converter's own fused attention refuses the attention biases of BEiT and related models.
    written = torch.onnx.export(
        program.run_decompositions(), dynamo=True, verbose=False, input_names=_INPUTS, output_names=list(outputs), dynamic_shapes=axes
    )
    assert written is not None  # it is for dynamo=True
    written.model.metadata_props.update({**words, "card": json.dumps(card, allow_nan=False)})
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    written.save(file, external_data=weights > _LARGEST_ONNX_FILE)


def opened_onnx(file: Path, *, outputs: Sequence[str]) -> Callable[[Tensor], list[Tensor]]:
    """The program of a file in onnxruntime, which has to be installed."""
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(list(outputs), {_INPUTS[0]: images.numpy()})]
