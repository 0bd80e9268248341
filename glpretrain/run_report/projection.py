"""From features to a map: two coordinates per item, near where features are alike."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional

_LEAST, _PERPLEXITY, _SEED = 12, 30.0, 0  # items from which on t-SNE says more than PCA; its parameters
_SAME, _START = 1e-6, 1e-4  # standard deviation below which all rows are the same, and with which t-SNE starts, as scikit-learn does
_MANY, _ITERATIONS, _FEWER = 500, 1000, 500  # items from which on fewer iterations do: their number costs minutes


class Projection(NamedTuple):
    """Places of items on a map."""

    places: np.ndarray  # Float[B 2] in [0, 1], with the proportions of the projection
    method: str  # how they were found, in words


def projected(features: Tensor, *, like: np.ndarray | None = None) -> Projection:
    """Places of items, so that neighbours in the features are neighbours on the map. Distances between groups mean little.

    Args:
        features: Float[B D].
        like: Float[B 2], another map of the same items: this one is turned and mirrored so that items lie where they lie there, as far as
            that goes.
    """
    rows = functional.normalize(features.double(), dim=-1).numpy()  # distances of these are those of cosines
    rows = (rows - rows.mean(axis=0)).astype(np.float32)
    count = min(2, *rows.shape)
    places = np.zeros((len(rows), 2), dtype=np.float32)
    if float(np.abs(rows).max()) > _SAME:
        places[:, :count] = PCA(count, random_state=_SEED).fit_transform(rows)
    method = "the first two principal components: there are too few different items for t-SNE"
    spread = float(places[:, 0].std())
    if len(rows) >= _LEAST and spread > _SAME:  # of equal rows t-SNE would divide by zero, and crash
        perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
        iterations = _ITERATIONS if len(rows) < _MANY else _FEWER
        start = places / spread * _START
        # scikit-learn takes an array too.
        made = TSNE(init=start, perplexity=perplexity, max_iter=iterations, random_state=_SEED)  # pyright: ignore[reportArgumentType]
        places = made.fit_transform(rows)
        method = f"t-SNE of scikit-learn, perplexity {perplexity:.0f}, from the first two principal components"
    places = places - places.mean(axis=0)
    if like is not None:
        places = places @ orthogonal_procrustes(places, like - like.mean(axis=0))[0]
    low, high = places.min(axis=0), places.max(axis=0)
    span = max(float((high - low).max()), 1e-12)
    return Projection((places - (low + high) / 2) / span + 0.5, method)
