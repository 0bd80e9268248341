"""`Scenes`: synthetic images of shapes that are filled with the textures of photographs, on a textured background.

Each scene is a pure function of (seed, split, index), in any number and size, and nothing is downloaded. A class is one silhouette
with the texture of one photograph and a typical colour, from which a random colour shift leads nearly as far away as from class to
class. Place, size, rotation, brightness, contrast, light and background are independent of the class. The textures are crops of the
photographs that scikit-image carries in its wheel; `train` and `test` crop disjoint parts of them.

Left out: occlusion of the labelled object beyond its rim, perspective, and everything else that a real photograph has.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import skimage.data
import torch

from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, Split, SyntheticSource, columns_of

_OBJECTS = (1, 1, 2, 2, 3)  # numbers of objects in a scene, equally likely
MAX_OBJECTS = max(_OBJECTS)
NUM_DRAWS = 16  # random numbers per object, and as many for the scene
_LEAST_SIDE = 16  # pixels
_NATURAL = 0.5  # share of a photograph's own mean colour that the background keeps
_TYPICAL_TINT, _RANDOM_TINT = 0.11, 0.08  # how far the class and chance move a colour

# A silhouette is given as its radius, a function of the angle whose largest value is 1.
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


def _retina() -> np.ndarray:
    return skimage.data.retina()[300:1100, 250:1150]  # inside its black rim


# class name: (photograph, silhouette, pixels of the photograph per unit of the scene). The photographs have the same texture everywhere.
_CLASSES: dict[str, tuple[Callable[[], np.ndarray], _Radius, float]] = {
    "brick disc": (skimage.data.brick, _ellipse(1.0), 130.0),
    "grass triangle": (skimage.data.grass, _polygon(3), 90.0),
    "gravel square": (skimage.data.gravel, _polygon(4), 130.0),
    "coins bar": (skimage.data.coins, _bar(0.5), 120.0),
    "galaxies star": (skimage.data.hubble_deep_field, _star(5, 0.4), 160.0),
    "tissue flower": (skimage.data.immunohistochemistry, _waves(5, 0.2), 130.0),
    "print ellipse": (skimage.data.page, _ellipse(0.55), 75.0),
    "fur pentagon": (skimage.data.chelsea, _polygon(5), 90.0),
    "checker clover": (skimage.data.checkerboard, _waves(3, 0.3), 80.0),
    "vessels burst": (_retina, _waves(8, 0.15), 300.0),
}
_BACKGROUNDS: tuple[Callable[[], np.ndarray], ...] = (
    skimage.data.moon,
    skimage.data.camera,
    skimage.data.cell,
    skimage.data.rocket,
    skimage.data.astronaut,
    skimage.data.coffee,
)
_BACKGROUND_SHOWN = 160.0  # pixels of the photograph per unit of the scene
CLASSES = tuple(_CLASSES)
# Places on the colour circle. 3 and the number of classes are coprime, so classes that are neighbours in the table differ in colour.
_TYPICAL_TINTS = [
    np.array([_TYPICAL_TINT * math.cos(2 * math.pi * (3 * label / len(CLASSES) - channel / 3)) for channel in range(3)], dtype=np.float32)
    for label in range(len(CLASSES))
]


class _Photo(NamedTuple):
    """The part of a photograph that one split may show."""

    levels: list[np.ndarray]  # Float[h w 3] each: standardised, at full, half, quarter ... size (against aliasing)
    tint: np.ndarray  # Float[3]  mean colour without its brightness


def _halved(photo: np.ndarray) -> np.ndarray:
    height, width = photo.shape[0] // 2 * 2, photo.shape[1] // 2 * 2
    return photo[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3), dtype=np.float32)


@cache
def _photo(load: Callable[[], np.ndarray], split: Split) -> _Photo:
    whole = load()
    whole = np.repeat(whole[..., None], 3, axis=-1) if whole.ndim == 2 else whole[..., :3]
    part = whole[:, columns_of(split, whole.shape[1])].astype(np.float32) / 255.0
    mean = part.mean(axis=(0, 1))
    levels = [(part - mean) / part.std()]
    while min(levels[-1].shape[:2]) >= 32:
        levels.append(_halved(levels[-1]))
    return _Photo(levels=levels, tint=mean - mean.mean())


@cache
def _coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y, x


def _mirrored(position: np.ndarray, length: int) -> np.ndarray:
    """Index into range(length) for any position: beyond its edge the photograph continues as its mirror image."""
    position = position.astype(np.int32) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)


def _painted(
    photo: _Photo, dy: np.ndarray, dx: np.ndarray, *, step: float, turn: float, place: Sequence[float], colour: np.ndarray, mix: np.ndarray
) -> np.ndarray:
    """Float[*S 3]: a crop of a texture around a colour.

    Args:
        photo: photograph with the texture.
        dy: Float[*S], vertical distance of each pixel from the centre of the crop.
        dx: Float[*S], horizontal distance.
        step: pixels of the full photograph between two pixels of the scene.
        turn: angle by which the texture is rotated.
        place: centre of the crop, as shares of the height and width of the photograph.
        colour: Float[3], mean colour.
        mix: Float[3 3], weights with which the channels of the texture are added to the colour.
    """
    level = min(max(round(math.log2(max(step, 1.0))), 0), len(photo.levels) - 1)
    texture = photo.levels[level]
    height, width = texture.shape[:2]
    sine, cosine = step / 2**level * math.sin(turn), step / 2**level * math.cos(turn)
    rows = _mirrored(place[0] * height + cosine * dy - sine * dx, height)
    columns = _mirrored(place[1] * width + sine * dy + cosine * dx, width)
    return texture.reshape(-1, 3)[rows * width + columns] @ mix + colour


def _mix(*, contrast: float, chroma: float) -> np.ndarray:
    """Float[3 3]: `contrast` times the texture, of whose colour only the share `chroma` is kept."""
    return np.float32(contrast) * (np.float32(chroma) * np.eye(3, dtype=np.float32) + np.float32((1 - chroma) / 3))


def height_and_width(size: int | tuple[int, int], *, owner: str) -> tuple[int, int]:
    """Height and width of a scene from a side or (height, width).

    Raises:
        ValueError: one of them is too small to show an object.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < _LEAST_SIDE:
        raise ValueError(f"{owner}: size is {size}; expected at least {_LEAST_SIDE} pixels per side")
    return height, width


class Scenes(SyntheticSource):
    """One to three textured objects on a textured background. The label is the class of the largest object.

    Args:
        length: number of scenes.
        size: size of a scene in pixels, one number for a square or (height, width).
        split: `train` and `test` have the same classes but share no part of any photograph.
        seed: seed of all scenes.

    Raises:
        ValueError: `length` or `size` is too small, or `split` is unknown.
    """

    name = "scenes"
    classes = CLASSES
    mask_classes = ("ground", *CLASSES)

    def __init__(self, length: int, *, size: int | tuple[int, int] = 64, split: Split = "train", seed: int = 0) -> None:
        super().__init__(length, split=split, seed=seed)
        self.size = height_and_width(size, owner="Scenes")

    def with_split(self, split: Split, *, length: int) -> Source:
        return Scenes(length, size=self.size, split=split, seed=self.seed)

    def __getitem__(self, index: int) -> Item:
        draws = keys.uniform(self.key(index), MAX_OBJECTS + 1, NUM_DRAWS).tolist()
        pixels, ids, labels = render(draws, self.size, self.split)
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # [C H W]
        instances = torch.from_numpy(ids)
        semantic = torch.tensor([0, *(label + 1 for label in labels)])[instances]  # [H W]
        return Item(values=image, label=labels[-1], instances=instances, regions=None, semantic=semantic)


def object_count(scene: Sequence[float]) -> int:
    """Number of objects in a scene.

    Args:
        scene: random numbers of the scene, as for `render`.
    """
    return _OBJECTS[int(scene[11] * len(_OBJECTS))]


class Pose(NamedTuple):
    """A change of the size and rotation that were drawn for an object."""

    scale: float = 1.0
    turn: float = 0.0  # radians by which silhouette and texture are rotated together


_AS_DRAWN = (Pose(),) * MAX_OBJECTS


def render(
    draws: Sequence[Sequence[float]], size: tuple[int, int], split: Split, *, poses: Sequence[Pose] = _AS_DRAWN
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Paint one scene.

    Args:
        draws: Float[1+MAX_OBJECTS NUM_DRAWS], random numbers in [0, 1): the first row is for the scene, the others are for the objects.
            The third and fourth number of an object are its place.
        size: height and width.
        split: split whose part of the photographs is used.
        poses: one pose per object.

    Returns:
        UInt8[H W 3], Int[H W] object ids from 1 on, and the class of each object, the largest object last.
    """
    height, width = size
    unit = min(height, width)  # one unit of the scene in pixels: its shorter side
    scene, *objects = draws
    y, x = _coordinates(height, width)

    background = _photo(_BACKGROUNDS[int(scene[0] * len(_BACKGROUNDS))], split)
    brightness = 0.3 + 0.4 * scene[1]
    pixels = _painted(
        background,
        y,
        x,
        step=_BACKGROUND_SHOWN / unit * 2.0 ** (scene[2] - 0.5),
        turn=2 * math.pi * scene[3],
        place=scene[4:6],
        colour=brightness + _NATURAL * background.tint + _random_tint(scene[6:9]),
        mix=_mix(contrast=0.12 + 0.06 * scene[9], chroma=scene[10]),
    )
    instances = np.zeros(size, dtype=np.int64)

    # The largest object is painted last, so that nothing covers it; the others are much smaller.
    count = object_count(scene)
    labels = [int(draw[0] * len(CLASSES)) for draw in objects[:count]]
    for number, draw in enumerate(objects[:count]):
        main = number == count - 1
        label, pose = labels[number], poses[number]
        load, silhouette, shown = _CLASSES[CLASSES[label]]
        photo = _photo(load, split)
        radius = (0.33 + 0.12 * draw[1] if main else 0.1 + 0.06 * draw[1]) * unit * pose.scale
        margin = 0.75 * radius
        row, column = margin + draw[2] * (height - 2 * margin), margin + draw[3] * (width - 2 * margin)
        box = np.s_[max(int(row - radius) - 1, 0) : int(row + radius) + 2, max(int(column - radius) - 1, 0) : int(column + radius) + 2]
        dy, dx = y[box] - row, x[box] - column
        turn = 2 * math.pi * draw[4]
        inside = radius * silhouette(np.arctan2(dy, dx) + turn - pose.turn) - np.hypot(dy, dx)  # pixels to the rim, roughly
        # At least 0.08 brighter or darker than the background; one number chooses how much, another one chooses which.
        offset = (0.08 + 0.12 * draw[5]) * (1 if draw[6] < 0.5 else -1)
        painted = _painted(
            photo,
            dy,
            dx,
            step=shown / unit * 2.0 ** (draw[7] - 0.5) / pose.scale,
            turn=turn + pose.turn,
            place=draw[8:10],
            colour=brightness + offset + _TYPICAL_TINTS[label] + _random_tint(draw[10:13]),
            mix=_mix(contrast=0.16 + 0.08 * draw[13], chroma=draw[14]),
        )
        pixels[box] += np.clip(inside + 0.5, 0.0, 1.0)[..., None] * (painted - pixels[box])
        instances[box][inside > 0] = number + 1

    # The light decreases along one direction of the scene.
    angle = 2 * math.pi * scene[12]
    slope = (math.cos(angle) * (x - width / 2) + math.sin(angle) * (y - height / 2)) / unit
    pixels *= (0.85 + 0.3 * scene[13] + 0.4 * scene[14] * slope)[..., None]
    return (np.clip(pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), instances, labels


def _random_tint(draws: Sequence[float]) -> np.ndarray:
    return _RANDOM_TINT * (2 * np.array(draws, dtype=np.float32) - 1)
