"""What all formats share: the encoder at the wanted size, the check batches, and the folder that timm opens.

Left out: training checkpoints and the files of our own folder (`folders`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import Encoder
from glpretrain.encoders.timm_model import pair
from glpretrain.weights.fitting import fit
from glpretrain.weights.folders import described, export, read_own_folder, require_finite
from glpretrain.weights.report import LoadedWeights, LoadOptions

# Several numbers of items, because a traced program must not have frozen the number that it was traced with.
_CHECK_BATCHES = (1, 2, 5)


class Written(NamedTuple):
    """What the writer of a format reports about its files; see `Exported`."""

    file: Path
    difference: float | None
    note: str = ""


@dataclass(frozen=True)
class Exported:
    """One finished export.

    Args:
        folder: folder with the file, the card and what else belongs to the format.
        format: format that was asked for.
        megabytes: size of everything in the folder.
        file: file or folder that other tools open.
        difference: maximum absolute difference of cls and patches to the encoder on the check batches; None where nothing could run the
            file.
        note: what a user has to know, often empty.
    """

    folder: Path
    format: str
    megabytes: float
    file: Path
    difference: float | None
    note: str

    def __str__(self) -> str:
        """The lines that the command prints."""
        compared = "not compared" if self.difference is None else f"maximum absolute difference to the encoder {self.difference:.1e}"
        line = f"exported to {self.file} ({self.format}): {self.megabytes:.2f} MB, {compared}"
        return f"{line}\n{self.note}" if self.note else line


def prepare(
    encoder: Encoder, *, img_size: int | Sequence[int] | None = None, licence: str | None = None, source: str | None = None
) -> Encoder:
    """A copy of the encoder on the CPU, in evaluation mode, without mask token, perhaps at another size or with other words on its card.

    Args:
        encoder: encoder to copy; it stays as it is.
        img_size: height and width; learned positions are resized as the encoder does it for views of that size.
        licence: see `export_as`.
        source: see `export_as`.

    Raises:
        ValueError: the size does not fit the encoder, or a weight is not finite.
    """
    card = described(encoder.card, licence=licence, source=source)
    options: LoadOptions = {}
    if img_size is not None:
        encoder.grid((card.item_shape[0], *pair(img_size)))  # says what does not fit
        options["img_size"] = img_size
    state = {name: tensor.detach().cpu() for name, tensor in encoder.backbone_state().items()}
    require_finite(state)
    return fit(LoadedWeights("encoder", card.encoder, card.arguments, state, value_range=card.value_range), options, path="to export")[0]


def check_images(encoder: Encoder) -> Iterator[Tensor]:
    """Float[B C H W] at the encoder's size for several B, made by a formula, in the range of normalised pixels."""
    return check_items(encoder.card.item_shape)


def check_items(item_shape: Sequence[int]) -> Iterator[Tensor]:
    """Float[B *item] for several B, made by a formula."""
    for count in _CHECK_BATCHES:
        shape = (count, *item_shape)
        yield torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def difference(output: EncoderOutput, expected: EncoderOutput) -> float:
    """Maximum absolute difference over cls and patches."""
    pairs = ((output.cls, expected.cls), (output.patches, expected.patches))
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def write_timm(encoder: Encoder, folder: Path) -> Written:
    """Our own folder: weights under timm's names, the card, and the config.json with which timm's `local-dir:` opens it."""
    again, _ = fit(read_own_folder(export(encoder, folder)), {}, path=folder)
    with torch.no_grad():
        worst = max(difference(again(images), encoder(images)) for images in check_images(encoder))
    return Written(folder, worst)
