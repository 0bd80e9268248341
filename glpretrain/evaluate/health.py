"""Health of features without labels: how many directions they fill, how evenly they spread, how far a patch resembles its surroundings.

- rank: RankMe, exp of the entropy of the normalised singular values, not centred (Garrido et al., "RankMe", ICML 2023, equation 3);
  at most the width and the number of rows;
- uniformity: log of the mean of exp(-2 |x - y|^2) over pairs of unit vectors (Wang and Isola, "Understanding contrastive
  representation learning through alignment and uniformity on the hypersphere", ICML 2020): 0 for one point, near -4 when spread;
  beyond 20,000 items, over the pairs of 20,000 of them, drawn pseudo-randomly and always the same;
- similarity of patches: mean cosine of two patches of one image, of different images, and of one image as a function of their
  distance on the grid. Where the last has fallen half of the way from 1 to the mean of one image is the half distance: how far what
  a patch says beyond its image reaches.

Prototypes, which an encoder does not have (`callbacks.TrainingHealth`), and a verdict are left out on purpose.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, Score
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.figures import curves_figure
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import Z95, interval_score, jackknife_interval, mean_interval
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import Rows, require_finite

_RANK_EPS = 1e-7  # the paper's
_UNIFORMITY_T = 2.0
_NUM_GROUPS = 20
_GROUP_SEED = 100
_PAIRED_ROWS, _PAIRED_SEED = 20_000, 101  # rows whose pairs are taken, at most
_TABLE_CELLS = 1 << 22  # of a table of pairs at a time
_SAME = 1e-6  # patches whose cosines differ by less are the same


class Moments(NamedTuple):
    """What one pass over the items gathers."""

    cls: Tensor  # Float[B D]
    mean_patch: Tensor  # Float[B D]
    mean_unit: Tensor  # Float[B D]  mean of the patches, each scaled to length one
    within: Tensor  # Float[B]  mean cosine of two patches
    decay: Tensor  # Float[B distances]  the same at distance 1, 2, ... on the grid
    group: Tensor  # Int[B]  which of R groups an item is in, for the jackknife
    cls_gram: Tensor  # Float64[R D D]  sum over the group of outer products
    patch_gram: Tensor  # Float64[R D D]

    def sums(self, *parts: Tensor) -> Tensor:
        """Of 1 and Float[B M], by group: Float64[R 1+M]."""
        rows = torch.cat([torch.ones(len(self.group), 1), *parts], dim=1).double()
        return torch.zeros(len(self.cls_gram), rows.shape[1], dtype=torch.float64).index_add_(0, self.group, rows)

    @property
    def decay_sums(self) -> Tensor:
        """Float64[R 2+distances], what `half_distance` takes."""
        return self.sums(self.within[:, None], self.decay)

    @property
    def unit_sums(self) -> Tensor:
        """Float64[R 2+D], what `cosine_between` takes."""
        return self.sums(self.mean_unit.square().sum(dim=1, keepdim=True), self.mean_unit)


@dataclass(frozen=True, kw_only=True)
class Health(Evaluator):
    """`rank_cls` and `rank_patches`, `uniformity_cls` and `uniformity_mean_patch`, `cosine_within`, `cosine_between`, `half_distance`.

    Of the items of `test`; labels are not looked at. Ranks are numbers of directions; cosines are of patches; the half distance is in
    patches, and the largest distance measured (the longer side of the grid less one) where the similarity does not fall that far.
    """

    headlines = ("rank_cls", "rank_patches")
    scored = "test"
    needs = ("test",)
    modality = "image"

    def check_items(self, sources: Sources) -> None:
        if len(sources["test"]) < 2:
            raise ValueError(f"test: source {sources['test'].name!r} has 1 item; accepted: at least 2")

    def num_bytes(self, dim: int, counts: Mapping[str, int]) -> int:
        """See `Evaluator`."""
        return 3 * super().num_bytes(dim, counts)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        found = self._moments(encoder, sources["test"], cache)
        count = len(found.cls)
        whole = {
            "rank_cls": (effective_rank, found.cls_gram, (1.0, float(encoder.embed_dim))),
            "rank_patches": (effective_rank, found.patch_gram, (1.0, float(encoder.embed_dim))),
            "cosine_between": (cosine_between, found.unit_sums, (-1.0, 1.0)),
            "half_distance": (half_distance, found.decay_sums, (0.0, float(found.decay.shape[1]))),
        }
        scores = {
            name: interval_score(
                statistic(sums.sum(dim=0, keepdim=True)).item(), jackknife_interval(statistic, sums), count=count, bounds=bounds
            )
            for name, (statistic, sums, bounds) in whole.items()
        }
        scores["uniformity_cls"] = uniformity(functional.normalize(found.cls, dim=1))
        scores["uniformity_mean_patch"] = uniformity(functional.normalize(found.mean_patch, dim=1))
        within = interval_score(found.within.mean().item(), mean_interval(found.within), count=count, bounds=(-1.0, 1.0))
        scores["cosine_within"] = within
        return Result(scores, chosen={})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`spectrum`: singular values, each over the largest; `decay`: cosine of two patches by their distance."""
        found = self._moments(encoder, sources["test"], cache)
        return {"spectrum": _spectrum_figure(found), "decay": _decay_figure(found)}

    def _moments(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> Moments:
        grid = self.features.image_grid(encoder)
        if grid[0] * grid[1] < 2:
            raise ValueError(f"features.size: {self.features.size}; accepted: at least two patches of {encoder.card.patch_size} pixels")
        num_groups, dim = min(_NUM_GROUPS, len(items)), encoder.embed_dim
        group_of = keys.permutation(torch.tensor(_GROUP_SEED), len(items)) % num_groups  # [B]
        cls_gram, patch_gram = (torch.zeros(num_groups, dim, dim, dtype=torch.float64) for _ in range(2))
        rows = Rows(len(items))
        count = 0
        for batch, output in self.features.encode(encoder, items, resize=self.features.cropping, cache=cache):
            for features in (output.cls, output.patches):
                require_finite(features, batch.index, what=f"source {items.name!r}: the features")
            if output.patches.shape[1] != grid[0] * grid[1]:
                raise ValueError(f"encoder {encoder.card.encoder!r}: {output.patches.shape[1]} patches; its grid has {grid[0]} x {grid[1]}")
            groups = group_of[count : count + len(batch.index)]
            count += len(batch.index)
            for group in groups.unique().tolist():
                of_group = output.cls[groups == group].double(), output.patches[groups == group].flatten(0, 1).double()
                for gram, features in zip((cls_gram, patch_gram), of_group, strict=True):
                    gram[group] += features.T @ features
            unit = functional.normalize(output.patches, dim=-1)  # [B N D]
            rows.add(output.cls, output.patches.mean(dim=1), unit.mean(dim=1), decay(unit, grid=grid), groups)
        if count < 2:
            raise ValueError(f"source {items.name!r}: {count} item can be read; at least 2 are needed")
        cls, mean_patch, mean_unit, curves, group = rows.tensors(5)
        # All pairs of N unit vectors, less the N of one with itself.
        within = (grid[0] * grid[1] * mean_unit.square().sum(dim=1) - 1) / (grid[0] * grid[1] - 1)
        return Moments(cls, mean_patch, mean_unit, within, curves, group, cls_gram, patch_gram)


def singular_values(gram: Tensor) -> Tensor:
    """Of the matrix X with X^T X = Float64[*S D D], largest first, Float64[*S D]: exact down to 1e-8 of the largest."""
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)


def effective_rank(gram: Tensor) -> Tensor:
    """RankMe of the matrix X with X^T X = Float64[*S D D], Float64[*S]: D where all directions are alike, 1 where there is one."""
    values = singular_values(gram)
    share = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) + _RANK_EPS
    return (-(share * share.log()).sum(dim=-1)).exp()


def uniformity(rows: Tensor) -> Score:
    """Log of the mean of exp(-2 |x - y|^2) over all pairs of different rows, of 20,000 rows at most.

    The interval is that of a mean over pairs (Hoeffding): twice that of the rows' own means, and relative, for the logarithm.

    Args:
        rows: Float[B D], rows of length one.
    """
    if len(rows) > _PAIRED_ROWS:
        rows = rows[keys.permutation(torch.tensor(_PAIRED_SEED), len(rows))[:_PAIRED_ROWS]]
    count = len(rows)
    mean = torch.empty(count, dtype=torch.float64)
    per_chunk = max(1, _TABLE_CELLS // count)
    starts = range(0, count, per_chunk)
    for start in tracked(starts, total=len(starts), description="uniformity"):
        chunk = rows[start : start + per_chunk]
        potential = (2 * _UNIFORMITY_T * (chunk @ rows.T - 1)).clamp_max_(0).exp_()  # |x - y|^2 = 2 - 2 x.y
        potential[torch.arange(len(chunk)), start + torch.arange(len(chunk))] = 0  # not with itself
        mean[start : start + len(chunk)] = potential.double().sum(dim=1) / (count - 1)
    half_width = 2 * mean_interval(mean) / mean.mean().item()
    return interval_score(mean.mean().log().item(), half_width, count=count, bounds=(-4 * _UNIFORMITY_T, 0.0))


def decay(unit: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Mean cosine of two patches of an item by their distance, rounded to 1, 2, ... up to the longer side less one.

    Args:
        unit: Float[B N D], patches of length one.
        grid: patches along height and width.

    Returns:
        Float[B max(grid)-1].
    """
    height, width = grid
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()  # [N 2]
    distance = torch.cdist(place, place).round().long().flatten()  # [N*N]
    num_distances = max(grid) - 1
    used = (distance >= 1) & (distance <= num_distances)
    position = distance[used] - 1
    counts = position.bincount(minlength=num_distances)
    curves = Rows(len(unit))
    for chunk in unit.split(max(1, _TABLE_CELLS // len(distance))):
        cosine = torch.einsum("bnd,bmd->bnm", chunk, chunk).flatten(1)[:, used]  # [B pairs]
        curves.add(torch.zeros(len(chunk), num_distances).index_add_(1, position, cosine) / counts)
    return curves.tensors(1)[0]


def cosine_between(sums: Tensor) -> Tensor:
    """Mean cosine of two patches of different items.

    Args:
        sums: Float64[*S 2+D], over items: 1, the squared length of its mean unit patch, that vector.

    Returns:
        Float64[*S].
    """
    count, lengths, total = sums[..., 0], sums[..., 1], sums[..., 2:]
    return (total.square().sum(dim=-1) - lengths) / (count * (count - 1))


def half_distance(sums: Tensor) -> Tensor:
    """Where the decay has fallen half of the way from 1, at distance 0, to the mean of all pairs, along straight lines in between.

    Args:
        sums: Float64[*S 2+distances], over items: 1, the mean cosine of two patches, that at distance 1, 2, ...

    Returns:
        Float64[*S]; the last distance where it stays above, and where all patches are the same.
    """
    within = sums[..., 1:2] / sums[..., :1]
    excess = (sums[..., 2:] / sums[..., :1] - within) / (1 - within)
    curve = functional.pad(torch.where(within > 1 - _SAME, 1.0, excess), (1, 0), value=1.0)  # [*S 1+distances]
    low = curve <= 0.5
    after = torch.where(low.any(dim=-1), low.int().argmax(dim=-1), curve.shape[-1] - 1)
    above, below = (curve.gather(-1, position.unsqueeze(-1)).squeeze(-1) for position in (after - 1, after))
    return torch.where(low.any(dim=-1), after - 1 + (above - 0.5) / (above - below), after.to(curve.dtype))


def _spectrum_figure(found: Moments) -> Figure:
    figure, axis = curves_figure(f"{len(found.cls)} items", x="direction", y="singular value / largest")
    for gram, colour, name in ((found.cls_gram, "#0072b2", "cls"), (found.patch_gram, "#d55e00", "patches")):
        total = gram.sum(dim=0)
        values = singular_values(total)
        label = f"{name}, rank {effective_rank(total):.1f} of {len(values)}"
        axis.plot(range(1, len(values) + 1), values / values[0], color=colour, linewidth=1.4, label=label)
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-7)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _decay_figure(found: Moments) -> Figure:
    num_distances = found.decay.shape[1]
    mean = torch.cat([torch.ones(1), found.decay.mean(dim=0)])
    spread = torch.cat([torch.zeros(1), Z95 * found.decay.std(dim=0) / math.sqrt(len(found.decay))])
    half = half_distance(found.decay_sums.sum(dim=0)).item()
    title = f"half distance {half:.1f} patches, {len(found.decay)} items"
    figure, axis = curves_figure(title, x="distance in patches", y="mean cosine of two patches")
    distances = range(num_distances + 1)
    axis.plot(distances, mean, color="#0072b2", marker="o", markersize=3, linewidth=1.4, label="one image, by distance")
    axis.fill_between(distances, mean - spread, mean + spread, color="#0072b2", alpha=0.25, linewidth=0)
    axis.axhline(found.within.mean().item(), color="#0072b2", linewidth=0.8, linestyle=":", label="one image, all pairs")
    axis.axhline(
        cosine_between(found.unit_sums.sum(dim=0)).item(), color="#d55e00", linewidth=1.2, linestyle="--", label="different images"
    )
    axis.axvline(half, color="0.75", linewidth=0.8, zorder=0)
    axis.legend(frameon=False, fontsize=8)
    return figure
