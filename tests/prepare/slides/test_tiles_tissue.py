"""Tissue on a thumbnail: what is stained and nothing else, at any resolution."""

import numpy as np
import pytest
from scipy import ndimage

from glpretrain.prepare.slides.tissue import find_tissue

GLASS, PINK, VIOLET = (243, 241, 244), (226, 150, 186), (110, 70, 150)


def glass(height: int = 300, width: int = 400, *, noise: float = 2.0) -> np.ndarray:
    """Float[H W 3], with a ripple instead of noise."""
    y, x = np.mgrid[:height, :width]
    ripple = np.stack([np.sin(x * 1.7 + y * (2.3 + channel)) for channel in range(3)], axis=-1)
    return np.asarray(GLASS) + noise * ripple


def disc(radius: float, *, centre: tuple[float, float] = (150, 200), shape: tuple[int, int] = (300, 400)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(y - centre[0], x - centre[1]) < radius


def painted(*parts: tuple[np.ndarray, tuple[int, int, int]]) -> np.ndarray:
    picture = glass()
    for where, colour in parts:
        picture[where] = colour
    return picture.clip(0, 255).astype(np.uint8)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("mpp", [1.0, 8.0, 30.0])
@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (0, 0, 0), (3, 1, 2), (180, 180, 180)])
def test_a_blank_slide_has_no_tissue(colour: tuple[int, int, int], mpp: float) -> None:
    assert not find_tissue(np.broadcast_to(np.uint8(colour), (200, 300, 3)), mpp=mpp).mask.any()
    assert not find_tissue(glass(noise=4.0).astype(np.uint8), mpp=mpp).mask.any()


def test_a_slide_without_glass_is_all_tissue() -> None:
    y, x = np.mgrid[:300, :400]
    share = (0.5 + 0.5 * np.sin(x / 5) * np.cos(y / 7))[..., None]
    pixels = (share * np.asarray(PINK) + (1 - share) * np.asarray(VIOLET)).astype(np.uint8)
    assert find_tissue(pixels, mpp=8.0).mask.all()


def test_tissue_is_found_to_the_pixel_and_to_the_border() -> None:
    truth = disc(100) | disc(60, centre=(0, 380))
    found = find_tissue(painted((truth, PINK), (disc(30), VIOLET)), mpp=8.0)
    assert overlap(found.mask, truth) > 0.96
    assert 0.05 <= found.threshold <= 0.15
    assert found.mask[0, 330:].all()


def test_morphology_is_in_microns() -> None:
    # 8 microns per pixel: 0.01 square millimetres is a disc of 7 pixels' radius.
    specks, holes = disc(5, centre=(30, 30)), disc(5, centre=(150, 170))
    islands, lumen = disc(12, centre=(270, 30)), disc(25, centre=(150, 240))
    found = find_tissue(painted((disc(100) | specks | islands, PINK), (holes | lumen, GLASS)), mpp=8.0).mask
    assert not found[:60, :60].any() and found[270, 30]
    assert found[150, 170] and not found[150, 240]


@pytest.mark.parametrize("colour", [(30, 140, 60), (20, 130, 130), (40, 60, 190), (20, 20, 22), (0, 0, 0)])
def test_ink_is_no_tissue(colour: tuple[int, int, int]) -> None:
    tissue, ink = disc(90), disc(120, centre=(0, 60)) & ~disc(105, centre=(0, 60))
    found = find_tissue(painted((tissue, PINK), (ink, colour)), mpp=8.0).mask
    assert not (found & ink).any()
    assert overlap(found, tissue & ~ndimage.binary_dilation(ink, iterations=3)) > 0.9


def test_stains_are_not_taken_for_ink() -> None:
    # Eosin, haematoxylin, the brown of DAB, the blue counterstain beside it, a red blood cell.
    for colour in ((235, 120, 160), (90, 60, 130), (130, 80, 45), (120, 140, 190), (200, 50, 60)):
        assert overlap(find_tissue(painted((disc(80), colour)), mpp=8.0).mask, disc(80)) > 0.93
