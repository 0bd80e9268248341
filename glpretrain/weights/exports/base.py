"""What every format shares: the encoder at the wanted size, the check batches, and the folder that timm opens.

Left out: training checkpoints and our own folder, which `glpretrain.weights` reads and writes.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import Encoder, ViT, build
from glpretrain.weights import export, load_backbone

CARD = "card.json"
# A program traced with two items must not have frozen that number.
_CHECK_BATCHES = (1, 2, 5)


class Written(NamedTuple):
    """What a writer has to say about its files."""

    file: Path  # the one that others open
    difference: float | None  # maximum absolute, to the encoder; None where nothing could run the file
    note: str = ""  # what a user has to know


@dataclass(frozen=True)
class Exported:
    """One finished export.

    Args:
        folder: with the file, the card and what else belongs to the format.
        format: as asked for.
        megabytes: of all that is in the folder.
        file: the one that others open.
        difference: maximum absolute, of cls and patches to the encoder on a check batch; None where nothing could run the file.
        note: what a user has to know, empty where there is nothing.
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


def require_new(folder: Path) -> None:
    """Say at once that nothing will be overwritten.

    Raises:
        ValueError: the folder has something in it already, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export: {folder} is a file; accepted: a new or empty folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"export: {folder} is not empty and nothing is overwritten; accepted: a new or empty folder")


def prepare(
    encoder: Encoder, *, img_size: int | Sequence[int] | None = None, licence: str | None = None, source: str | None = None
) -> Encoder:
    """The same encoder on the CPU, in evaluation mode, without mask token, at another size or with other words on its card.

    Args:
        encoder: left as it is.
        img_size: height and width; learned positions are resampled as the encoder does for views of that size.
        licence: see `export_as`.
        source: see `export_as`.

    Raises:
        ValueError: the size does not fit the encoder.
    """
    words = {name: value for name, value in (("licence", licence), ("source", source)) if value is not None}
    card = replace(encoder.card, arguments={**encoder.card.arguments, **words})
    state = {name: tensor.detach().cpu() for name, tensor in encoder.backbone_state().items()}
    prepared = build(card).eval()
    prepared.load_backbone_state(state)
    if img_size is None:
        return prepared
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    shape = (card.item_shape[0], height, width)
    prepared.grid(shape)
    if isinstance(prepared, ViT) and "pos_embed" in state:
        state["pos_embed"] = _positions(prepared, shape)
    resized = build(replace(card, arguments={**card.arguments, "img_size": [height, width]})).eval()
    resized.load_backbone_state(state)
    return resized


def _positions(encoder: ViT, shape: tuple[int, int, int]) -> Tensor:
    """`pos_embed` for items of another shape: what the encoder itself adds to them, Float[1 M D]."""
    old, (rows, columns) = encoder.model.pos_embed, encoder.grid(shape)
    count = old.shape[1] - math.prod(encoder.grid(encoder.card.item_shape))
    with torch.no_grad():
        # Tokens of zeros come out as the positions alone.
        tokens, _ = encoder._add_positions(old.new_zeros(1, rows, columns, encoder.embed_dim))
    return torch.cat((old[:, :count], tokens[:, encoder.num_prefix_tokens :]), dim=1)


def check_images(encoder: Encoder) -> Iterator[Tensor]:
    """Float[B C H W] at the encoder's size for several B, by a formula, in the range of normalised pixels."""
    for count in _CHECK_BATCHES:
        shape = (count, *encoder.card.item_shape)
        yield torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def difference(output: EncoderOutput, expected: EncoderOutput) -> float:
    """Maximum absolute difference over cls and patches."""
    return max(
        (output.cls - expected.cls).abs().max().item(),
        (output.patches - expected.patches).abs().max().item(),
    )


def write_card(encoder: Encoder, folder: Path) -> None:
    """Put card.json beside the file."""
    (folder / CARD).write_text(json.dumps(encoder.card.to_json(), indent=2) + "\n")


def write_timm(encoder: Encoder, folder: Path) -> Written:
    """Our own folder: weights under timm's names, the card, and the config.json with which timm's `local-dir:` opens it."""
    again = load_backbone(export(encoder, folder))
    with torch.no_grad():
        worst = max(difference(again(images), encoder(images)) for images in check_images(encoder))
    return Written(folder, worst)
