"""Rotary positions of DINOv3 that are shifted, stretched and rescaled at random in training.

A model that always sees the same coordinates learns the sizes that it is trained at. DINOv3 therefore changes them (Simeoni et al.,
"DINOv3", arXiv 2508.10104, sec. 3.2; facebookresearch/dinov3 at 6876159, layers/rope_position_encoding.py and forward_features_list of
models/vision_transformer.py), by draws of their own for every block and every group of items of one size, the same for all items of the
group. In evaluation mode, and so in every teacher, positions are those of timm.

Ours: the draws are made from the key of the group's first item, where the official ones come from the generator of a process. Items that
are encoded together share them, so processes, micro-batches and chunks have draws of their own. Left out: coordinates that are divided by
the longer or the shorter side, which no published model has.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from torch import Tensor, nn

from glpretrain.core import keys as rng

_POSITIONS = 0x707E  # purpose that the key of a group's first item is folded with
_NUM_DRAWS = 5  # of a block: shift of rows and columns, jitter of both, one rescaling
_LARGEST = 1000.0


@dataclass(frozen=True)
class RopeAugmentation:
    """How far the coordinates of rotary positions, which are in [-1, 1], are moved in training; what is left out does not move.

    Args:
        shift: largest shift of either axis, drawn uniformly from [-`shift`, `shift`].
        jitter: largest factor on either axis, drawn from [1 / `jitter`, `jitter`] with a uniform logarithm.
        rescale: the same for one factor on both axes. DINOv3's published models have 2 here, and nothing else.

    Raises:
        ValueError: nothing is given, or a number is out of range.
    """

    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ValueError("rope_augmentation: nothing given that changes positions; give shift, jitter or rescale, or leave it out")
        for name, value in given.items():
            least = 0.0 if name == "shift" else 1.0
            if not least < value <= _LARGEST:
                raise ValueError(f"rope_augmentation: {name}={value} given; accepted: above {least:g} and at most {_LARGEST:g}")

    def moved(self, coordinates: Tensor, *, draws: Tensor) -> Tensor:
        """Float[L N 2]: the coordinates of N tokens as each of L blocks sees them.

        Args:
            coordinates: Float[N 2], row and column in [-1, 1].
            draws: Float[L 5], uniform on [0, 1).
        """
        shift, jitter, rescale = (2.0 * draws - 1.0).unsqueeze(1).split((2, 2, 1), dim=2)  # [L 1 2], [L 1 2], [L 1 1]
        moved = coordinates.unsqueeze(0)
        if self.shift is not None:
            moved = moved + self.shift * shift
        if self.jitter is not None:
            moved = moved * torch.exp(math.log(self.jitter) * jitter)
        if self.rescale is not None:
            moved = moved * torch.exp(math.log(self.rescale) * rescale)
        return moved.expand(len(draws), -1, -1)


class AugmentedRope(nn.Module):
    """timm's rotary positions of DINOv3, other ones for every block while `drawn_positions` tells the key of the first item.

    Without that, draws come from torch's generator, as those of dropped paths do.

    Args:
        rope: what timm has built; it has no weights, so names of weights stay as they are.
        augmentation: what is moved.
        num_blocks: number of blocks.
    """

    key: Tensor | None = None  # Int[]

    def __init__(self, rope: RotaryEmbeddingDinoV3, *, augmentation: RopeAugmentation, num_blocks: int) -> None:
        super().__init__()
        self.rope, self.augmentation, self.num_blocks = rope, augmentation, num_blocks

    def get_embed(self, shape: Sequence[int]) -> Tensor:
        """Float[N 2d] of sines and cosines for heads of width d, the same for all blocks; in training mode Float[L N 2d], for each block.

        Args:
            shape: rows and columns of tokens, N in all.
        """
        if not self.training:
            return self.rope.get_embed(list(shape))
        periods = self.rope.periods
        assert isinstance(periods, Tensor)
        axes = [(torch.arange(count, device=periods.device, dtype=periods.dtype) + 0.5) / count for count in shape]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # [N 2]
        angles = 2.0 * math.pi * self.augmentation.moved(2.0 * places - 1.0, draws=self._draws(periods)).unsqueeze(3) / periods
        angles = angles.flatten(2).repeat(1, 1, 2)  # [L N d]
        return torch.cat([angles.sin(), angles.cos()], dim=2)

    def _draws(self, like: Tensor) -> Tensor:
        """Float[L 5], uniform on [0, 1)."""
        size = (self.num_blocks, _NUM_DRAWS)
        drawn = torch.rand(size, device=like.device) if self.key is None else rng.uniform(rng.fold_in(self.key, _POSITIONS), *size)
        return drawn.to(like.dtype)


def augment_positions(model: nn.Module, augmentation: RopeAugmentation, *, name: str) -> None:
    """Let the positions of a model of DINOv3 be moved in training; a ValueError refuses other models.

    Args:
        model: timm's model.
        augmentation: what is moved.
        name: name of the model, for messages.
    """
    if not isinstance(model, Eva) or not isinstance(model.rope, RotaryEmbeddingDinoV3):
        raise ValueError(f"ViT: rope_augmentation given; {name} has no rotary positions of DINOv3")
    model.rope = AugmentedRope(model.rope, augmentation=augmentation, num_blocks=len(model.blocks))


def moving_positions(module: nn.Module) -> list[AugmentedRope]:
    """The positions inside a module that are moved in training mode."""
    return [part for part in module.modules() if isinstance(part, AugmentedRope) and part.training]


@contextmanager
def drawn_positions(module: nn.Module, keys: Tensor | None) -> Iterator[None]:
    """Inside this context, positions are moved by draws from the key of the first item.

    Args:
        module: module in training mode; in evaluation mode nothing is drawn.
        keys: Int[B] of items of one size; None draws from torch's generator.
    """
    parts = [] if keys is None else moving_positions(module)
    for part in parts:
        part.key = keys[0] if keys is not None else None
    try:
        yield
    finally:
        for part in parts:
            part.key = None
