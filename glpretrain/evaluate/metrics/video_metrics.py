"""How well one mask agrees with another, in the two measures of DAVIS: J for the region and F for its boundary.

Definitions of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016), as in
github.com/davisvideochallenge/davis2017-evaluation. Its recall and decay are left out.
"""

import math

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from glpretrain.data.sources.images.videos import IGNORED, UNKNOWN

_BOUNDARY_SHARE = 0.008  # of the image's diagonal: how far apart two boundaries may be


def object_ids(masks: Tensor) -> list[int]:
    """Ids of the objects that the first of the masks, Int[T H W], shows."""
    return masks[0][masks[0] > 0].unique().tolist()


def scored_frames(masks: Tensor) -> list[int]:
    """Positions of the known masks in Int[T H W], without the first, which is given, and the last, by the convention of DAVIS."""
    return [time for time in range(1, len(masks) - 1) if (masks[time] != UNKNOWN).any()]


def object_scores(predictions: Tensor, masks: Tensor) -> Tensor:
    """Float[O 2]: J and F of each object of the first mask, means over the scored frames (NaN without any); ids are Int[T H W]."""
    scores = torch.empty(len(object_ids(masks)), len(scored_frames(masks)), 2, dtype=torch.float64)
    for column, time in enumerate(scored_frames(masks)):
        known = masks[time] != IGNORED
        for row, identity in enumerate(object_ids(masks)):
            pair = predictions[time] == identity, masks[time] == identity
            scores[row, column, 0] = region_similarity(*pair, known=known)
            scores[row, column, 1] = boundary_similarity(*pair, known=known)
    return scores.mean(dim=1)


def region_similarity(prediction: Tensor, truth: Tensor, *, known: Tensor) -> float:
    """J: intersection over union of two masks, Bool[H W], over the pixels that count, Bool[H W]; 1 where both are empty."""
    union = int(((prediction | truth) & known).sum())
    return int((prediction & truth & known).sum()) / union if union else 1.0


def boundary_similarity(prediction: Tensor, truth: Tensor, *, known: Tensor) -> float:
    """F: harmonic mean of two shares, those of each boundary that lies near the other one: within 0.8 % of the diagonal, rounded up.

    The official code dilates a boundary by a disk and looks up the other one. The distance to the nearest point of the other boundary is
    the same test, and cheaper, because boundaries have few points. Arguments as in `region_similarity`. F is 1 where neither has a
    boundary, 0 where one has.
    """
    radius = math.ceil(_BOUNDARY_SHARE * math.hypot(*truth.shape))
    points = [np.argwhere(boundary((mask & known).numpy())) for mask in (prediction, truth)]
    if not len(points[0]) or not len(points[1]):
        return float(len(points[0]) == len(points[1]))
    # Distances are roots of whole numbers: this bound lies between the radius and the next one.
    bound = math.sqrt(radius**2 + 0.5)
    distances = [KDTree(other).query(own, distance_upper_bound=bound)[0] for own, other in (points, points[::-1])]
    precision, recall = (float(np.isfinite(distance).mean()) for distance in distances)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Bool[H W]: pixels of a mask that differ from the one to the right, below or diagonally below; the picture's border is no boundary."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
