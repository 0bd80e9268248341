"""Two pictures of what an encoder sees in an image: where the class token looks, and the main directions of its patches.

Left out: similarity maps and reports.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from glpretrain.encoders import Encoder, ViT
from glpretrain.encoders.attention import cls_attention


def draw(encoder: Encoder, images: Sequence[Path], *, out: Path) -> list[Path]:
    """Write `<name>.png` for each image: the image, its patches' PCA and, for a ViT with a class token, the last block's attention.

    Args:
        encoder: in evaluation mode, for grey or RGB images.
        images: files; stretched to the encoder's item shape.
        out: folder; made where it is missing, nothing in it is overwritten.

    Returns:
        The files written.

    Raises:
        ValueError: an image cannot be read, or a picture exists already.
    """
    channels, height, width = encoder.card.item_shape
    if channels not in (1, 3):
        raise ValueError(f"inspect: the backbone takes {channels} channels; accepted: 1 or 3")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for image in images:
        path = out / f"{image.stem}.png"
        if path.exists():
            raise ValueError(f"inspect: {path} exists and nothing is overwritten; choose another --out")
        pixels = resize(_read(image, channels), [height, width], antialias=True) / 255.0  # [C H W]
        mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.card.mean, encoder.card.std))
        items = ((pixels - mean) / std).unsqueeze(0)  # [1 C H W]
        pictures = {"image": pixels.permute(1, 2, 0).expand(-1, -1, 3), "patch PCA": patch_pca(encoder, items)}
        if isinstance(encoder, ViT) and encoder.model.cls_token is not None:
            for head, attention in enumerate(cls_attention(encoder, items)[0]):
                pictures[f"head {head + 1}"] = attention
        _save(pictures, path)
        written.append(path)
    return written


def patch_pca(encoder: Encoder, items: Tensor) -> Tensor:
    """Float[h w 3] in [0, 1]: the first three principal components of one item's patches as red, green and blue.

    Args:
        encoder: in evaluation mode.
        items: Float[1 C H W], normalised.
    """
    with torch.no_grad():
        patches = encoder(items).patches[0].float()  # [N D]
    centred = patches - patches.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    # The sign of a component is arbitrary: make its largest entry positive, so that two runs give one picture.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    components = centred @ (directions * largest.sign())[:3].T  # [N 3]
    low, high = components.amin(dim=0), components.amax(dim=0)
    return ((components - low) / (high - low).clamp(min=1e-12)).unflatten(0, encoder.grid(items.shape[1:]))  # [h w 3]


def _read(path: Path, channels: int) -> Tensor:
    """UInt8[C H W]."""
    try:
        with Image.open(path) as image:
            array = np.array(ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is how PIL names a broken header
        raise ValueError(f"inspect: {path} cannot be read as an image: {error}") from error
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)  # [C H W]


def _save(pictures: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(2.0 * len(pictures), 2.3), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, picture) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        axis.imshow(picture.numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
