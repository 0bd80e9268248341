"""Colour operations and blur on values in [0, 1], drawn for every view separately. They are defined as in torchvision.

Brightness, contrast, saturation and grayscale are blends of an image, its luma and the mean of its luma, and so are several of them in a
row. So a worker writes as three numbers whatever comes between two places where values may have to be clamped, and the device reads
and writes a view once for all of it. Left out: which views are changed (`changes`), and strong augmentation (`randaugment`).
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from glpretrain.core import keys as rng
from glpretrain.data.views.changes import Change
from glpretrain.data.views.spec import ViewSpec
from glpretrain.data.views.stain import draw_stain

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# Fixed places among the random numbers of a view, so that the numbers of one operation do not depend on whether another one is on.
_JITTER, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(4, 9)
_DRAWS = 9
_ORDER, _STAIN = 1, 2  # purposes of keys: the order of the four jitter operations, and the dyes
_LUMA = (0.299, 0.587, 0.114)
_BEFORE_HUE = 3  # blends that may have to be clamped before the hue is shifted; after it there may be one more, since grey comes last
_TILE = 16  # pixels that a product of matrices blurs at once, with those that reach into them


def require_rgb(spec: ViewSpec, *, channels: int) -> None:
    """Refuse, with a ValueError, operations that are defined for RGB only where there are not three channels."""
    if channels == 3:
        return
    if spec.strong is not None:
        raise ValueError(f"views: strong needs RGB items, but these have {channels} channels; leave strong out")
    needs = {"stain": spec.stain, "saturation": spec.saturation, "hue": spec.hue, "grayscale_prob": spec.grayscale_prob}
    for name, value in needs.items():
        if value > 0:
            raise ValueError(f"views: {name}={value} needs RGB items, but these have {channels} channels; set {name} to 0")


def _per_view(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _luma(images: Tensor) -> Tensor:
    """Float[B 1 H W]: the luma of RGB, or the mean over any other channels."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def blend(images: Tensor, *, factors: Tensor) -> Tensor:
    """Float[B C H W]: f * image + g * luma + h * mean of the luma, clamped to [0, 1], by factors f, g and h, Float[B 3]."""
    own, of_luma, of_mean = (_per_view(column) for column in factors.unbind(1))
    luma = _luma(images)
    other = torch.addcmul(luma.mean(dim=(2, 3), keepdim=True) * of_mean, luma, of_luma)
    return torch.addcmul(other, images, own).clamp_(0.0, 1.0)


def shift_hue(images: Tensor, *, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB, Float[B 3 H W], in HSV by Float[B] full turns, as torchvision and kornia do.

    The hue is computed without a choice between cases, because comparisons take ten times as long as arithmetic on a CPU: with chroma c,
    a = green - blue and q = value - red, its distance from red is (|a| + q + 2 max(q - |a|, 0)) / c sixths of a turn, and it has the sign
    of a. In greys c, and so every difference, is 0.
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    side, below = green - blue, value - red
    off = side.abs()
    sixths = (below - off).clamp_min_(0.0).mul_(2.0).add_(off).add_(below)
    sixths = torch.copysign(sixths, side).div_(chroma.clamp_min(1e-12)).add_((6.0 * turns).view(-1, 1, 1))
    sixths.sub_(torch.floor(sixths * (1.0 / 6.0)), alpha=6.0)  # in [0, 6]
    result = torch.empty_like(images)
    # A channel is `value` up to a sixth around its own hue, and `least` from two sixths on. Red lies at both ends.
    for channel, (at, sign, base) in enumerate(((3.0, 1.0, least - chroma), (2.0, -1.0, upper := value + chroma), (4.0, -1.0, upper))):
        torch.addcmul(base, chroma, (sixths - at).abs_().clamp_(1.0, 2.0), value=sign, out=result[:, channel])
    return result


def gaussian_taps(sigma: Tensor, *, radius: Tensor) -> Tensor:
    """Float[B 2r+1], rows sum to 1: kernels of Gaussian blurs, where r is the largest radius.

    Args:
        sigma: Float[B], standard deviations in pixels.
        radius: Int[B]; taps that lie farther from the middle are 0.
    """
    longest = int(radius.max())
    offset = torch.arange(-longest, longest + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offset / sigma.double().unsqueeze(1)) ** 2)
    weights = torch.where(offset.abs() <= radius.unsqueeze(1), weights, 0.0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def gaussian_blur(images: Tensor, *, taps: Tensor) -> Tensor:
    """Blur every item of Float[B C H W] with its own kernel; borders are reflected.

    The taps, Float[B 2(2r+1)], are those along the height and then those along the width; they end before the pixel that lies as far away
    as the axis is long.

    A kernel of a few taps is a product with a narrow band. The axis is cut into tiles, and each is a product of small full matrices: on a
    CPU a fifth of the time of products with matrices of the whole axis, and an eighth of that of a grouped convolution.
    """
    H, W = images.shape[2:]
    (up, down), (left, across) = (_inner(part, reach=side - 1) for part, side in zip(taps.chunk(2, dim=1), (H, W), strict=True))
    high, wide = (math.ceil(side / math.ceil(side / _TILE)) for side in (H, W))
    padded = F.pad(images, (left, left, up, up), mode="reflect")
    if (missing := (-W % wide, -H % high)) != (0, 0):  # tiles that overlap the border
        padded = F.pad(padded, (0, missing[0], 0, missing[1]))
    windows = padded.unfold(2, high + 2 * up, high).transpose(3, 4)  # [B C tiles high+2r W+2r]
    padded = torch.matmul(_bands(down, count=high)[:, None, None], windows).flatten(2, 3)  # [B C H W+2r]
    windows = padded.unfold(3, wide + 2 * left, wide)  # [B C H tiles wide+2r]
    blurred = torch.bmm(windows.flatten(1, 3), _bands(across, count=wide).transpose(1, 2))  # [B (C H tiles) wide]
    return blurred.view(*padded.shape[:3], -1)[:, :, :H, :W]


def _inner(taps: Tensor, *, reach: int) -> tuple[int, Tensor]:
    """The radius r of a kernel that reaches as far as it can, and its taps Float[B 2r+1]."""
    outside = max(0, taps.shape[1] // 2 - reach)
    return taps.shape[1] // 2 - outside, taps[:, outside : taps.shape[1] - outside]


def _bands(taps: Tensor, *, count: int) -> Tensor:
    """Float[B count count+2r]: matrices whose row i holds the taps Float[B 2r+1] from column i on."""
    B, width = len(taps), count + taps.shape[1] - 1
    # Rows that are one longer than those of the matrix move on by one column each when they are read at its width.
    rows = F.pad(taps, (0, count)).unsqueeze(1).expand(B, count, width + 1)
    return rows.reshape(B, -1)[:, : count * width].view(B, count, width)


def solarize(images: Tensor, *, thresholds: Tensor) -> Tensor:
    """Invert values of Float[B C H W] at or above a threshold of each item, Float[B]."""
    return torch.where(images < _per_view(thresholds), images, 1.0 - images)


def draw_colours(specs: Sequence[ViewSpec], *, keys: Tensor, selected: Tensor) -> list[Change]:
    """The colour operations of selected views: stain, then jitter, grayscale, blur and solarize in DINO's order.

    Args:
        specs: the settings of each of V views.
        keys: Int[V B].
        selected: Bool[V B]; the others keep their colours.
    """
    draws = rng.uniform(keys, _DRAWS)  # [V B 9]

    def happens(draw: int, probs: Iterable[float]) -> Tensor:
        return (draws[..., draw] < _column(probs)) & selected

    changes = draw_stain(specs, keys=rng.fold_in(keys, _STAIN), selected=selected) if any(spec.stain > 0 for spec in specs) else []
    jittered, grey = happens(_JITTER, (spec.jitter_prob for spec in specs)), happens(_GRAYSCALE, (spec.grayscale_prob for spec in specs))
    place = rng.permutation(rng.fold_in(keys, _ORDER), 4)
    changes += _draw_jitter(specs, draws=draws, order=place.argsort(dim=-1), jittered=jittered, grey=grey)
    if (blurred := happens(_BLUR, (spec.blur_prob for spec in specs))).any():
        low, spread = (
            _column(values) for values in zip(*((s.blur_sigma[0], s.blur_sigma[1] - s.blur_sigma[0]) for s in specs), strict=True)
        )
        sigma = (low + spread * draws[..., _SIGMA]).flatten()
        radius = torch.tensor([[min(_blur_radius(spec), side - 1) for side in spec.shape] for spec in specs])  # [V 2]
        taps = gaussian_taps(sigma.repeat_interleave(2), radius=radius.repeat_interleave(keys.shape[1], dim=0).flatten())
        changes.append(Change.where("blur", blurred, numbers=taps.view(*keys.shape, -1)))
    thresholds = _column(spec.solarize_threshold for spec in specs).expand(keys.shape)
    changes.append(
        Change.where("solarize", happens(_SOLARIZE, (s.solarize_prob for s in specs)), numbers=thresholds.unsqueeze(-1)),
    )
    return changes


def _column(values: Iterable[float]) -> Tensor:
    """Float[V 1] of a setting of each view."""
    return torch.tensor(list(values)).unsqueeze(1)


def _blur_radius(spec: ViewSpec) -> int:
    return math.ceil(3.0 * spec.blur_sigma[1]) if spec.blur_taps is None else spec.blur_taps // 2


def _draw_jitter(specs: Sequence[ViewSpec], *, draws: Tensor, order: Tensor, jittered: Tensor, grey: Tensor) -> list[Change]:
    """Brightness, contrast, saturation and hue in the order of each view, then grayscale, as blends before and after the hue.

    The hue is shifted in one pass over all views that shift it. What comes before it in the order of a view is blended before that.

    Args:
        specs: the settings of each of V views.
        draws: Float[V B 9].
        order: Int[V B 4], a permutation of the four operations.
        jittered: Bool[V B], which views get these four.
        grey: Bool[V B], which views become grey.
    """
    strengths = torch.tensor([[spec.brightness, spec.contrast, spec.saturation, spec.hue] for spec in specs])  # [V 4]
    active = jittered.unsqueeze(-1) & (strengths > 0).unsqueeze(1)  # [V B 4]
    if not (active.any() or grey.any()):
        return []
    ranges = [[(max(0.0, 1.0 - x), 1.0 + x) for x in (spec.brightness, spec.contrast, spec.saturation)] for spec in specs]
    low = torch.tensor([[start for start, _ in row] for row in ranges]).unsqueeze(1)  # [V 1 3]
    spread = torch.tensor([[end - start for start, end in row] for row in ranges]).unsqueeze(1)
    factors = torch.where(active[..., :3], low + spread * draws[..., :3], 1.0)
    turns = _column(spec.hue for spec in specs) * (2.0 * draws[..., _HUE] - 1.0)

    shifted = active[..., _HUE]
    blends, used = _composed(factors.flatten(0, 1), active=active.flatten(0, 1), order=order.flatten(0, 1), grey=grey.flatten())
    passes = [Change.where("blend", one, numbers=values.unsqueeze(0)) for values, one in zip(blends, used, strict=True)]
    hue = Change.where("hue", shifted, numbers=turns.unsqueeze(-1))
    return [*passes[:_BEFORE_HUE], hue, *passes[_BEFORE_HUE:]]


def _composed(factors: Tensor, *, active: Tensor, order: Tensor, grey: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `blend` Float[S N 3] for S passes over N views, the first three before the hue, and Bool[S N], which of them are needed.

    A blend whose factor is at most 1 stays in [0, 1], so it and the one after it are one. A view has to be clamped, in a pass of its own,
    only between a blend with a larger factor and the next operation. Blends f + g luma + h mean are closed under composition, because the
    luma of a luma is itself.

    Args:
        factors: Float[N 3] of brightness, contrast and saturation; 1 where they are off.
        active: Bool[N 4], which of the four operations are on.
        order: Int[N 4], a permutation of the four operations.
        grey: Bool[N], which views become grey in the end.
    """
    N = len(factors)
    factors = torch.cat((factors.double(), torch.ones(N, 1, dtype=torch.float64)), dim=1).gather(1, order)  # [N 4], in order
    rest = 1.0 - factors
    to_luma, to_mean = (torch.where(order == operation, rest, 0.0) for operation in (_SATURATION, _CONTRAST))
    active = active.gather(1, order)
    is_hue = active & (order == _HUE)
    column = grey.unsqueeze(1)
    steps = zip(
        torch.cat((factors, torch.where(column, 0.0, 1.0)), dim=1).unbind(1),
        torch.cat((to_luma, torch.where(column, 1.0, 0.0)), dim=1).unbind(1),
        torch.cat((to_mean, torch.zeros_like(rest[:, :1])), dim=1).unbind(1),
        torch.cat((active, column), dim=1).unbind(1),
        torch.cat((is_hue, torch.zeros_like(column)), dim=1).unbind(1),
        strict=True,
    )
    blends = torch.zeros(2 * _BEFORE_HUE + 1, N, 3, dtype=torch.float64)
    used = torch.zeros(2 * _BEFORE_HUE + 1, N, dtype=torch.bool)
    place = torch.where(is_hue.any(dim=1), 0, _BEFORE_HUE)  # pass that is being composed
    own, luma, mean = torch.ones_like(rest[:, 0]), torch.zeros_like(rest[:, 0]), torch.zeros_like(rest[:, 0])
    begun, spills = torch.zeros_like(grey), torch.zeros_like(grey)  # is anything composed, and may it lie outside [0, 1]?

    def end(rows: Tensor) -> None:
        index = rows.nonzero().squeeze(1)
        blends[place[index], index] = torch.stack((own, luma, mean), dim=1)[index]
        used[place[index], index] = True

    for factor, luma_factor, mean_factor, is_active, shifts in steps:
        ends = is_active & begun & (spills | shifts)
        end(ends)
        place = torch.where(shifts, _BEFORE_HUE, place + ends.long())
        own, luma, mean = torch.where(ends, 1.0, own), torch.where(ends, 0.0, luma), torch.where(ends, 0.0, mean)
        own, luma, mean = (
            factor * own,
            factor * luma + luma_factor * (own + luma),
            (factor + luma_factor) * mean + mean_factor * (own + luma + mean),
        )
        begun = (begun & ~ends) | (is_active & ~shifts)
        spills = torch.where(is_active, factor > 1.0, spills)
    end(begun)
    return blends, used
