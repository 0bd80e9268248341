"""`Scenes`: photographs' textures cut into shapes, on a textured ground. Any number, any size, nothing to download.

Each scene is a pure function of (seed, split, index). A class is one silhouette filled with one photograph's texture. Place,
size, turn, colour, contrast, light and ground are drawn apart from the class, so a colour histogram says little about it. The
textures are crops of photographs that scikit-image carries in its wheel; `train` and `test` cut theirs from disjoint parts.

Left out: occlusion of the labelled object beyond its rim, perspective, and everything else that a real photograph has.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import skimage.data
import torch

from glpretrain import keys
from glpretrain.data.base import Item, Source, checked_index

_MAX_OBJECTS = 3
_DRAWS = 16  # per object and for the scene
_TRAIN_SHARE = 0.62  # of a photograph's width; `test` takes what is right of it after a gap
_GAP = 0.03

# A silhouette is its radius in every direction, as a function of the angle, with a largest value of 1.
_Radius = Callable[[np.ndarray], np.ndarray]


def _polygon(corners: int) -> _Radius:
    step = 2 * np.pi / corners
    return lambda angle: np.cos(step / 2) / np.cos(np.mod(angle, step) - step / 2)


def _waves(count: int, depth: float) -> _Radius:
    return lambda angle: (1 - depth) + depth * np.cos(count * angle)


def _star(points: int, inner: float) -> _Radius:
    step = 2 * np.pi / points
    return lambda angle: inner + (1 - inner) * np.abs(np.mod(angle, step) / step * 2 - 1) ** 1.5


def _ellipse(ratio: float) -> _Radius:
    return lambda angle: ratio / np.sqrt((ratio * np.cos(angle)) ** 2 + np.sin(angle) ** 2)


def _bar(ratio: float) -> _Radius:
    def radius(angle: np.ndarray) -> np.ndarray:
        across, along = np.maximum(np.abs(np.cos(angle)), 1e-3), np.maximum(np.abs(np.sin(angle)), 1e-3)
        return np.minimum(1 / across, ratio / along) / np.hypot(1, ratio)

    return radius


# class name: (photograph, silhouette, photograph's pixels that a unit of the scene shows)
_CLASSES: dict[str, tuple[Callable[[], np.ndarray], _Radius, float]] = {
    "brick disc": (skimage.data.brick, _ellipse(1.0), 220.0),
    "grass triangle": (skimage.data.grass, _polygon(3), 150.0),
    "gravel square": (skimage.data.gravel, _polygon(4), 220.0),
    "coins bar": (skimage.data.coins, _bar(0.4), 160.0),
    "stars star": (skimage.data.hubble_deep_field, _star(5, 0.4), 220.0),
    "tissue flower": (skimage.data.immunohistochemistry, _waves(5, 0.2), 200.0),
    "print bar": (skimage.data.page, _bar(0.7), 120.0),
    "script ellipse": (skimage.data.text, _ellipse(0.5), 150.0),
    "fur pentagon": (skimage.data.chelsea, _polygon(5), 150.0),
    "suit clover": (skimage.data.astronaut, _waves(3, 0.3), 220.0),
    "checker cross": (skimage.data.checkerboard, _star(4, 0.35), 130.0),
    "cup burst": (skimage.data.coffee, _waves(8, 0.15), 220.0),
}
_GROUNDS: tuple[Callable[[], np.ndarray], ...] = (
    skimage.data.moon,
    skimage.data.camera,
    skimage.data.retina,
    skimage.data.cell,
    skimage.data.rocket,
    skimage.data.grass,
    skimage.data.gravel,
)
_GROUND_UNIT = 200.0
CLASSES = tuple(_CLASSES)


def _halved(photo: np.ndarray) -> np.ndarray:
    height, width = photo.shape[0] // 2 * 2, photo.shape[1] // 2 * 2
    return photo[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3), dtype=np.float32)


@cache
def _pyramid(load: Callable[[], np.ndarray], split: str) -> list[np.ndarray]:
    """Float[h w 3] of one photograph's part for `split`, standardised, at full, half, quarter ... size (against aliasing)."""
    photo = load()
    photo = np.repeat(photo[..., None], 3, axis=-1) if photo.ndim == 2 else photo[..., :3]
    width = photo.shape[1]
    part = photo[:, : int(width * _TRAIN_SHARE)] if split == "train" else photo[:, int(width * (_TRAIN_SHARE + _GAP)) :]
    part = part.astype(np.float32)
    part = (part - part.mean(axis=(0, 1))) / part.std()
    levels = [part]
    while min(levels[-1].shape[:2]) >= 32:
        levels.append(_halved(levels[-1]))
    return levels


def _mirrored(position: np.ndarray, length: int) -> np.ndarray:
    """Index into range(length) for any position: beyond the edge the photograph goes on as its mirror image."""
    position = position.astype(np.int32) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)


def _texture(levels: list[np.ndarray], rows: np.ndarray, columns: np.ndarray, *, step: float) -> np.ndarray:
    """Float[*S 3]: colours at positions given in pixels of the full photograph, `step` of which lie between two samples."""
    level = min(max(int(np.round(np.log2(max(step, 1.0)))), 0), len(levels) - 1)
    photo = levels[level]
    return photo[_mirrored(rows / 2**level, photo.shape[0]), _mirrored(columns / 2**level, photo.shape[1])]


class Scenes(Source):
    """One to three textured objects on a textured ground. The label is that of the largest object.

    Args:
        length: number of scenes.
        size: of a scene, a side or (height, width).
        split: `train` and `test` share classes but no part of any photograph's texture.
        seed: of all scenes.

    Raises:
        ValueError: `length` or `size` is too small.
    """

    def __init__(self, length: int, *, size: int | tuple[int, int] = 64, split: Literal["train", "test"] = "train", seed: int = 0) -> None:
        self.length = length
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.split = split
        self.seed = seed
        if length < 1:
            raise ValueError(f"Scenes: length is {length}; expected at least 1")
        if min(self.size) < 16:
            raise ValueError(f"Scenes: size is {size}; expected at least 16 pixels a side")

    @property
    def name(self) -> str:
        return "scenes"

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES

    @property
    def has_masks(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.length

    def division(self) -> tuple[Source, Source]:
        train = Scenes(min(self.length, 2400), size=self.size, split="train", seed=self.seed)
        return train, Scenes(1200, size=self.size, split="test", seed=self.seed)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, self.length)
        key = keys.make(seed=self.seed, epoch=("train", "test").index(self.split), index=torch.tensor(index))
        draws = keys.uniform(key, _MAX_OBJECTS + 1, _DRAWS).numpy()
        pixels, instances, label = _render(draws, self.size, self.split)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # [C H W]
        return Item(image=image, label=label, instances=torch.from_numpy(instances), regions=None)


def _render(draws: np.ndarray, size: tuple[int, int], split: str) -> tuple[np.ndarray, np.ndarray, int]:
    height, width = size
    unit = min(height, width)  # pixels per unit of the scene: its shorter side
    scene = draws[0]
    y, x = np.mgrid[:height, :width].astype(np.float32)

    ground = _GROUNDS[int(scene[0] * len(_GROUNDS))]
    base = 0.25 + 0.5 * scene[1:4]
    pixels = _painted(
        _pyramid(ground, split), y, x, unit=unit, shown=_GROUND_UNIT, draws=scene[4:9], base=base, contrast=0.06 + 0.05 * scene[9]
    )
    instances = np.zeros(size, dtype=np.int64)

    # The main object comes last, so nothing covers it; the others are smaller.
    count = 1 + int(scene[10] * _MAX_OBJECTS)
    label = -1
    for number in range(count):
        draw = draws[1 + number]
        main = number == count - 1
        label = int(draw[0] * len(CLASSES))
        load, silhouette, shown = _CLASSES[CLASSES[label]]
        radius = (0.28 + 0.14 * draw[1] if main else 0.12 + 0.08 * draw[1]) * unit
        margin = 0.7 * radius
        row, column = margin + draw[2] * (height - 2 * margin), margin + draw[3] * (width - 2 * margin)
        box = np.s_[max(int(row - radius) - 1, 0) : int(row + radius) + 2, max(int(column - radius) - 1, 0) : int(column + radius) + 2]
        dy, dx = y[box] - row, x[box] - column
        turn = 2 * np.pi * draw[4]
        inside = radius * silhouette(np.arctan2(dy, dx) + turn) - np.hypot(dy, dx)  # pixels to the rim, roughly
        alpha = np.clip(inside + 0.5, 0.0, 1.0)[..., None]
        # Away from the ground's colour by at least 0.25 in one direction of colour, so the object shows.
        direction = draw[5:8] - 0.5
        direction = direction / max(float(np.abs(direction).max()), 1e-3)
        colour = np.clip(base + direction * (0.2 + 0.15 * draw[8]), 0.1, 0.9)
        painted = _painted(
            _pyramid(load, split), dy, dx, unit=unit, shown=shown, draws=draw[9:14], base=colour, contrast=0.14 + 0.1 * draw[14], turn=turn
        )
        pixels[box] += alpha * (painted - pixels[box])
        instances[box][inside > 0] = number + 1

    # Light falls off along one direction of the scene.
    angle = 2 * np.pi * scene[11]
    slope = (np.cos(angle) * (x - width / 2) + np.sin(angle) * (y - height / 2)) / unit
    pixels *= (0.85 + 0.3 * scene[12] + 0.4 * scene[13] * slope)[..., None]
    return (np.clip(pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), instances, label


def _painted(
    levels: list[np.ndarray],
    dy: np.ndarray,
    dx: np.ndarray,
    *,
    unit: int,
    shown: float,
    draws: np.ndarray,
    base: np.ndarray,
    contrast: float,
    turn: float | None = None,
) -> np.ndarray:
    """Float[*S 3]: a randomly placed, turned and scaled crop of a texture around the colour `base`."""
    place_y, place_x, zoom, spin, chroma = (float(draw) for draw in draws)
    turn = 2 * np.pi * spin if turn is None else turn
    step = shown / unit * 2.0 ** (zoom - 0.5)
    sine, cosine = step * np.sin(turn), step * np.cos(turn)
    height, width = levels[0].shape[:2]
    texture = _texture(levels, place_y * height + cosine * dy - sine * dx, place_x * width + sine * dy + cosine * dx, step=step)
    grey = texture.mean(axis=-1, keepdims=True)
    return base.astype(np.float32) + np.float32(contrast) * (grey + np.float32(chroma) * (texture - grey))
