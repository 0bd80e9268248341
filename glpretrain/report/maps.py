"""What an encoder makes of one picture, as tensors: its patches, their similarities and main directions, and its attention.

Size, normalisation and similarity are those of prompt segmentation in `glpretrain.evaluate`: a picture shows what a score measured.
Drawing them is left out (`figures`, `page`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn import functional

from glpretrain import modalities
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.arrays import levels_of
from glpretrain.data.sources.images.decoding import decode
from glpretrain.encoders import Encoder, build
from glpretrain.encoders.attention import cls_attention_of_blocks

# A file, or UInt8[C H W].
Picture = str | Path | Tensor
# Blocks, counted from 0, or from the last in negative numbers.
Layers = Literal["all", "last"] | Sequence[int]
# Side of a square, or height and width, or number of points; None is the card's.
Size = int | tuple[int, int] | None
_PROMPTS, _BINS = 256, 512  # patches of an item whose cosines with all others count, bars of the histogram that is divided
_SAME, _MIDDLE = 1e-6, 0.5  # cosines that differ by less are the same; the threshold where all are


class Seen(NamedTuple):
    """One picture as an encoder sees it."""

    pixels: Tensor  # UInt8[C H W]  stretched to the encoder's size
    items: Tensor  # Float[1 C H W]  normalised, on the encoder's device
    patches: Tensor  # Float[N D]  after the final norm, on the CPU
    grid: tuple[int, int]  # rows and columns of the N patches


def look(encoder: Encoder, image: Picture, *, size: Size = None) -> Seen:
    """Stretch a picture to the size of the encoder, normalise and encode it.

    Args:
        encoder: an encoder in evaluation mode, for grey or RGB images.
        image: a picture: a file, or UInt8[C H W].
        size: side of the square, or height and width, that the picture is stretched to; None is the card's.

    Raises:
        ValueError: the picture cannot be read, or does not fit the encoder, or the size does not divide into patches.
    """
    shape, modality = shape_of(encoder, size), modalities.get(encoder.card.modality)
    if encoder.training:
        raise ValueError("inspect: the encoder is in training mode; call eval() first")
    item = Item(read(image, card=encoder.card), label=-1, instances=None, regions=None)
    pixels = modality.resize(item, shape, fit="stretch").values  # [C H W]
    items = modality.normalise(pixels[None].to(next(encoder.parameters()).device), encoder.card)  # [1 C H W]
    with torch.no_grad():
        patches = encoder(items).patches[0].float().cpu()  # [N D]
    if not patches.isfinite().all():
        raise ValueError("inspect: the encoder's patch features are not finite; nothing can be drawn from them")
    rows, columns = encoder.grid(items.shape[1:])
    return Seen(pixels, items, patches, (rows, columns))


def shape_of(encoder: Encoder, size: Size) -> tuple[int, int, int]:
    """Channels, height and width of what the encoder is shown.

    Raises:
        ValueError: the encoder is not for grey or RGB images, or the size does not divide into its patches.
    """
    card = encoder.card
    if len(card.item_shape) != 3 or card.item_shape[0] not in (1, 3):
        raise ValueError(f"inspect: the backbone takes {card.modality} of {card.item_shape[0]} channels; accepted: image of 1 or 3")
    channels, height, width = modalities.get(card.modality).item_shape(card, size)
    encoder.grid((channels, height, width))
    return channels, height, width


def read(image: Picture, *, card: EncoderCard) -> Tensor:
    """UInt8[C H W]: a file's picture in grey or RGB, as the card says, turned as its EXIF data say; a tensor is only checked.

    Raises:
        ValueError: the file cannot be read as an image, or the tensor is no such picture.
    """
    channels = card.item_shape[0]
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != channels:
            raise ValueError(f"inspect: image is {image.dtype} of shape {tuple(image.shape)}; accepted: uint8 of ({channels}, H, W)")
        return image.cpu()
    try:
        return decode(Path(image), channels=channels, levels=levels_of(card.value_range or None, channels=channels, owner="inspect"))
    except UnreadableItemError as error:
        raise ValueError(f"inspect: {image} cannot be read as an image: {error}") from error


def similarity_map(seen: Seen, *, patch: tuple[int, int]) -> Tensor:
    """Cosine of every patch with the prompt, upsampled bilinearly to pixels.

    Args:
        seen: a picture and its patches.
        patch: row and column of the prompt.

    Returns:
        Float[H W]; a segment is where it exceeds a threshold.

    Raises:
        ValueError: there is no such patch.
    """
    (rows, columns), (row, column) = seen.grid, patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"inspect: patch={patch}; accepted: rows 0 to {rows - 1}, columns 0 to {columns - 1}")
    unit = functional.normalize(seen.patches, dim=-1)  # [N D]
    cosines = (unit @ unit[row * columns + column]).unflatten(0, seen.grid)  # [h w]
    return functional.interpolate(cosines[None, None], size=seen.pixels.shape[1:], mode="bilinear", align_corners=False)[0, 0]


def own_threshold(patches: Sequence[Tensor]) -> float:
    """A threshold for prompts that needs no masks: it divides the cosines of two patches of one item into similar and dissimilar ones.

    The parts are those of Otsu's method, which makes the variance between them as large as it can be, and the threshold lies midway between
    their means. Similarities of a backbone may all lie between 0.8 and 1, so that no number fits every backbone.

    Args:
        patches: Float[N D] of each item.

    Returns:
        A number from -1 to 1; 0.5 where all cosines are the same, or no item has two patches.
    """
    found: list[Tensor] = []
    for one in patches:
        chosen = one[torch.arange(min(len(one), _PROMPTS)) * len(one) // min(len(one), _PROMPTS)]  # evenly spaced prompts
        found.append((functional.normalize(chosen.float(), dim=-1) @ functional.normalize(one.float(), dim=-1).T).flatten())
    cosines = torch.cat(found).clamp(-1, 1) if found else torch.empty(0)
    if cosines.numel() < 2 or cosines.max() - cosines.min() < _SAME:
        return _MIDDLE
    above = cosines > float(threshold_otsu(cosines.numpy(), nbins=_BINS))
    return round((cosines[above].mean() + cosines[~above].mean()).item() / 2, 3)


def patch_pca(seen: Seen) -> Tensor:
    """Float[h w 3] in [0, 1]: the first three principal components of the patches as red, green and blue."""
    centred = seen.patches - seen.patches.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    # The sign of a component is arbitrary: make its largest entry positive, so that two runs give one picture.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    components = centred @ (directions * largest.sign())[:3].T  # [N 3]
    components = functional.pad(components, (0, 3 - components.shape[1]))  # fewer than three patches
    low, high = components.amin(dim=0), components.amax(dim=0)
    return ((components - low) / (high - low).clamp(min=1e-12)).unflatten(0, seen.grid)  # [h w 3]


def attention(encoder: Encoder, seen: Seen, *, layers: Layers = "last") -> Tensor:
    """Float[L heads h w]: how much the class token attends to every patch, in the blocks of `layers`.

    Raises:
        ValueError: there is no such block, or the encoder has no such attention.
    """
    return cls_attention_of_blocks(encoder, seen.items, blocks=layer_numbers(encoder, layers))[:, 0].cpu()  # [L heads h w]


def layer_numbers(encoder: Encoder, layers: Layers) -> list[int]:
    """Blocks counted from 0, in the order asked for.

    Raises:
        ValueError: `layers` is empty, or names a block twice or one that there is not.
    """
    depth = encoder.num_layers
    if isinstance(layers, str) and layers not in ("all", "last"):
        raise ValueError(f"inspect: layers={layers!r}; accepted: all, last, or numbers from {-depth} to {depth - 1}")
    asked = range(depth) if layers == "all" else (-1,) if layers == "last" else layers
    if any(not -depth <= number < depth for number in asked):
        raise ValueError(f"inspect: layers={list(asked)}; accepted: {-depth} to {depth - 1}")
    numbers = [number % depth for number in asked]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"inspect: layers={list(asked)} is empty or names a block twice; accepted: {-depth} to {depth - 1}, each once")
    return numbers


def untrained(encoder: Encoder, *, seed: int = 0) -> Encoder:
    """The same architecture with fresh weights, in evaluation mode: what there was before training."""
    arguments = {**encoder.card.arguments, "source": f"random weights, seed {seed}"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(replace(encoder.card, arguments=arguments)).eval()
