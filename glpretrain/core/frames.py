"""Where a view lies in its item: one affine map per view, whatever the number of axes.

A frame Float[A A+1] takes a place in the view, with every coordinate in [0, 1] along an axis of the view's tensor, to a place in the
item. Coordinates are in the order of the tensor's axes: row and column of an image. A crop scales and shifts, a flip has a negative
scale, a quarter turn exchanges two axes. Frames bring places of different views into their common item, where they can be compared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_centres(frames: Tensor, *, grid: Sequence[int]) -> Tensor:
    """Float[*S N A]: where the centre of every token of a view lies in the item, by frames Float[*S A A+1] and the grid of tokens."""
    along = [(torch.arange(count, device=frames.device) + 0.5) / count for count in grid]
    centres = torch.stack(torch.meshgrid(*along, indexing="ij"), dim=-1).flatten(0, -2)  # [N A]
    return places(frames, centres)


def token_sides(frames: Tensor, *, grid: Sequence[int]) -> Tensor:
    """Float[*S A]: length of a token of a grid along each axis of the item, by frames Float[*S A A+1] of views with parallel axes."""
    # After a quarter turn, the view's axes are exchanged.
    return torch.stack([(frames[..., axis] / count).abs() for axis, count in enumerate(grid)]).sum(dim=0)


def matches(queries: Tensor, keys: Tensor, *, spacing: Tensor, max_distance: float) -> tuple[Tensor, Tensor]:
    """Int[B M] and Bool[B M]: the nearest key of every query, and whether it is within `max_distance`.

    Args:
        queries: Float[B M A], places in the item.
        keys: Float[B N A], places in the same item.
        spacing: Float[B A] or Float[B 1], how far neighbouring keys are apart along each axis.
        max_distance: largest distance, in spacings.
    """
    scaled = [points / spacing.unsqueeze(1) for points in (queries, keys)]
    distance, nearest = torch.cdist(scaled[0], scaled[1]).min(dim=-1)
    return nearest, distance <= max_distance


def places(frames: Tensor, centres: Tensor) -> Tensor:
    """Places in the item, Float[*S N A], of places in the view, Float[N A] or Float[*S N A], by frames Float[*S A A+1]."""
    # No matrix product, which may run in half precision or TF32.
    return (frames[..., None, :, :-1] * centres[..., None, :]).sum(dim=-1) + frames[..., None, :, -1]


def crop_frames(boxes: Tensor, *, flip: Tensor, turns: Tensor) -> Tensor:
    """Float[*S 2 3]: frames of crops of images, rows and columns in this order.

    Args:
        boxes: Float[*S 4], x0 y0 x1 y1 in the item's unit square.
        flip: Bool[*S], True: the crop was flipped left to right.
        turns: Int[*S], quarter turns counterclockwise after the flip.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    left, width = torch.where(flip, x1, x0), torch.where(flip, x0 - x1, x1 - x0)
    zero, height = torch.zeros_like(x0), y1 - y0
    # One turn brought what was at (row a, column b) to (row 1 - b, column a); so a place of the view goes back to (column, 1 - row).
    by_turns = torch.stack(
        [
            torch.stack([height, zero, y0, zero, width, left], dim=-1),
            torch.stack([zero, height, y0, -width, zero, left + width], dim=-1),
            torch.stack([-height, zero, y0 + height, zero, -width, left + width], dim=-1),
            torch.stack([zero, -height, y0 + height, width, zero, left], dim=-1),
        ],
        dim=-2,
    )  # [*S 4 6]
    chosen = by_turns.gather(-2, (turns % 4)[..., None, None].expand(*turns.shape, 1, 6)).squeeze(-2)
    return chosen.unflatten(-1, (2, 3))
