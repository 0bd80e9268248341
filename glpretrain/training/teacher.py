"""The two kinds of teacher: a moving copy of the student, and a frozen expert of any other architecture.

Left out: where an expert's weights come from (`glpretrain.weights.load_expert`).
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core.shards import local
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.states import fingerprint
from glpretrain.training.branch import Branch, batch_norms

Precision = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EMATeacher(nn.Module):
    """A copy of the student that follows it as a moving average: without gradients, and in evaluation mode.

    Batch norms are the exception, as in the official codes (DINO's main_dino.py, POS-BERT's pretrain.py): while the method trains, they
    normalise the teacher's own batch and keep its statistics, which evaluation and export then use. The student's would mix in all the
    views that the teacher never sees, such as small crops and corrupted views.

    Args:
        branch: the student. It is copied, so the teacher has what the student has at this moment (mask token, heads).
    """

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = copy.deepcopy(branch).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Keep all parts but batch norms in evaluation mode, whatever the mode of the module around it: the teacher drops no paths."""
        self.training = mode
        self.branch.eval()
        for name in batch_norms(self.branch):
            self.branch.get_submodule(name).train(mode)
        return self

    @torch.no_grad()
    def update(self, branch: nn.Module, *, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter in float32; buffers are copied, except those of
        batch norms."""
        # Of sharded ones the part of this process: both sides are divided alike.
        own, student = ({name: local(value) for name, value in side.named_parameters()} for side in (self.branch, branch))
        assert own.keys() == student.keys(), f"teacher and student differ in {sorted(own.keys() ^ student.keys())}"
        full = [name for name, value in own.items() if value.dtype == torch.float32]
        if full:
            means: list[Tensor] = [own[name] for name in full]
            values = [student[name].detach() for name in full]
            torch._foreach_lerp_(means, values, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]  it has no public name
        for name in own.keys() - set(full):  # half-precision weights: one step of 1 - momentum would round away
            own[name].copy_(own[name].float().lerp_(student[name].detach().float(), 1.0 - momentum))
        own, student = dict(self.branch.named_buffers()), dict(branch.named_buffers())
        assert own.keys() == student.keys(), f"teacher and student differ in {sorted(own.keys() ^ student.keys())}"
        norms = set(batch_norms(self.branch))
        for name, value in own.items():
            if name.rpartition(".")[0] not in norms:
                value.copy_(student[name])


class FrozenTeacher(nn.Module):
    """An expert: an encoder that never learns and that sees views in its own normalisation and size.

    Its weights are parameters without gradient, so that they move with the module and DistributedDataParallel sends them once, not at
    every step as it does with buffers. They are in no checkpoint: `state_dict` leaves them out, and a checkpoint stores `fingerprint`.

    Args:
        encoder: any encoder; `glpretrain.weights.load_expert` loads one from a file. It is kept, not copied.
        size: height and width that views are resized to, or one number for both; None is the size on the encoder's card.
        precision: precision of the weights and of the computation, whatever the autocast around it.

    Raises:
        ValueError: the size does not divide into the encoder's patches, or the precision is unknown.
    """

    def __init__(self, encoder: Encoder, *, size: int | tuple[int, int] | None = None, precision: Precision = "float32") -> None:
        super().__init__()
        if precision not in _DTYPES:
            raise ValueError(f"FrozenTeacher: precision={precision!r} given; accepted: {', '.join(_DTYPES)}")
        channels, *own = encoder.card.item_shape
        self.size: tuple[int, ...] = tuple(own) if size is None else (size, size) if isinstance(size, int) else tuple(size)
        self.grid: tuple[int, ...] = encoder.grid((channels, *self.size))
        self.fingerprint = fingerprint(encoder)
        self.encoder = encoder.requires_grad_(False).eval().to(_DTYPES[precision])
        self.register_state_dict_post_hook(_remove_weights)
        self.register_load_state_dict_pre_hook(_add_weights)

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return self.encoder.embed_dim

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Keep the encoder in evaluation mode, whatever the mode of the module around it."""
        self.training = mode
        return self

    def prepare(self, views: Tensor, *, card: EncoderCard) -> Tensor:
        """Float[B C h w]: views, Float[B C H W] normalised for the student's card, in the expert's size and normalisation, in float32.

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
        # One normalisation undone and the other one applied in one step, channel by channel, with numbers of the host: nothing is copied
        # to the device. The weights of a resampling sum to one, so it does not matter that it came first.
        statistics = zip(views.unbind(1), card.mean, card.std, own.mean, own.std, strict=True)
        return torch.stack([channel * (std / to_std) + (mean - to_mean) / to_std for channel, mean, std, to_mean, to_std in statistics], 1)

    @torch.no_grad()
    def forward(self, views: Tensor, *, card: EncoderCard) -> EncoderOutput:
        """The expert's output in float32, without gradient and with the N tokens of `grid`; arguments as in `prepare`."""
        with torch.autocast(device_type=views.device.type, enabled=False):
            output = self.encoder(self.prepare(views, card=card).to(next(self.encoder.parameters()).dtype))
        registers = None if output.registers is None else output.registers.float()
        return EncoderOutput(cls=output.cls.float(), patches=output.patches.float(), registers=registers)


def _remove_weights(module: FrozenTeacher, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _add_weights(module: FrozenTeacher, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    """Loading asks for every tensor of the module: hand it the weights that the module has already."""
    state.update(module.encoder.state_dict(prefix=f"{prefix}encoder."))
