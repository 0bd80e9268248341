"""A small backbone and a small folder of images for the tests of features."""

from pathlib import Path

import numpy as np
import torch
from image_files import write_map

from glpretrain.encoders import ViT
from glpretrain.weights import export

COUNT = 23


def encoder() -> ViT:
    """A ViT of 32 pixels with weights from a formula."""
    made = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, licence="none", source="a test")
    with torch.no_grad():
        for number, (name, parameter) in enumerate(made.named_parameters()):
            if parameter.dim() == 1 or name.endswith(("pos_embed", "cls_token")):  # what all pictures share would make them alike
                parameter.fill_(float(name.endswith("weight")))
                continue
            parameter.copy_(0.3 * torch.sin(torch.arange(parameter.numel()) * 0.7 + number).view_as(parameter))
    return made.eval()


def backbone(folder: Path) -> Path:
    """The same in a folder."""
    return export(encoder(), folder)


def picture(number: int, size: tuple[int, int] = (40, 52)) -> np.ndarray:
    """UInt8[H W 3], another one for every number."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(rows * (0.1 + 0.03 * number) + channel) * np.cos(columns * 0.11 * (channel + 1) + number) for channel in range(3)]
    return (127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)


def write_photos(folder: Path, *, count: int = COUNT) -> Path:
    """Images in class folders, of two shapes."""
    for number in range(count):
        write_map(folder / "ab"[number % 2] / f"{number:02d}.png", picture(number, (40, 52) if number % 3 else (64, 36)))
    return folder
