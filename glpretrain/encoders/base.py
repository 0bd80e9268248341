"""The contract of an encoder, the registry that rebuilds one from its card, and what all encoders share."""

import inspect
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, overload

from torch import Tensor, nn

from glpretrain.core.frames import token_centres, token_sides
from glpretrain.core.imports import imported
from glpretrain.core.types import Embedded, EncoderCard, EncoderOutput
from glpretrain.encoders.checkpointing import recomputing
from glpretrain.encoders.documents import PackedAttention
from glpretrain.encoders.drop_path import drawn_paths
from glpretrain.encoders.kernels import fastest_attention
from glpretrain.encoders.local_norm import of_views
from glpretrain.encoders.rope import drawn_positions
from glpretrain.encoders.sequences import Views, encode_in_chunks, encode_list
from glpretrain.encoders.states import load_strictly

# Arguments of builders that are words or flags.
_WORDS = ("name", "position_resize", "positions", "ffn", "initial", "modality", "licence", "source")
_FLAGS = ("drop_path_uniform", "class_token", "no_embed_class", "final_norm", "key_bias")
PRETRAINING = ("mask_token", "local_norm.weight", "local_norm.bias")  # tensors that no backbone has

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
    encoder = build_from(card.encoder, card.arguments)
    encoder.set_value_range(card.value_range)
    return encoder


def build_from(name: str, arguments: Mapping[str, object]) -> "Encoder":
    """`build` from the registered name of an encoder and the arguments of its constructor."""
    if name not in _BUILDERS:
        raise ValueError(f"encoder card: unknown encoder {name!r}; registered: {sorted(_BUILDERS)}")
    for words, kind in ((_WORDS, str), (_FLAGS, bool)):
        for word in arguments.keys() & set(words):
            if not isinstance(value := arguments[word], kind | None):
                raise ValueError(f"encoder card: {word}={reprlib.repr(value)} given; accepted: {kind.__name__}")
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

    begins_with: ClassVar[tuple[str, ...]] = ()  # submodules that only `_begin` runs; batch norm in them sees the whole batch
    _card: EncoderCard  # set by the builder
    activation_checkpointing = False  # set by `training.branch.Branch`
    packed_attention: PackedAttention = "grouped"  # the same, where it can take effect
    packs_views = False  # whether views of several sizes can be encoded in one sequence of tokens

    @property
    def card(self) -> EncoderCard:
        """What must travel with the weights."""
        return self._card

    def set_value_range(self, pairs: Sequence[tuple[float, float]]) -> None:
        """Put on the card which low and high value of each channel become 0 and 255 where files are read."""
        self._card = replace(self._card, value_range=tuple(pairs))

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self.card.embed_dim

    # Reading and resizing are done by rooms above this one, which are named by their import path, as in a `Modality`.
    @property
    def transform(self) -> Callable[[object], Tensor]:
        """From pictures or clouds that a program holds to what the encoder takes, Float[B *item]; see `glpretrain.use.Transform`."""
        return imported("glpretrain.use.Transform")(self)

    def embed(
        self,
        items: str | Path | Sequence[str | Path],
        *,
        what: Literal["cls", "mean", "patches"] = "cls",
        size: int | Sequence[int] | None = None,
        batch_size: int = 64,
        bf16: bool = False,
        num_workers: int | None = None,
    ) -> Embedded:
        """Features of the items of a folder, or of files, in memory; see `glpretrain.use.embed`."""
        options = {"what": what, "size": size, "batch_size": batch_size, "bf16": bf16, "num_workers": num_workers}
        return imported("glpretrain.use.embed")(self, items, **options)

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of blocks, for learning rates that differ from layer to layer."""

    def blocks(self) -> Sequence[nn.Module]:
        """The modules that activation checkpointing computes again and sharding gathers, each as one; here there are none."""
        return ()

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
            self,
            items: Tensor,
            *,
            mask: Tensor | None = None,
            keep: Tensor | None = None,
            keys: Tensor | None = None,
            cls_only: bool = False,
            chunk_size: int | None = None,
        ) -> EncoderOutput: ...
        @overload
        def __call__(
            self,
            items: Sequence[Tensor],
            *,
            mask: Sequence[Tensor | None] | None = None,
            keys: Sequence[Tensor] | None = None,
            cls_only: bool | Sequence[bool] = False,
            chunk_size: int | None = None,
        ) -> list[EncoderOutput]: ...
        def __call__(
            self, items, *, mask=None, keep=None, keys=None, cls_only: bool | Sequence[bool] = False, chunk_size=None
        ) -> EncoderOutput | list[EncoderOutput]: ...

    def forward(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
        keys: Tensor | Sequence[Tensor] | None = None,
        cls_only: bool | Sequence[bool] = False,
        chunk_size: int | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """Encode one tensor of items, or a list of tensors whose sizes may differ.

        In training mode, batch norm sees all tensors of one size in a list as one batch.

        Args:
            items: Float[B *item], or a list of such tensors.
            mask: Bool[B N], True where the mask token replaces a token. With a list of items, a list that holds None where nothing is
                hidden.
            keep: Int[B M], indices of the only patch tokens that are computed (MAE); `patches` is then Float[B M D], in that order.
            keys: Int[B], what the dropped paths of each item are drawn from in training mode, and the positions of all of them from the
                first; with a list of items, a list. Without keys, they are drawn from torch's generator, as timm does.
            cls_only: whether only `cls` and `registers` are wanted; `patches` is then Float[B 0 D], and an encoder need not compute them.
                With a list of items, one for all or a list.
            chunk_size: number of items at a time, whose activations are computed again for the gradients; None stands for all. The
                result is the same, and so are the gradients, unless there is batch norm outside of `begins_with`, or positions are moved
                at random, for every chunk by itself.

        Returns:
            An `EncoderOutput` for a tensor, a list of them for a list.

        Raises:
            ValueError: both `mask` and `keep` are given, one has a wrong shape, the encoder cannot hide or drop tokens, or kept tokens
                are not wanted (`cls_only`).
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
            return encode_list(partial(self._groups, chunk_size=chunk_size), items, mask=mask, keys=keys, cls_only=cls_only)
        if not (mask is None or isinstance(mask, Tensor)):
            raise ValueError(f"{name}: a list of masks was given with one tensor of items; give one mask")
        if keep is not None and (keep.dim() != 2 or keep.shape[0] != items.shape[0]):
            raise ValueError(f"{name}: keep has shape {tuple(keep.shape)}; accepted: ({items.shape[0]}, tokens to keep)")
        assert keys is None or isinstance(keys, Tensor), "one tensor of keys for one tensor of items"
        assert isinstance(cls_only, bool), "one cls_only for one tensor of items"
        if keep is not None and cls_only:
            raise ValueError(f"{name}: keep was given with cls_only; the tokens that are kept would not be returned")
        return self._whole(Views(items, mask, keys, cls_only), keep=keep, chunk_size=chunk_size)

    def _groups(self, groups: Sequence[Views], *, chunk_size: int | None) -> list[EncoderOutput]:
        """The outputs of groups of items, whose sizes differ."""
        return [self._whole(group, keep=None, chunk_size=chunk_size) for group in groups]

    def _whole(self, group: Views, *, keep: Tensor | None, chunk_size: int | None) -> EncoderOutput:
        begun, (_, mask, keys, cls_only, are_local) = self._begin(group.items), group
        encode = partial(self._with_paths, are_local=are_local)
        if chunk_size is None:
            return encode(*begun, mask=mask, keep=keep, keys=keys, cls_only=cls_only)
        return encode_in_chunks(encode, begun, mask=mask, keep=keep, keys=keys, cls_only=cls_only, chunk_size=chunk_size)

    def _with_paths(
        self, *begun: Tensor, mask: Tensor | None, keep: Tensor | None, keys: Tensor | None, cls_only: bool, are_local: bool
    ) -> EncoderOutput:
        paths = drawn_paths(self, keys) if keys is not None and self.training else nullcontext()
        with fastest_attention(self, begun[0]), paths, drawn_positions(self, keys), of_views(self, are_local=are_local), recomputing(self):
            if cls_only:
                return self._encode_cls(*begun, mask=mask).of_cls()
            return self._encode(*begun, mask=mask, keep=keep)

    def _begin(self, items: Tensor) -> tuple[Tensor, ...]:
        """The steps that see the whole batch even where the others see a chunk, because they contain batch norm: Float[B *item] to what
        `_encode` starts from, with B rows each. Here there are none, and `_encode` starts from the items.
        """
        return (items,)

    @abstractmethod
    def _encode(self, *begun: Tensor, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        """`forward` of what `_begin` gives, the items of one tensor; `mask` and `keep` are not both given, and `keep` has B rows."""

    def _encode_cls(self, *begun: Tensor, mask: Tensor | None) -> EncoderOutput:
        """`_encode` where nobody reads the patches, which may be left out."""
        return self._encode(*begun, mask=mask)

    def token_places(self, items: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens of views lie in their items, Float[B N A], and how far neighbouring ones are apart there, Float[B A] or Float[B 1].

        Args:
            items: Float[B *item], the views; here tokens are on a grid.
            frames: Float[B A A+1], see `core.frames`.
        """
        grid = self.grid(items.shape[1:])
        return token_centres(frames, grid=grid), token_sides(frames, grid=grid)

    @abstractmethod
    def add_mask_token(self) -> None:
        """Add the learned mask token (zero at the start), which `mask` needs. A method calls this before it copies the student.

        Raises:
            ValueError: this encoder cannot hide tokens.
        """

    def add_pretraining(self, names: Collection[str]) -> None:
        """Add the parts that only pretraining needs and that these names of tensors belong to; see `PRETRAINING`."""
        if "mask_token" in names:
            self.add_mask_token()

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
        """Weights under the names of the wrapped library model (timm's), without what only pretraining needs (`PRETRAINING`)."""
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
