"""The contract of an encoder, and the one registry: an exported backbone must be rebuilt from its card."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from glpretrain.core.patches import patchify
from glpretrain.core.types import EncoderCard, EncoderOutput

_BUILDERS: dict[str, Callable[..., "Encoder"]] = {}


def register(builder: Callable[..., "Encoder"]) -> Callable[..., "Encoder"]:
    """Make a class (or function) buildable by its name from an `EncoderCard`.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"encoder registry: {name!r} is already registered")
    _BUILDERS[name] = builder
    return builder


def build(card: EncoderCard) -> "Encoder":
    """The architecture of a card, with fresh weights.

    Raises:
        ValueError: no encoder of that name is registered, or it does not take the card's arguments.
    """
    return build_from(card.encoder, card.arguments)


def build_from(name: str, arguments: Mapping[str, object]) -> "Encoder":
    """`build` without the rest of a card.

    Args:
        name: of a registered encoder.
        arguments: of its builder.

    Raises:
        ValueError: see `build`.
    """
    if name not in _BUILDERS:
        raise ValueError(f"encoder card: unknown encoder {name!r}; registered: {sorted(_BUILDERS)}")
    builder = _BUILDERS[name]
    try:
        inspect.signature(builder).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"encoder card: arguments of {name}: {error}; accepted: {list(inspect.signature(builder).parameters)}") from error
    return builder(**arguments)


class Encoder(nn.Module, ABC):
    """Items to one `cls` and N `patches` each. Construction reads no file and runs no forward pass.

    A registered builder takes `licence` and `source` beside its own arguments and puts both on the card.
    """

    _card: EncoderCard  # set by the builder

    @property
    def card(self) -> EncoderCard:
        """What has to travel with the weights."""
        return self._card

    @property
    def embed_dim(self) -> int:
        """Width D."""
        return self.card.embed_dim

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Blocks, for layer-wise learning rates."""

    @abstractmethod
    def grid(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis for an item of this shape: channels, height and width of an image, (points, 3) of a cloud.

        Raises:
            ValueError: the shape does not divide into patches.
        """

    @abstractmethod
    def forward(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """Encode one tensor of items, or a list of tensors whose sizes may differ.

        Args:
            items: Float[B *item], or a list of such.
            mask: Bool[B N], True: replaced by the mask token; with a list of items, a list with None where nothing is hidden.
            keep: Int[B M], indices of the only patch tokens that are computed (MAE); `patches` is then Float[B M D], in that order.

        Returns:
            An `EncoderOutput` for a tensor, a list of them for a list.

        Raises:
            ValueError: both `mask` and `keep` are given, or the encoder cannot do what is asked.
        """

    def token_inputs(self, items: Tensor, *, corruption: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs behind every token, and which of them were replaced: what a loss on inputs compares, whatever an item is.

        Args:
            items: Float[B *item], of images here: a token's inputs are the pixels of its patch, row by row.
            corruption: Bool[B *inputs], of images Bool[B H W], True: replaced.

        Returns:
            Float[B C N M], C numbers of each of M inputs, and Bool[B N M].
        """

        height, width = self.card.patch_size

        def by_channel(values: Tensor) -> Tensor:
            patches = patchify(values, patch_size=(height, width)).unflatten(2, (-1, values.shape[1]))  # [B N M C]
            return patches.permute(0, 3, 1, 2).contiguous()  # [B C N M]

        return by_channel(items), by_channel(corruption.unsqueeze(1)).squeeze(1)

    @abstractmethod
    def add_mask_token(self) -> None:
        """Make `mask` usable: adds the learned token (zero at the start). A method calls this before it copies the student.

        Raises:
            ValueError: this encoder cannot hide tokens.
        """

    @abstractmethod
    def require_keep(self) -> None:
        """Say at construction that `keep` will be used.

        Raises:
            ValueError: this encoder cannot drop tokens.
        """

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """Depth of the named parameter: 0 for the embedding, `num_layers` + 1 for what follows the last block."""

    def embeds_patches(self, name: str) -> bool:
        """Does the named parameter belong to the patch embedding, which some methods train more slowly than the rest?"""
        return False

    @abstractmethod
    def backbone_state(self) -> dict[str, Tensor]:
        """Weights in the layout of the wrapped library model (timm's names), without what only pretraining needs (mask token)."""

    @abstractmethod
    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `backbone_state`, strict.

        Raises:
            ValueError: names every missing, extra and mis-shaped tensor.
        """

    def library_config(self, card: EncoderCard) -> dict:
        """The `config.json` with which the wrapped library opens an exported folder by itself; empty where it cannot.

        Args:
            card: the one that is written beside it.
        """
        return {}


def encode_list(
    encode: Callable[..., EncoderOutput], items: Sequence[Tensor], *, mask: Sequence[Tensor | None] | None
) -> list[EncoderOutput]:
    """Encode tensors of several sizes, those of one size in one go.

    Args:
        encode: takes Float[B *item] and `mask`, Bool[B N] or None.
        items: list of Float[B *item].
        mask: None, or as long as `items`.

    Returns:
        One output per tensor, in the order of `items`.

    Raises:
        ValueError: `mask` is not a list as long as `items`.
    """
    masks = [None] * len(items) if mask is None else list(mask)
    if isinstance(mask, Tensor) or len(masks) != len(items):
        given = "one tensor" if isinstance(mask, Tensor) else f"{len(masks)} masks"
        raise ValueError(
            f"encoder: {given} for a list of {len(items)} tensors of items; accepted: a list as long, None where nothing is hidden"
        )
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, views in enumerate(items):
        # Masked and unmasked views stay apart: only then is a view without a mask never asked for a mask token.
        groups.setdefault((*views.shape[1:], masks[position] is not None), []).append(position)
    outputs: dict[int, EncoderOutput] = {}
    for positions in groups.values():
        hidden = [masks[position] for position in positions if masks[position] is not None]
        joined = encode(torch.cat([items[position] for position in positions]), mask=torch.cat(hidden) if hidden else None)
        sizes = [len(items[position]) for position in positions]
        parts = zip(positions, joined.cls.split(sizes), joined.patches.split(sizes), strict=True)
        outputs.update({position: EncoderOutput(cls=cls, patches=patches) for position, cls, patches in parts})
    return [outputs[position] for position in range(len(items))]


def load_strictly(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` that accepts exactly the module's names and shapes.

    Raises:
        ValueError: names every missing, extra and mis-shaped tensor.
    """
    own = module.state_dict()
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"missing {missing}")
    if extra := sorted(state.keys() - own.keys()):
        problems.append(f"unknown {extra}")
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, accepted {tuple(own[name].shape)}")
    if problems:
        raise ValueError("weights do not fit the encoder: " + "; ".join(problems))
    module.load_state_dict(state)
