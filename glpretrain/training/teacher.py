"""The two kinds of teacher: a moving copy of the student, and a frozen expert of any other shape.

Left out: where an expert's weights come from (`glpretrain.weights.load_expert`).
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.fingerprint import fingerprint
from glpretrain.training.branch import Branch

Precision = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EMATeacher(nn.Module):
    """A copy of a branch without gradients, always in evaluation mode, that follows it.

    Args:
        branch: the student; copied, so what it has at this moment (mask token, heads) the teacher has too.
    """

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = copy.deepcopy(branch).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stay in evaluation mode whatever the surrounding module does: the teacher drops no paths."""
        self.training = mode
        return self

    @torch.no_grad()
    def update(self, branch: nn.Module, *, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, parameters in float32; buffers are copied."""
        mine, theirs = dict(self.branch.named_parameters()), dict(branch.named_parameters())
        assert mine.keys() == theirs.keys(), f"teacher and student differ in {sorted(mine.keys() ^ theirs.keys())}"
        full = [name for name, value in mine.items() if value.dtype == torch.float32]
        if full:
            torch._foreach_lerp_([mine[n] for n in full], [theirs[n].detach() for n in full], 1.0 - momentum)
        for name in mine.keys() - set(full):  # half-precision weights: one step of 1 - momentum would round away
            mine[name].copy_(mine[name].float().lerp_(theirs[name].detach().float(), 1.0 - momentum))
        copies, buffers = dict(self.branch.named_buffers()), dict(branch.named_buffers())
        assert copies.keys() == buffers.keys(), f"teacher and student differ in {sorted(copies.keys() ^ buffers.keys())}"
        for name, value in copies.items():
            value.copy_(buffers[name])


class FrozenTeacher(nn.Module):
    """An expert: an encoder that never learns, sees views in its own normalisation and size, and is in no checkpoint.

    Its weights are parameters without gradient, so that they move with the module and DistributedDataParallel sends them once, not
    at every step as it does buffers; `state_dict` leaves them out. What a checkpoint needs to know of them is `fingerprint`.

    Args:
        encoder: any; `load_expert` of `glpretrain.weights` gives one with the weights of a file. Kept, not copied.
        size: height and width that views are resized to, or one number for both; None is the size that the encoder's card says.
        precision: of its weights and of what it computes; the surrounding autocast has no say.

    Raises:
        ValueError: a size that does not divide into the encoder's patches, or an unknown precision.
    """

    def __init__(self, encoder: Encoder, *, size: int | tuple[int, int] | None = None, precision: Precision = "float32") -> None:
        super().__init__()
        if precision not in _DTYPES:
            raise ValueError(f"FrozenTeacher: precision={precision!r} given; accepted: {', '.join(_DTYPES)}")
        channels, *own = encoder.card.item_shape
        self.size = tuple(own) if size is None else (size, size) if isinstance(size, int) else tuple(size)
        self.grid: tuple[int, ...] = encoder.grid((channels, *self.size))
        self.fingerprint = fingerprint(encoder)
        self.encoder = encoder.requires_grad_(False).eval().to(_DTYPES[precision])
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)

    @property
    def embed_dim(self) -> int:
        """Width of what it gives."""
        return self.encoder.embed_dim

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode whatever the surrounding module does."""
        self.training = mode
        return self

    def prepare(self, views: Tensor, *, card: EncoderCard) -> Tensor:
        """Views as the expert wants them.

        Args:
            views: Float[B C H W], normalised as `card` says.
            card: of the student.

        Returns:
            Float[B C h w] of the expert's size and normalisation, in float32.

        Raises:
            ValueError: the student's items have another number of channels.
        """
        own = self.encoder.card
        if card.item_shape[0] != own.item_shape[0]:
            raise ValueError(f"expert: its items have {own.item_shape[0]} channels, the student's {card.item_shape[0]}; make them equal")
        views = views.float()
        if views.shape[2:] != self.size:
            views = F.interpolate(views, size=self.size, mode="bicubic", align_corners=False, antialias=True)
        if (card.mean, card.std) == (own.mean, own.std):
            return views
        # Undone and done again in one step, channel by channel with numbers of the host: nothing is copied to the device. A
        # resampling's weights sum to one, so it does not matter that it came first.
        statistics = zip(views.unbind(1), card.mean, card.std, own.mean, own.std, strict=True)
        return torch.stack([channel * (std / to_std) + (mean - to_mean) / to_std for channel, mean, std, to_mean, to_std in statistics], 1)

    @torch.no_grad()
    def forward(self, views: Tensor, *, card: EncoderCard) -> EncoderOutput:
        """What the expert makes of views, without gradient.

        Args:
            views: Float[B C H W], normalised as `card` says.
            card: of the student.

        Returns:
            `cls` Float[B D] and `patches` Float[B N D] in float32; N tokens in `grid`.
        """
        with torch.autocast(device_type=views.device.type, enabled=False):
            output = self.encoder(self.prepare(views, card=card).to(next(self.encoder.parameters()).dtype))
        return EncoderOutput(cls=output.cls.float(), patches=output.patches.float())


def _leave_out(module: FrozenTeacher, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _put_back(module: FrozenTeacher, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    """Loading asks for every tensor that the module has: it is handed those that are there already."""
    state.update(module.encoder.state_dict(prefix=f"{prefix}encoder."))
