"""What one view is: its size, its crop and the strength of each colour operation. Numbers only; the work is done elsewhere."""

from dataclasses import dataclass
from typing import Literal

NUM_OPERATIONS = 15  # of RandAugment, `randaugment.OPERATIONS`
MAX_MAGNITUDE = 10.0  # timm's levels end here


def _check_range(name: str, value: tuple[float, float], *, low: float, high: float | None) -> None:
    if len(value) != 2 or not low < value[0] <= value[1] or (high is not None and value[1] > high):
        accepted = f"in ({low}, {high}]" if high is not None else f"above {low}"
        raise ValueError(f"ViewSpec: {name} is a (smallest, largest) pair {accepted}, not {tuple(value)}")


@dataclass(frozen=True)
class Strong:
    """Strong augmentation in place of a view's colours: RandAugment on the whole item, then the crop, then random erasing.

    The defaults are timm's `rand-m9-mstd0.5-inc1` and `RandomErasing(0.25, mode="pixel")`, as DeiT and Mugs have them.

    Args:
        prob: probability that a view is strongly augmented, and not weakly with the colours of its `ViewSpec`.
        num_ops: different operations per view, of fifteen.
        magnitude: mean of an operation's magnitude; 10 is the strongest.
        magnitude_std: its standard deviation; what falls outside [0, 10] is moved to the end.
        op_prob: probability that a chosen operation is applied.
        erase_prob: probability that a rectangle becomes noise.

    Raises:
        ValueError: a value outside its range.
    """

    prob: float = 0.5
    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    op_prob: float = 0.5
    erase_prob: float = 0.25

    def __post_init__(self) -> None:
        for name, value in {"prob": self.prob, "op_prob": self.op_prob, "erase_prob": self.erase_prob}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"Strong: {name} lies in [0, 1], not {value}")
        if not 0 <= self.num_ops <= NUM_OPERATIONS:
            raise ValueError(f"Strong: num_ops lies in [0, {NUM_OPERATIONS}], not {self.num_ops}")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"Strong: magnitude lies in [0, {MAX_MAGNITUDE:g}], not {self.magnitude}")
        if self.magnitude_std < 0:
            raise ValueError(f"Strong: magnitude_std is at least 0, not {self.magnitude_std}")


@dataclass(frozen=True)
class ViewSpec:
    """One view of an item, or `count` equal ones. What is left out is off.

    Strengths mean what they mean in torchvision's ColorJitter: a factor from U(max(0, 1 - x), 1 + x), a hue shift from
    U(-x, x) of a full turn; the four come in a random order. DINO's photographs take .4, .4, .2 and .1.

    Args:
        size: pixels, one number for a square or (height, width).
        scale: smallest and largest share of the item's area that a crop covers.
        ratio: smallest and largest width / height of a crop, in the item's true proportions.
        count: how many such views.
        flip: probability of a horizontal flip.
        turn_prob: probability of a turn by 90, 180 or 270 degrees, each as likely; 0.75 makes all four directions so. For squares.
        stain: strength for stained tissue, of what is added to and multiplied with each dye; 0.05 is weak, 0.2 strong; needs RGB.
        stain_prob: probability of it.
        brightness: strength.
        contrast: strength.
        saturation: strength; needs RGB.
        hue: strength, at most 0.5; needs RGB.
        jitter_prob: probability of the four together.
        grayscale_prob: probability; needs RGB.
        blur_prob: probability of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation, in pixels of the view.
        solarize_prob: probability that values at or above the threshold are inverted.
        solarize_threshold: of values in [0, 1].
        interpolation: of the crop, antialiased.
        strong: how often and how the view is strongly augmented, then without the colours above; needs RGB.

    Raises:
        ValueError: a value outside its range.
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
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    strong: Strong | None = None

    def __post_init__(self) -> None:
        sides = [self.size] if isinstance(self.size, int) else list(self.size)
        if (len(sides) != 2 and sides != [self.size]) or min(sides) < 1:
            raise ValueError(f"ViewSpec: size is pixels, one number or (height, width), each at least 1, not {self.size}")
        if self.count < 1:
            raise ValueError(f"ViewSpec: count is at least 1, not {self.count}; leave the view out instead")
        _check_range("scale", self.scale, low=0, high=1)
        _check_range("ratio", self.ratio, low=0, high=None)
        _check_range("blur_sigma", self.blur_sigma, low=0, high=None)
        if self.turn_prob > 0 and len(set(self.shape)) > 1:
            raise ValueError(f"ViewSpec: turn_prob={self.turn_prob} needs a square view, not {self.size}")
        strengths = {
            "stain": self.stain,
            "brightness": self.brightness,
            "contrast": self.contrast,
            "saturation": self.saturation,
            "hue": self.hue,
        }
        for name, value in strengths.items():
            if value < 0 or (name == "hue" and value > 0.5):
                raise ValueError(f"ViewSpec: {name} is a strength {'in [0, 0.5]' if name == 'hue' else 'of at least 0'}, not {value}")
        shares = {
            "flip": self.flip,
            "turn_prob": self.turn_prob,
            "stain_prob": self.stain_prob,
            "jitter_prob": self.jitter_prob,
            "grayscale_prob": self.grayscale_prob,
            "blur_prob": self.blur_prob,
            "solarize_prob": self.solarize_prob,
            "solarize_threshold": self.solarize_threshold,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"ViewSpec: {name} lies in [0, 1], not {value}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"ViewSpec: interpolation is 'bilinear' or 'bicubic', not {self.interpolation!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.size, int):
            return self.size, self.size
        height, width = self.size
        return height, width
