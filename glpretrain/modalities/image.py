"""Images: UInt8[C H W] in files, Float[C H W] for an encoder."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.core.types import EncoderCard, Item
from glpretrain.modalities.base import Modality, Size

DIMMED = 0.2  # what is left of the brightness of a hidden input


class Image(Modality):
    """Images of any number of channels."""

    name = "image"
    axes = ("C", "H", "W")
    num_coordinates = 2
    channel_axis = 0
    embedded_source = "glpretrain.data.Scenes"
    embedded_size = "size"
    own_sources = (
        *("glpretrain.data.TileFolder", "glpretrain.data.Faces", "glpretrain.data.TarShards", "glpretrain.data.ImageList"),
        "glpretrain.data.ImageFolder",
    )
    held = ("glpretrain.data.sources.images.held.pictures", "glpretrain.data.sources.images.held.picture_values")
    masked_source = "glpretrain.data.MaskedFolder"
    default_evaluators: ClassVar[dict[str, str]] = {
        "knn": "glpretrain.evaluate.KNN",
        "linear": "glpretrain.evaluate.LinearProbe",
        "prompt": "glpretrain.evaluate.PromptSegmentation",
    }
    page = "glpretrain.report.write_report"

    def item_shape(self, card: EncoderCard, size: Size | None) -> tuple[int, ...]:
        """Channels, height and width; one number is the side of a square."""
        channels, *own = card.item_shape
        if size is None:
            return channels, *own
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"size: {size} given; an image has a height and a width; give one positive number, or two")
        return channels, *sides

    def resize(self, item: Item, shape: Sequence[int], *, fit: Literal["crop", "stretch"]) -> Item:
        """Bicubic with antialiasing; masks by the nearest pixel."""
        channels, *size = shape
        if item.values.dim() != 3:
            raise ValueError(f"an item of shape {tuple(item.values.shape)} is no image; the encoder needs images (C H W)")
        if item.values.shape[0] != channels:
            raise ValueError(f"an image has {item.values.shape[0]} channels; the encoder needs {channels}")
        height, width = item.values.shape[1:]
        inner = tuple(size)
        if fit == "crop":
            scale = max(size[0] / height, size[1] / width)
            inner = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        image, masks = item.values, {"instances": item.instances, "semantic": item.semantic}
        if inner != (height, width):
            image = functional.interpolate(image.unsqueeze(0), size=inner, mode="bicubic", antialias=True)[0]
            masks = {name: None if mask is None else _resized_ids(mask, inner) for name, mask in masks.items()}
        top, left = (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2
        window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
        cut = {name: None if mask is None else mask[window].clone() for name, mask in masks.items()}
        values = image[window].clone(memory_format=torch.contiguous_format)  # decoders leave the channels last
        return item._replace(values=values, instances=cut["instances"], semantic=cut["semantic"])

    def normalise(self, items: Tensor, card: EncoderCard) -> Tensor:
        """(image / 255 - mean) / std."""
        mean, std = _statistics(card, items)
        return (items.float() / 255 - mean) / std

    def inputs_of_tokens(self, tokens: Tensor, views: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        """Every pixel belongs to the token of its patch."""
        height, width = (side // count for side, count in zip(views.shape[2:], grid, strict=True))
        return tokens.unflatten(1, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)  # [B H W]

    def pictures(self, views: Tensor, *, card: EncoderCard, dimmed: Tensor | None = None) -> Tensor:
        """The first three channels as colours; grey where there are fewer."""
        mean, std = _statistics(card, views)
        picture = (views.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu()  # [B H W C]
        picture = picture[..., :3] if picture.shape[-1] >= 3 else picture[..., :1].expand(*picture.shape[:-1], 3)
        return picture if dimmed is None else torch.where(dimmed.cpu()[..., None], picture * DIMMED, picture)

    def describe_size(self, card: EncoderCard) -> str:
        """Height and width, as in 224x224."""
        return "x".join(map(str, card.item_shape[1:]))


def _statistics(card: EncoderCard, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, Float[C 1 1] each, on the device of `like`."""
    return (
        torch.tensor(card.mean, device=like.device)[:, None, None],
        torch.tensor(card.std, device=like.device)[:, None, None],
    )


def _resized_ids(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Int[H W] to Int[*size]: ids cannot be averaged. Float64 holds every id that a mask file can hold."""
    return functional.interpolate(mask[None, None].double(), size=size, mode="nearest-exact")[0, 0].long()
