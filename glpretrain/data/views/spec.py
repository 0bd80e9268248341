"""The settings of one view: its size, its crop, and the probability and strength of each colour operation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NUM_OPERATIONS = 15  # of RandAugment, see `randaugment.OPERATIONS`
MAX_MAGNITUDE = 10.0  # timm's levels end here


def _check_pair(name: str, value: tuple[float, float], *, high: float | None = None) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] or (high is not None and value[1] > high):
        accepted = "above 0" if high is None else f"in (0, {high:g}]"
        raise ValueError(f"ViewSpec: {name} is {tuple(value)}; expected a pair (smallest, largest) {accepted}")


def _check_ranges(owner: str, values: Mapping[str, float], *, high: float = 1.0) -> None:
    for name, value in values.items():
        if not 0 <= value <= high:
            raise ValueError(f"{owner}: {name} is {value}; expected a value in [0, {high:g}]")


@dataclass(frozen=True)
class Strong:
    """Strong augmentation in place of the colour operations of a view: RandAugment on the whole item, then the crop, then random erasing.

    The defaults are timm's `rand-m9-mstd0.5-inc1` and `RandomErasing(0.25, mode="pixel")`, which DeiT and Mugs use.

    Args:
        prob: probability that a view is strongly augmented; otherwise it gets the colour operations of its `ViewSpec`.
        num_ops: number of different operations per view, of fifteen.
        magnitude: mean of the magnitude of an operation; 10 is the strongest.
        magnitude_std: standard deviation of the magnitude, which is clamped to [0, 10].
        op_prob: probability that a chosen operation is applied.
        erase_prob: probability that a rectangle is replaced by noise.

    Raises:
        ValueError: a value is outside its range.
    """

    prob: float = 0.5
    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    op_prob: float = 0.5
    erase_prob: float = 0.25

    def __post_init__(self) -> None:
        _check_ranges("Strong", {"prob": self.prob, "op_prob": self.op_prob, "erase_prob": self.erase_prob})
        _check_ranges("Strong", {"num_ops": self.num_ops}, high=NUM_OPERATIONS)
        _check_ranges("Strong", {"magnitude": self.magnitude}, high=MAX_MAGNITUDE)
        _check_ranges("Strong", {"magnitude_std": self.magnitude_std}, high=math.inf)


@dataclass(frozen=True)
class ViewSizes:
    """Sizes that the views of a step may have in place of their own, each one number for a square or (height, width).

    Args:
        share: share of the steps that have these sizes, in (0, 1).
        global_size: size of the global views, and of the student's own.
        local_size: size of the local views; None where there are none.
        clean_size: size of the clean crops; None where there are none.

    Raises:
        ValueError: the share is outside its range.
    """

    share: float
    global_size: int | tuple[int, int]
    local_size: int | tuple[int, int] | None = None
    clean_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"ViewSizes: share is {self.share}; expected a share of the steps in (0, 1)")


@dataclass(frozen=True)
class ViewSpec:
    """The settings of one view of an item, or of `count` views. An operation whose settings are left out is off.

    Strengths have the meaning of torchvision's ColorJitter: a factor is drawn from U(max(0, 1 - x), 1 + x), and a hue shift from U(-x, x)
    of a full turn; the four operations have a random order. DINO uses 0.4, 0.4, 0.2 and 0.1 for photographs.

    Args:
        size: size in pixels, one number for a square or (height, width).
        scale: smallest and largest share of the area of the item that a crop covers.
        ratio: smallest and largest width / height of a crop, in the true proportions of the item.
        count: number of views with these settings.
        flip: probability of a horizontal flip.
        turn_prob: probability of a turn by 90, 180 or 270 degrees, which are equally likely; with 0.75 all four directions are. The view
            must be a square.
        stain: strength for stained tissue, added to and multiplied with each dye; 0.05 is weak and 0.2 is strong; needs RGB.
        stain_prob: probability of the stain augmentation.
        brightness: strength of the brightness jitter.
        contrast: strength of the contrast jitter.
        saturation: strength of the saturation jitter; needs RGB.
        hue: strength of the hue jitter, at most 0.5; needs RGB.
        jitter_prob: probability of these four together.
        grayscale_prob: probability that the view becomes grey; needs RGB.
        blur_prob: probability of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels of the view.
        blur_taps: number of taps of the blur's kernel along each axis, odd; None covers three times the largest standard deviation to
            either side. DINOv2 has 9 (data/transforms.py), which cut off the flanks of a wide blur.
        solarize_prob: probability that values at or above the threshold are inverted.
        solarize_threshold: threshold in [0, 1].
        interpolation: interpolation of the crop, with antialiasing.
        strong: probability and settings of strong augmentation, which replaces the colour operations above; needs RGB.

    Raises:
        ValueError: a value is outside its range.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    count: int = 1
    flip: float = 0.5
    turn_prob: float = 0.0
    stain: float = 0.0
    stain_prob: float = 0.8
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_prob: float = 0.8
    grayscale_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_taps: int | None = None
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    strong: Strong | None = None

    def __post_init__(self) -> None:
        sides = [self.size] if isinstance(self.size, int) else list(self.size)
        if (len(sides) != 2 and sides != [self.size]) or min(sides) < 1:
            raise ValueError(f"ViewSpec: size is {self.size}; expected pixels, one number or (height, width), each at least 1")
        if self.count < 1:
            raise ValueError(f"ViewSpec: count is {self.count}; expected at least 1; leave the view out instead")
        _check_pair("scale", self.scale, high=1.0)
        _check_pair("ratio", self.ratio)
        _check_pair("blur_sigma", self.blur_sigma)
        if self.blur_taps is not None and (self.blur_taps < 1 or self.blur_taps % 2 == 0):
            raise ValueError(f"ViewSpec: blur_taps is {self.blur_taps}; expected an odd number, or none")
        strengths = {"stain": self.stain, "brightness": self.brightness, "contrast": self.contrast, "saturation": self.saturation}
        _check_ranges("ViewSpec", strengths, high=math.inf)
        _check_ranges("ViewSpec", {"hue": self.hue}, high=0.5)
        probabilities = {
            "flip": self.flip,
            "turn_prob": self.turn_prob,
            "stain_prob": self.stain_prob,
            "jitter_prob": self.jitter_prob,
            "grayscale_prob": self.grayscale_prob,
            "blur_prob": self.blur_prob,
            "solarize_prob": self.solarize_prob,
            "solarize_threshold": self.solarize_threshold,
        }
        _check_ranges("ViewSpec", probabilities)
        if self.turn_prob > 0 and len(set(self.shape)) > 1:
            raise ValueError(f"ViewSpec: turn_prob is {self.turn_prob} and size is {self.size}; expected a square view, or turn_prob 0")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"ViewSpec: interpolation is {self.interpolation!r}; expected 'bilinear' or 'bicubic'")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.size, int):
            return self.size, self.size
        height, width = self.size
        return height, width

    def clean(self, size: int | tuple[int, int]) -> "ViewSpec":
        """Settings of crops of the same places in another size, without any change of their colours."""
        return ViewSpec(
            size,
            self.scale,
            ratio=self.ratio,
            count=self.count,
            flip=self.flip,
            turn_prob=self.turn_prob,
            interpolation=self.interpolation,
        )
