"""Synthetic slides of any size, for tests and notebooks: pink tissue with violet nuclei on glass, some of it with crowded nuclei.

A slide is written tile by tile, so that the memory does not grow with its size. Left out: any realism beyond colours and density.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import tifffile
import torch
from scipy import ndimage

from glpretrain.core import keys

_TILE = 256
_PERIOD = 512  # pixels after which a texture repeats
_GLASS, _STROMA, _NUCLEUS = (244, 242, 245), (228, 152, 188), (94, 58, 132)
_CELLS = {"tissue": (13, 4.0, 6.5), "lesion": (26, 5.5, 8.5)}  # nuclei along a period, smallest and largest radius
_NUM_WAVES = 6


def write_synthetic_slide(
    path: str | Path,
    *,
    width: int,
    height: int,
    mpp: float | None = 0.5,
    seed: int = 0,
    lesion: float = 0.0,
    levels: Sequence[int] = (1, 4, 16),
) -> None:
    """Write a pyramidal tiled TIFF with deflate compression.

    Args:
        path: path of the new file.
        width: width of level 0 in pixels.
        height: height of level 0 in pixels.
        mpp: microns per pixel in the tags of the file; None leaves them out.
        seed: seed of the places of the tissue and of its texture.
        lesion: approximate share of the tissue that has crowded nuclei.
        levels: downsampling of each level: 1, then powers of two.

    Raises:
        ValueError: `lesion` is outside [0, 1).
    """
    if not 0 <= lesion < 1:
        raise ValueError(f"lesion: {lesion}; accepted: a share in [0, 1)")
    textures = _textures(seed)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level, factor in enumerate(levels):
            shape = (max(1, height // factor), max(1, width // factor), 3)
            per_centimetre = 1.0 if mpp is None else 10_000 / (mpp * factor)
            writer.write(
                _tiles(shape, factor=factor, size=(width, height), textures=textures, seed=seed, lesion=lesion),
                shape=shape,
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="zlib",
                compressionargs={"level": 1},
                subfiletype=int(level > 0),  # 1: a smaller version of another page
                resolution=(per_centimetre, per_centimetre),
                resolutionunit="NONE" if mpp is None else "CENTIMETER",
                metadata=None,
                software="glpretrain",
                maxworkers=1,
            )


def _tiles(
    shape: tuple[int, int, int], *, factor: int, size: tuple[int, int], textures: np.ndarray, seed: int, lesion: float
) -> Iterator[np.ndarray]:
    """Tiles UInt8[tile tile 3], row by row. A pixel of a coarser level is the mean of 2 x 2 of the pixels that it covers."""
    samples = min(2, factor)
    step = factor // samples
    for top in range(0, shape[0], _TILE):
        for left in range(0, shape[1], _TILE):
            y = np.arange(top * factor, (top + _TILE) * factor, step)
            x = np.arange(left * factor, (left + _TILE) * factor, step)
            kind = _kinds(y, x, size=size, seed=seed, lesion=lesion)  # [Y X]
            fine = textures[kind, (y % _PERIOD)[:, None], (x % _PERIOD)[None, :]]  # [Y X 3]
            parts = [fine[i::samples, j::samples] for i in range(samples) for j in range(samples)]
            summed = np.stack(parts).sum(axis=0, dtype=np.uint16)
            yield (summed // samples**2).astype(np.uint8)


def _kinds(y: np.ndarray, x: np.ndarray, *, size: tuple[int, int], seed: int, lesion: float) -> np.ndarray:
    """UInt8[Y X] for rows Int[Y] and columns Int[X] of level 0: 0 glass, 1 tissue, 2 lesion."""
    scale = min(size)
    u, v = (x / scale).astype(np.float32), (y / scale).astype(np.float32)
    tissue = _waves(v, u, seed=seed, purpose=1, frequency=8.0) > -0.5  # [Y X]
    for axis, (position, side) in enumerate(((v, size[1]), (u, size[0]))):
        inside = (position > 0.05) & (position < side / scale - 0.05)
        tissue &= inside[:, None] if axis == 0 else inside[None, :]
    kind = tissue.astype(np.uint8)
    if lesion > 0:
        # Sums of waves are approximately normal, so this quantile leaves the share `lesion` above it.
        above = _waves(v, u, seed=seed, purpose=2, frequency=10.0) > NormalDist().inv_cdf(1 - lesion)
        kind[tissue & above] = 2
    return kind


def _waves(v: np.ndarray, u: np.ndarray, *, seed: int, purpose: int, frequency: float) -> np.ndarray:
    """Float[Y X] for Float[Y] and Float[X]: the sum of a few plane waves in random directions, with mean 0 and variance 1."""
    draws = keys.uniform(_key(seed, purpose), 3, _NUM_WAVES).numpy()
    angle, phase, length = 2 * np.pi * draws[0], 2 * np.pi * draws[1], frequency * (0.5 + draws[2])
    along_v = v[:, None] * (length * np.sin(angle))  # [Y waves]
    along_u = u[:, None] * (length * np.cos(angle)) + phase  # [X waves]
    # cos(a + b) = cos a cos b - sin a sin b: a matrix product instead of a cosine per pixel.
    left = np.concatenate([np.cos(along_v), -np.sin(along_v)], axis=1)
    right = np.concatenate([np.cos(along_u), np.sin(along_u)], axis=1)
    return (left @ right.T) * np.sqrt(2 / _NUM_WAVES)


def _key(seed: int, purpose: int) -> torch.Tensor:
    return keys.fold_in(torch.tensor(seed), purpose)


@lru_cache(maxsize=4)
def _textures(seed: int) -> np.ndarray:
    """UInt8[3 period period 3]: periodic textures of glass, tissue and lesion."""
    glass = np.asarray(_GLASS) + _noise(seed, 10, sigma=1.0)[..., None]
    kinds = [glass, *(_cells(seed, 20 + number, *cells) for number, cells in enumerate(_CELLS.values()))]
    return np.stack([kind.round().clip(0, 255).astype(np.uint8) for kind in kinds])


def _noise(seed: int, purpose: int, *, sigma: float | tuple[float, float]) -> np.ndarray:
    """Float[period period]: smoothed noise with standard deviation 1."""
    noise = ndimage.gaussian_filter(keys.normal(_key(seed, purpose), _PERIOD, _PERIOD).numpy(), sigma, mode="wrap")
    return noise / noise.std()


def _cells(seed: int, purpose: int, count: int, least: float, largest: float) -> np.ndarray:
    """Float[period period 3]: fibres with `count` x `count` nuclei."""
    fibres = _noise(seed, purpose, sigma=(2.0, 9.0))
    picture = np.asarray(_STROMA) + fibres[..., None] * np.array([6.0, 12.0, 8.0])
    pitch = _PERIOD / count
    draws = keys.uniform(_key(seed, purpose + 5), count, count, 4).numpy()
    reach = np.arange(-int(largest * 1.5) - 1, int(largest * 1.5) + 2)
    for row in range(count):
        for column in range(count):
            dy, dx, size, shape = draws[row, column]
            y, x = (row + dy) * pitch, (column + dx) * pitch
            radius, stretch = least + (largest - least) * size, 0.8 + 0.5 * shape
            rows, columns = int(y) + reach, int(x) + reach
            distance = np.hypot((rows - y)[:, None] / stretch, (columns - x)[None, :] * stretch) / radius
            share = np.clip((1.15 - distance) / 0.3, 0, 1)[..., None] * 0.9
            place = np.ix_(rows % _PERIOD, columns % _PERIOD)
            picture[place] = picture[place] * (1 - share) + np.asarray(_NUCLEUS) * share
    return picture
