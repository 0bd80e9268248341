"""Face detection: the cascade of local binary patterns that scikit-image carries in its wheel.

It detects frontal faces without landmarks, and it does not find profiles and strongly turned heads. Left out: better detectors, because
they need weights that have to be downloaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import numpy as np
from skimage.data import lbp_frontal_face_cascade_filename
from skimage.feature import Cascade
from torch import Tensor
from torchvision.transforms import functional

from glpretrain.prepare.faces.parsers import Box

_SIDE = 256  # pixels along the longer side of the searched image; faces below a sixth of it are not found, a search takes about 60 ms
_LEAST_FACE = _SIDE // 6


class FaceDetector(ABC):
    """Finds the face in an image."""

    @abstractmethod
    def detect(self, image: Tensor) -> Box | None:
        """Box of the largest face in UInt8[3 H W]; None where there is no face."""


class CascadeDetector(FaceDetector):
    """Detects upright frontal faces. The box reaches from the middle of the forehead to the chin."""

    def __init__(self) -> None:
        self._cascade = Cascade(lbp_frontal_face_cascade_filename())

    def __reduce__(self) -> tuple[Callable[[], "CascadeDetector"], tuple[()]]:
        return _detector, ()  # the cascade is a file that every machine has

    def detect(self, image: Tensor) -> Box | None:
        """As `FaceDetector`."""
        height, width = image.shape[1:]
        scale = _SIDE / max(height, width)
        size = [max(1, round(side * scale)) for side in (height, width)]
        if min(size) < _LEAST_FACE:
            return None
        grey = functional.rgb_to_grayscale(functional.resize(image, size, antialias=True))[0].numpy()
        found = self._cascade.detect_multi_scale(
            img=np.ascontiguousarray(grey),
            scale_factor=1.1,
            step_ratio=1,
            min_size=(_LEAST_FACE, _LEAST_FACE),
            max_size=(max(size), max(size)),
        )
        if not found:
            return None
        largest = max(found, key=lambda one: (one["width"], -one["r"], -one["c"]))
        top, left, side = (round(largest[key] / scale) for key in ("r", "c", "width"))
        return Box(top=top, left=left, height=min(side, height - top), width=min(side, width - left))


@cache
def _detector() -> CascadeDetector:
    """The detector of this process."""
    return CascadeDetector()
