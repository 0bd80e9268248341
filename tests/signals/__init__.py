"""A toy modality with one axis: short signals Float[C L]. Everything that the package has to know of it is in this file.

Tests register it by one line, as `glpretrain.modalities` registers images and clouds; nothing else is told about it.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.types import EncoderCard, EncoderOutput, Item
from glpretrain.data.sources.base import Source, checked_index
from glpretrain.data.views import Changes, ViewMaker, Views
from glpretrain.encoders.base import Encoder, register
from glpretrain.encoders.states import load_strictly
from glpretrain.modalities import Fit, Modality, Size


class Signal(Modality):
    """Signals of one channel and any length."""

    name = "signal"
    axes = ("C", "L")
    num_coordinates = 1
    channel_axis = 0
    embedded_source = "signals.Waves"
    embedded_size = "size"
    own_sources = ("signals.Waves",)
    held = ("builtins.list", "torch.as_tensor")
    masked_source = "signals.Waves"
    default_evaluators = {"knn": "glpretrain.evaluate.KNN", "linear": "glpretrain.evaluate.LinearProbe"}  # noqa: RUF012  a ClassVar of the base
    page = "glpretrain.report.write_report"

    def item_shape(self, card: EncoderCard, size: Size | None) -> tuple[int, ...]:
        return (card.item_shape[0], card.item_shape[1] if size is None else int(size))  # type: ignore[arg-type]

    def resize(self, item: Item, shape: Sequence[int], *, fit: Fit) -> Item:
        return item._replace(values=stretched(item.values, shape[1]))

    def normalise(self, items: Tensor, card: EncoderCard) -> Tensor:
        return (items - torch.tensor(card.mean)[:, None]) / torch.tensor(card.std)[:, None]

    def inputs_of_tokens(self, tokens: Tensor, views: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        return tokens.repeat_interleave(views.shape[2] // grid[0], dim=1)

    def pictures(self, views: Tensor, *, card: EncoderCard, dimmed: Tensor | None = None) -> Tensor:
        shade = (views[:, 0] * 0.25 + 0.5).clamp(0, 1)  # [B L]
        shade = shade if dimmed is None else torch.where(dimmed, 0.2 * shade, shade)
        return shade[:, None, :, None].expand(-1, 8, -1, 3)

    def describe_size(self, card: EncoderCard) -> str:
        return f"{card.item_shape[1]} samples"


def stretched(values: Tensor, length: int) -> Tensor:
    """Float[C L] to Float[C length]."""
    return nn.functional.interpolate(values[None], size=length, mode="linear", align_corners=False)[0]


class Waves(Source):
    """Sines, squares and triangles of some frequency and phase, with noise."""

    name = "waves"
    classes = ("sine", "square", "triangle")
    modality = "signal"

    def __init__(self, length: int = 60, *, size: int = 64) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        key = rng.item_keys(seed=7, epoch=0, index=torch.tensor(checked_index(index, len(self))))
        frequency, phase = (2.0 + 2.0 * rng.uniform(key, 2)).tolist()
        angle = 2 * math.pi * (frequency * torch.arange(self.size) / self.size + phase)
        wave = (angle.sin(), angle.sin().sign(), torch.asin(angle.sin()))[index % 3]
        return Item((wave + 0.05 * rng.normal(rng.fold_in(key, 1), self.size))[None], index % 3, None, None)


class SignalCrops(ViewMaker):
    """Two global and two local crops, half of them reversed."""

    modality = "signal"

    def __init__(self, *, size: int = 32, local_size: int = 16) -> None:
        super().__init__()
        self.sizes = {"global": size, "local": local_size}

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        return {name: (2, (num_channels, size)) for name, size in self.sizes.items()}

    def default_size(self) -> int:
        return 2 * self.sizes["global"]

    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        return {"items": torch.stack([stretched(item.values, self.default_size()) for item in items])}

    def make(self, parts: Mapping[str, Tensor], *, changes: Mapping[str, Changes], keys: Tensor, card: EncoderCard) -> Views:
        groups = {}
        for number, (name, size) in enumerate(self.sizes.items()):
            pairs = [self._crop(parts["items"], keys=rng.fold_in(keys, 2 * number + view), size=size) for view in range(2)]
            views, frames = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            groups[name] = ViewGroup((views - card.mean[0]) / card.std[0], frame=frames)
        return Views(groups)

    @staticmethod
    def _crop(items: Tensor, *, keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Float[B C size] and Float[B 1 2]: a stretch of `size` samples that begins anywhere, read from either end."""
        length = items.shape[2]
        first = rng.integers(keys, 0, length - size + 1)  # [B]
        reverse = rng.uniform(rng.fold_in(keys, 1)) < 0.5
        steps = torch.where(reverse[:, None], torch.arange(size - 1, -1, -1), torch.arange(size))
        views = items.gather(2, (first[:, None] + steps).unsqueeze(1).expand(-1, items.shape[1], -1))
        scale = torch.where(reverse, -size / length, size / length)
        start = (first + torch.where(reverse, size, 0)) / length
        return views, torch.stack([scale, start], dim=-1).unsqueeze(1)


@register
class SignalTransformer(Encoder):
    """Patches of eight samples, a class token, one transformer layer."""

    def __init__(self, *, size: int = 32, patch: int = 8, embed_dim: int = 12, licence: str = "", source: str = "") -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed": nn.Linear(patch, embed_dim),
                "block": nn.TransformerEncoderLayer(embed_dim, 3, 2 * embed_dim, dropout=0.0, batch_first=True),
            }
        )
        self.cls_token = nn.Parameter(torch.zeros(embed_dim))
        self.register_parameter("mask_token", None)
        arguments = {"size": size, "patch": patch, "embed_dim": embed_dim, "licence": licence, "source": source}
        self._card = EncoderCard("SignalTransformer", arguments, "signal", (1, size), (patch,), embed_dim, (0.1,), (0.8,), licence, source)

    @property
    def num_layers(self) -> int:
        return 1

    def grid(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        (patch,) = self.card.patch_size
        if item_shape[1] % patch:
            raise ValueError(f"signal of {item_shape[1]} samples does not divide by {patch}")
        return (item_shape[1] // patch,)

    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        (count,) = self.grid(items.shape[1:])
        tokens = self.model["embed"](items[:, 0].unflatten(1, (count, -1)))  # [B N D]
        places = torch.sin(torch.arange(count)[:, None] * torch.arange(1, tokens.shape[2] + 1) / 10)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token, tokens)
        tokens = torch.cat([self.cls_token.expand(len(items), 1, -1), tokens + places], dim=1)
        tokens = self.model["block"](tokens)
        return EncoderOutput(cls=tokens[:, 0], patches=tokens[:, 1:])

    def add_mask_token(self) -> None:
        if self.mask_token is None:
            self.mask_token = nn.Parameter(torch.zeros(self.embed_dim))

    def require_keep(self) -> None:
        raise ValueError("SignalTransformer cannot drop tokens")

    def layer_of(self, name: str) -> int:
        return 1 if "block" in name else 0

    def backbone_state(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), "cls_token": self.cls_token.detach()}

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.cls_token.copy_(state["cls_token"])
        load_strictly(self.model, {name: value for name, value in state.items() if name != "cls_token"})
