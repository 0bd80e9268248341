"""From a sound to what a fine-tuned model takes: the middle stretch of it as a normalised log-mel filterbank.

Left out: pictures (`transforms`), clouds (`cloud_transform`), augmentation (`sounds`), and what is learned.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.types import Item
from glpretrain.data.sources.audio import AudioFolder
from glpretrain.data.sources.audio.decoding import decode

_LARGEST_SIDE = 65_536


@dataclass(frozen=True)
class SoundTransform:
    """What is done to a sound before a fine-tuned model sees it. Silence follows one that is too short.

    Args:
        frames: number of frames of what the model takes, 10 ms apart.
        bins: number of bins.
        mean: mean of the filterbank.
        std: standard deviation of the filterbank.
    """

    kind: ClassVar[str] = "sound"

    frames: int
    bins: int
    mean: float
    std: float

    def __call__(self, samples: np.ndarray | Tensor) -> Tensor:
        """Float[1 frames bins] of a sound at 16 kHz, Float[S] in [-1, 1]."""
        wave = torch.as_tensor(samples, dtype=torch.float32).unsqueeze(0)
        item = Item(wave, label=-1, instances=None, regions=None)
        values = modalities.get("audio").resize(item, self.item_shape, fit="crop").values
        return (values - self.mean) / self.std

    def read(self, path: Path) -> Tensor:
        """Float[1 frames bins] of the file of a sound.

        Raises:
            UnreadableItemError: the file cannot be decoded, or it is silent.
        """
        return self(decode(path))

    @staticmethod
    def files_in(folder: Path) -> Sequence[Path]:
        """The sounds below a folder."""
        return AudioFolder(folder, split="all").paths

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Channels, frames and bins of what the model takes."""
        return (1, self.frames, self.bins)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "SoundTransform":
        """Inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        fields = {"frames", "bins", "mean", "std"}
        if values.keys() != fields:
            raise ValueError(f"transform: accepted: an object with {', '.join(sorted(fields))}")
        sides, statistics = ([values[name] for name in names] for names in (("frames", "bins"), ("mean", "std")))
        counts = all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in sides)
        if not counts or not all(type(value) in (int, float) and abs(value) < 1e9 for value in statistics) or not values["std"] > 0:
            raise ValueError(f"transform: {values} has a value out of range")
        return cls(*sides, *map(float, statistics))
