"""From a picture to what a fine-tuned model takes: timm's augmentation in training, and resize and centre crop everywhere else.

Every draw of an item is a function of its key, as it is in pretraining: timm and torchvision draw from the generators of Python, NumPy and
torch, which are set from the key and put back. Left out: clouds (`cloud_transform`), and what is learned.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, v2

from glpretrain.data.sources.images.arrays import levels_of
from glpretrain.data.sources.images.decoding import MOST_SIDE, decode, find_images
from glpretrain.data.sources.images.held import picture_values

Interpolation = Literal["bicubic", "bilinear"]
_SEEDS = 2**32


@contextmanager
def drawn_from(key: Tensor) -> Iterator[None]:
    """Inside this context the generators of Python, NumPy and torch (on the CPU) start from a key, Int[]; then they go on as before."""
    seed = int(key) % _SEEDS
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would set those of GPUs too
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def picture(values: Tensor) -> Image.Image:
    """A decoded image, UInt8[C H W] with one or three channels, as PIL has it.

    Raises:
        ValueError: it has another number of channels.
    """
    if len(values) not in (1, 3):
        raise ValueError(f"an image of {len(values)} channels given; fine-tuning accepts 1 or 3")
    pixels = values.permute(1, 2, 0).contiguous().numpy()  # [H W C]
    return Image.fromarray(pixels[..., 0] if len(values) == 1 else pixels)


@dataclass(frozen=True)
class Transform:
    """What is done to a picture before a fine-tuned model sees it: its short side is resized, the centre is cut, and values are normalised.

    Args:
        size: height and width of what the model takes.
        crop_pct: share of the resized short side that is kept: 0.875 resizes to 256 for 224. None keeps the whole picture, whose short side
            is resized to the size; the model sees it in windows.
        mean: mean per channel, of values in [0, 1].
        std: standard deviation per channel.
        interpolation: how pixels are interpolated.
        value_range: see `EncoderCard`.
    """

    kind: ClassVar[str] = "image"

    size: tuple[int, int]
    crop_pct: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    value_range: tuple[tuple[float, float], ...] = ()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Float[C H W] of a PIL image or of UInt8[C h w]; the long side of a whole picture stays longer."""
        if not isinstance(image, Tensor) and image.mode.startswith(("I", "F")):  # which `convert` would clip at 255
            image = picture_values(image, channels=len(self.mean), value_range=self.value_range)
        image = picture(image) if isinstance(image, Tensor) else image
        values = self._made()(image.convert("L" if len(self.mean) == 1 else "RGB"))
        assert isinstance(values, Tensor)
        return values

    def read(self, path: Path) -> Tensor:
        """Float[C H W] of a picture's file.

        Raises:
            UnreadableItemError: the file cannot be decoded.
        """
        return self(self.decoded(path, side=MOST_SIDE))

    def decoded(self, path: Path, *, side: int | None = None) -> Tensor:
        """UInt8[C h w] of a picture's file; arguments and errors as of `decoding.decode`."""
        levels = levels_of(self.value_range, channels=len(self.mean), owner="transform")
        return decode(path, channels=len(self.mean), side=side, levels=levels)

    @staticmethod
    def files_in(folder: Path) -> Sequence[Path]:
        """The images below a folder."""
        return find_images(folder)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Channels, height and width of what the model takes."""
        return (len(self.mean), *self.size)

    def _made(self) -> Compose | v2.Compose:
        """timm's evaluation transform, or torchvision's of a whole picture."""
        if self.crop_pct is None:
            resize = v2.Resize(min(self.size), interpolation=InterpolationMode(self.interpolation))
            to_float = v2.ToDtype(torch.float32, scale=True)
            return v2.Compose([resize, v2.ToImage(), to_float, v2.Normalize(list(self.mean), list(self.std)), v2.ToPureTensor()])
        size = self.size[0] if self.size[0] == self.size[1] else self.size
        made = create_transform(size, crop_pct=self.crop_pct, interpolation=self.interpolation, mean=self.mean, std=self.std)
        assert isinstance(made, Compose)
        return made

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        values: dict[str, object] = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if not self.value_range:
            del values["value_range"]  # as models were written before there were ranges
        return values

    @classmethod
    def from_json(cls, values: object) -> "Transform":
        """Inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown or no number.
        """
        fields = {"size", "crop_pct", "mean", "std", "interpolation"}
        if not isinstance(values, dict) or values.keys() - {"value_range"} != fields:
            raise ValueError(f"transform: accepted: an object with {', '.join(sorted(fields))}")
        try:
            height, width = (int(side) for side in values["size"])
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
            crop_pct = None if values["crop_pct"] is None else float(values["crop_pct"])
            ranges = tuple((float(low), float(high)) for low, high in values.get("value_range", ()))
            made = cls((height, width), crop_pct, mean, std, values["interpolation"], ranges)
        except (TypeError, ValueError) as error:
            raise ValueError(f"transform: {values} cannot be read: {error}") from error
        kept = 1.0 if crop_pct is None else crop_pct
        if not (min(height, width) > 0 and 0.0 < kept <= 1.0) or made.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"transform: {values} has a value out of range")
        return made
