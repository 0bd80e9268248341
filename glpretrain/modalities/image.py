"""Images: UInt8[C H W] in files, Float[C H W] for an encoder."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.core.patches import inputs_of_patches
from glpretrain.core.types import EncoderCard, Item
from glpretrain.modalities.base import Fit, Modality, Size

_RESIZED, _CUT = 256, 224  # short side before and after an inner crop: eval_knn.py of DINO, and most evaluations on ImageNet
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
        *("glpretrain.data.DicomFolder", "glpretrain.data.ImageFolder"),
    )
    held = ("glpretrain.data.sources.images.held.pictures", "glpretrain.data.sources.images.held.picture_values")
    masked_source = "glpretrain.data.MaskedFolder"
    default_evaluators: ClassVar[dict[str, str]] = {
        "knn": "glpretrain.evaluate.KNN",
        "linear": "glpretrain.evaluate.LinearProbe",
        "prompt": "glpretrain.evaluate.PromptSegmentation",
    }
    unlabelled_evaluators: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"health": "glpretrain.evaluate.Health", "agreement": "glpretrain.evaluate.Agreement"}
    )
    page = "glpretrain.report.write_report"
    tuning = ()
    page_data = "glpretrain.report.image_page.image_data"

    def item_shape(self, card: EncoderCard, size: Size | None) -> tuple[int, ...]:
        """Channels, height and width; one number is the side of a square."""
        channels, *own = card.item_shape
        if size is None:
            return channels, *own
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"size: {size} given; an image has a height and a width; give one positive number, or two")
        return channels, *sides

    def resize(self, item: Item, shape: Sequence[int], *, fit: Fit) -> Item:
        """Bicubic with antialiasing; masks by the nearest pixel. `inner_crop` is what torchvision's Resize and CenterCrop make of a picture
        of PIL, to the last bit: 256 and 224 for a size of 224, in this proportion for others."""
        channels, *size = shape
        if item.values.dim() != 3:
            raise ValueError(f"an item of shape {tuple(item.values.shape)} is no image; the encoder needs images (C H W)")
        if item.values.shape[0] != channels:
            raise ValueError(f"an image has {item.values.shape[0]} channels; the encoder needs {channels}")
        height, width = item.values.shape[1:]
        inner, corner = (size[0], size[1]), (0, 0)
        if fit == "crop":
            scale = max(size[0] / height, size[1] / width)
            inner = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
            corner = ((inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2)
        elif fit == "inner_crop":
            inner = _around([side * _RESIZED // _CUT for side in size], (height, width))
            corner = (round((inner[0] - size[0]) / 2), round((inner[1] - size[1]) / 2))
        image, masks = item.values, {"instances": item.instances, "semantic": item.semantic}
        if inner != (height, width):
            image = _resized(image, inner, exactly=fit == "inner_crop")
            masks = {name: None if mask is None else resized_ids(mask, inner) for name, mask in masks.items()}
        top, left = corner
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
        return inputs_of_patches(tokens, size=views.shape[2:], grid=grid)

    def pictures(self, views: Tensor, *, card: EncoderCard, dimmed: Tensor | None = None) -> Tensor:
        """The first three channels as colours; grey where there are fewer."""
        mean, std = _statistics(card, views)
        picture = (views.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu()  # [B H W C]
        picture = picture[..., :3] if picture.shape[-1] >= 3 else picture[..., :1].expand(*picture.shape[:-1], 3)
        return picture if dimmed is None else torch.where(dimmed.cpu()[..., None], picture * DIMMED, picture)

    def thumbnail(self, item: Item, *, card: EncoderCard, side: int) -> Tensor:
        """In the proportions of the image, and never larger than it is."""
        height, width = item.values.shape[1:]
        scale = min(1.0, side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = item.values if size == (height, width) else _resized(item.values, size, exactly=False)
        colours = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
        return (colours.float() / 255).permute(1, 2, 0)  # [h w 3]

    def describe_size(self, card: EncoderCard) -> str:
        """Height and width, as in 224x224."""
        return "x".join(map(str, card.item_shape[1:]))


def _statistics(card: EncoderCard, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, Float[C 1 1] each, on the device of `like`."""
    return (
        torch.tensor(card.mean, device=like.device)[:, None, None],
        torch.tensor(card.std, device=like.device)[:, None, None],
    )


def _around(target: Sequence[int], sides: tuple[int, int]) -> tuple[int, int]:
    """The size with the proportions of `sides` that covers `target`, rounded down as torchvision does."""
    binding = 0 if target[0] * sides[1] >= target[1] * sides[0] else 1
    other = 1 - binding
    inner = {binding: target[binding], other: max(target[other], int(target[binding] * sides[other] / sides[binding]))}
    return inner[0], inner[1]


def _resized(image: Tensor, size: tuple[int, int], *, exactly: bool) -> Tensor:
    """UInt8[C H W] to UInt8[C *size]; torch differs from Pillow by up to two levels in one pixel of two hundred."""
    if not exactly:
        return functional.interpolate(image.unsqueeze(0), size=size, mode="bicubic", antialias=True)[0]
    height, width = size
    planes = [PIL.Image.fromarray(plane.numpy()).resize((width, height), PIL.Image.Resampling.BICUBIC) for plane in image]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))


def resized_ids(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Int[H W] to Int[*size]: ids cannot be averaged. Float64 holds every id that a mask file can hold."""
    return functional.interpolate(mask[None, None].double(), size=size, mode="nearest-exact")[0, 0].long()
