"""The contract of an encoder, the registry that rebuilds one from its card, and what all encoders share."""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar, overload

import torch
from torch import Tensor, nn

from glpretrain.core.patches import pixels_of_patches
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.drop_path import drawn_paths
from glpretrain.encoders.sequences import encode_list

_Builder = TypeVar("_Builder", bound=Callable[..., "Encoder"])
_BUILDERS: dict[str, Callable[..., "Encoder"]] = {}


def register(builder: _Builder) -> _Builder:
    """Register a class (or a function) under its name, so that `build` finds it.

    Raises:
        ValueError: the name is already registered.
    """
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"encoder registry: {name!r} is already registered; choose another name")
    _BUILDERS[name] = builder
    return builder


def build(card: EncoderCard) -> "Encoder":
    """The architecture of a card, with fresh weights.

    Raises:
        ValueError: no encoder is registered under that name, or it does not accept the card's arguments.
    """
    return build_from(card.encoder, card.arguments)


def build_from(name: str, arguments: Mapping[str, object]) -> "Encoder":
    """`build` from the registered name of an encoder and the arguments of its constructor."""
    if name not in _BUILDERS:
        raise ValueError(f"encoder card: unknown encoder {name!r}; registered: {sorted(_BUILDERS)}")
    builder = _BUILDERS[name]
    try:
        inspect.signature(builder).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"encoder card: arguments of {name}: {error}; accepted: {list(inspect.signature(builder).parameters)}") from error
    return builder(**arguments)


class Encoder(nn.Module, ABC):
    """Turns each item into one `cls` and N `patches`. The constructor reads no file and runs no forward pass.

    The wrapped library model is the submodule `model`, unless an encoder has its own `backbone_state` and `load_backbone_state`.
    A registered builder takes `licence` and `source` beside its own arguments and writes both on the card.
    """

    _card: EncoderCard  # set by the builder

    @property
    def card(self) -> EncoderCard:
        """What must travel with the weights."""
        return self._card

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self.card.embed_dim

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of blocks, for learning rates that differ from layer to layer."""

    @abstractmethod
    def grid(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        """Number of tokens along each axis of an item.

        Args:
            item_shape: shape of the item: channels, height and width of an image, (points, 3) of a cloud.

        Raises:
            ValueError: the shape does not divide into patches.
        """

    if TYPE_CHECKING:  # torch declares that calling a module returns anything

        @overload
        def __call__(
            self, items: Tensor, *, mask: Tensor | None = None, keep: Tensor | None = None, keys: Tensor | None = None
        ) -> EncoderOutput: ...
        @overload
        def __call__(
            self, items: Sequence[Tensor], *, mask: Sequence[Tensor | None] | None = None, keys: Sequence[Tensor] | None = None
        ) -> list[EncoderOutput]: ...
        def __call__(self, items, *, mask=None, keep=None, keys=None) -> EncoderOutput | list[EncoderOutput]: ...

    def forward(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
        keys: Tensor | Sequence[Tensor] | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """Encode one tensor of items, or a list of tensors whose sizes may differ.

        In training mode, batch norm sees all tensors of one size in a list as one batch.

        Args:
            items: Float[B *item], or a list of such tensors.
            mask: Bool[B N], True where the mask token replaces a token. With a list of items, a list that holds None where nothing is
                hidden.
            keep: Int[B M], indices of the only patch tokens that are computed (MAE); `patches` is then Float[B M D], in that order.
            keys: Int[B], what the dropped paths of each item are drawn from in training mode; with a list of items, a list. Without keys,
                they are drawn from torch's generator, as timm does.

        Returns:
            An `EncoderOutput` for a tensor, a list of them for a list.

        Raises:
            ValueError: both `mask` and `keep` are given, one has a wrong shape, or the encoder cannot hide or drop tokens.
        """
        name = type(self).__name__
        if mask is not None and keep is not None:
            raise ValueError(f"{name}: mask and keep were both given; hide tokens or drop them, not both")
        if keep is not None:
            self.require_keep()
        if not isinstance(items, Tensor):
            if keep is not None:
                raise ValueError(f"{name}: keep was given with a list of items; keep needs one tensor of items")
            assert not isinstance(keys, Tensor), "a list of keys for a list of items"
            return encode_list(self._with_paths, items, mask=mask, keys=keys)
        if not (mask is None or isinstance(mask, Tensor)):
            raise ValueError(f"{name}: a list of masks was given with one tensor of items; give one mask")
        if keep is not None and (keep.dim() != 2 or keep.shape[0] != items.shape[0]):
            raise ValueError(f"{name}: keep has shape {tuple(keep.shape)}; accepted: ({items.shape[0]}, tokens to keep)")
        assert keys is None or isinstance(keys, Tensor), "one tensor of keys for one tensor of items"
        return self._with_paths(items, mask=mask, keep=keep, keys=keys)

    def _with_paths(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None, keys: Tensor | None = None) -> EncoderOutput:
        if keys is None or not self.training:
            return self._encode(items, mask=mask, keep=keep)
        with drawn_paths(self, keys):
            return self._encode(items, mask=mask, keep=keep)

    @abstractmethod
    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        """`forward` of one tensor of items; `mask` and `keep` are not both given, and `keep` has B rows."""

    def token_inputs(self, items: Tensor, *, corruption: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of every token, and which of them were replaced: what a loss on inputs compares, whatever an item is.

        Args:
            items: Float[B *item]; here images, where the inputs of a token are the pixels of its patch, row by row.
            corruption: Bool[B *inputs], True where an input was replaced; Bool[B H W] of images.

        Returns:
            Float[B C N M], C numbers of each of M inputs, and Bool[B N M].
        """
        height, width = self.card.patch_size
        values, replaced = (pixels_of_patches(images, patch_size=(height, width)) for images in (items, corruption.unsqueeze(1)))
        return values, replaced.squeeze(1)

    @abstractmethod
    def add_mask_token(self) -> None:
        """Add the learned mask token (zero at the start), which `mask` needs. A method calls this before it copies the student.

        Raises:
            ValueError: this encoder cannot hide tokens.
        """

    @abstractmethod
    def require_keep(self) -> None:
        """Check at construction that `keep` can be used.

        Raises:
            ValueError: this encoder cannot drop tokens.
        """

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """Depth of the named parameter: 0 for the embedding, `num_layers` + 1 for what follows the last block."""

    def embeds_patches(self, name: str) -> bool:
        """Whether the named parameter belongs to the patch embedding, which some methods train more slowly than the rest."""
        return False

    def backbone_state(self) -> dict[str, Tensor]:
        """Weights under the names of the wrapped library model (timm's), without what only pretraining needs (the mask token)."""
        return self.get_submodule("model").state_dict()

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """Load what `backbone_state` returned; see `load_strictly`."""
        load_strictly(self.get_submodule("model"), state)

    def library_config(self, card: EncoderCard) -> dict[str, object]:
        """The `config.json` with which the wrapped library opens an exported folder by itself; empty where it cannot.

        Args:
            card: card that is written beside it.
        """
        return {}


def check_numbers(encoder: str, *, counts: Mapping[str, int | None], positive: Mapping[str, float | None], drop_path_rate: float) -> None:
    """Refuse, with a ValueError, counts below 1, numbers that are not positive and rates outside [0, 1); None is left out."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{encoder}: {name}={value} given; accepted: at least 1")
    for name, value in positive.items():
        if value is not None and value <= 0.0:
            raise ValueError(f"{encoder}: {name}={value} given; accepted: above 0")
    if not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f"{encoder}: drop_path_rate={drop_path_rate} given; accepted: [0, 1)")


def load_strictly(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` that accepts exactly the module's names and shapes.

    Raises:
        ValueError: names every missing tensor, every unknown one and every tensor of a wrong shape.
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


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 of the weights, their names and the card: the same for an encoder and its export, on any device."""
    digest = hashlib.sha256()
    card = asdict(encoder.card)
    # The licence and the source of the weights change no feature.
    for part in (card, card["arguments"]):
        part.update(dict.fromkeys(("licence", "source"), ""))
    digest.update(json.dumps(card, sort_keys=True).encode())
    for name, tensor in sorted(encoder.backbone_state().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
