"""`Branch`: an encoder and its heads, as the student and its teacher have them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor, nn

from glpretrain.core.distributed import has_process_group
from glpretrain.core.shards import is_divided
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.documents import PackedAttention
from glpretrain.encoders.drop_path import dropping_paths
from glpretrain.encoders.rope import moving_positions
from glpretrain.training.fused_cross_entropy import MOST_WIDTH
from glpretrain.training.prototypes import CrossEntropyForm, Prototypes

_SAME_HEADS = "give the recipe's method and heads the settings of the run that the heads come from, or leave heads out"


@runtime_checkable
class Ranged(Protocol):
    """A source that knows which values of files become 0 and 255."""

    value_range: tuple[tuple[float, float], ...]


@runtime_checkable
class _Sourced(Protocol):
    source: object


class Noted:
    """What a branch makes of the first items of one shape that it is given; see `Branch.noting`.

    Args:
        shape: shape of the items, Float[B *item].
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.keep: Tensor | None = None  # Int[B M], where only some of the tokens were computed
        self._patches: Tensor | None = None

    def awaits(self, items: Tensor) -> bool:
        """Whether these are the items."""
        return self._patches is None and items.shape == self.shape

    def fill(self, output: EncoderOutput, *, keep: Tensor | None = None) -> None:
        """Note what was made of them."""
        self._patches, self.keep = output.patches, keep

    @property
    def patches(self) -> Tensor:
        """Float[B N D], or Float[B M D] of the kept tokens."""
        assert self._patches is not None, f"nothing of the shape {self.shape} was encoded"
        return self._patches


class Branch(nn.Module):
    """An encoder and its heads; the teacher is a copy of it.

    Args:
        encoder: the trunk.
        heads: modules by name, dropped after pretraining. Modules that only the student has belong to the method.
    """

    def __init__(self, encoder: Encoder, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)
        self.trunk_learns = True
        self.chunk_size: int | None = None
        self._noted: Noted | None = None

    def load_heads(self, state: Mapping[str, Tensor]) -> None:
        """Take over trained heads, and what else of a branch only pretraining needs, where this one has it too.

        Args:
            state: tensors under the names of `state_dict`, all of the heads among them.

        Raises:
            ValueError: the heads have other names or shapes.
        """
        own = self.state_dict()
        wanted = {name for name in own if name.startswith("heads.")}
        if missing := sorted(wanted - state.keys()):
            raise ValueError(f"heads: {len(missing)} tensors are missing, such as {missing[0]}; {_SAME_HEADS}")
        if unknown := sorted(name for name in state if name.startswith("heads.") and name not in wanted):
            raise ValueError(f"heads: {len(unknown)} tensors have no place, such as {unknown[0]}; {_SAME_HEADS}")
        taken = {name: tensor for name, tensor in state.items() if name in own}
        for name, tensor in taken.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"heads: {name} has shape {tuple(tensor.shape)}, accepted {tuple(own[name].shape)}; {_SAME_HEADS}")
        self.load_state_dict(taken, strict=False)

    @contextmanager
    def noting(self, shape: Sequence[int]) -> Iterator[Noted]:
        """Note what `encode` makes of the first items of a shape, with their patches, also where a method asks for class tokens alone."""
        self._noted = Noted(shape)
        try:
            yield self._noted
        finally:
            self._noted = None

    @overload
    def encode(
        self,
        items: Tensor,
        *,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        keys: Tensor | None = None,
        cls_only: bool = False,
    ) -> EncoderOutput: ...
    @overload
    def encode(
        self,
        items: Sequence[Tensor],
        *,
        mask: Sequence[Tensor | None] | None = None,
        keys: Sequence[Tensor | None] | None = None,
        cls_only: bool | Sequence[bool] = False,
    ) -> list[EncoderOutput]: ...

    def encode(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
        keys: Tensor | Sequence[Tensor | None] | None = None,
        cls_only: bool | Sequence[bool] = False,
    ) -> EncoderOutput | list[EncoderOutput]:
        """`Encoder.forward`, without gradient while the trunk does not learn, and chunk by chunk where there is a `chunk_size`.

        Args:
            items: see `Encoder.forward`.
            mask: see `Encoder.forward`.
            keep: see `Encoder.forward`.
            keys: `ViewGroup.keys` of the items, Int[V B]; with a list of items, a list. A branch in evaluation mode needs none.
            cls_only: see `Encoder.forward`.

        Raises:
            ValueError: paths are to be dropped or positions moved, and there is a group of views without keys.
        """
        groups = list(keys) if isinstance(keys, Sequence) else [keys]
        rows = [group.flatten() for group in groups if group is not None]  # [(V B)] each
        if len(rows) < len(groups) and (dropping_paths(self.encoder) or moving_positions(self.encoder)):
            setting = "drop_path_rate is above 0" if dropping_paths(self.encoder) else "rope_augmentation is set"
            raise ValueError(f"encoder: {setting}, but views without keys were given; hand over `keys` of every ViewGroup")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trunk_learns):
            if isinstance(items, Tensor):
                assert not isinstance(mask, Sequence), "one mask for one tensor of items"
                assert isinstance(cls_only, bool), "one cls_only for one tensor of items"
                own, noted = rows[0] if rows else None, self._noted if self._noted is not None and self._noted.awaits(items) else None
                cls_only = cls_only and noted is None
                output = self.encoder(items, mask=mask, keep=keep, keys=own, cls_only=cls_only, chunk_size=self.chunk_size)
                if noted is not None:
                    noted.fill(output, keep=keep)
                return output
            assert keep is None and not isinstance(mask, Tensor), "a list of masks for a list of items, and none of them dropped"
            own_keys = rows if len(rows) == len(items) else None
            awaited = [number for number, group in enumerate(items) if self._noted is not None and self._noted.awaits(group)][:1]
            if awaited:
                flags = [cls_only] * len(items) if isinstance(cls_only, bool) else cls_only
                cls_only = [flag and number not in awaited for number, flag in enumerate(flags)]
            outputs = self.encoder(items, mask=mask, keys=own_keys, cls_only=cls_only, chunk_size=self.chunk_size)
            if self._noted is not None and awaited:
                self._noted.fill(outputs[awaited[0]])
            return outputs

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Encode so many views at a time; see `Optimization.chunk_size`.

        Raises:
            ValueError: the encoder has batch norm whose statistics would be those of a chunk.
        """
        if chunk_size is not None and (norms := norms_in_chunks(self.encoder)):
            card = self.encoder.card
            raise ValueError(
                f"optimization: chunk_size={chunk_size} given, but {card.encoder} {card.arguments.get('name', '')} has batch norm"
                f" ({', '.join(norms[:3])}), which must see the whole batch; leave chunk_size out, or give an encoder without batch norm"
            )
        self.chunk_size = chunk_size

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Compute the blocks of the encoder a second time for the gradients, or keep what they compute.

        Raises:
            ValueError: the encoder has no `blocks`.
        """
        if enabled and not self.encoder.blocks():
            raise ValueError(
                f"optimization: activation_checkpointing=True given, but {self.encoder.card.encoder} names no blocks that could be computed"
                " again; leave it out"
            )
        self.encoder.activation_checkpointing = enabled

    def set_cross_entropy(self, form: CrossEntropyForm) -> None:
        """Compute the losses over the prototypes of all heads in this form; see `Optimization.cross_entropy`.

        Raises:
            ValueError: no head has prototypes, or their projections are too wide for the kernels.
        """
        found = [part for part in self.heads.modules() if isinstance(part, Prototypes)]
        if form == "fused":
            widths = [part.directions.shape[1] for part in found]
            if not found or max(widths) > MOST_WIDTH:
                has = f"are {max(widths)} wide" if found else "have no prototypes"
                raise ValueError(
                    f"optimization: cross_entropy='fused' given, but the heads {has}; it needs prototypes of at most {MOST_WIDTH} numbers;"
                    " leave it out"
                )
        for part in found:
            part.cross_entropy = form

    def set_packed_attention(self, form: PackedAttention) -> None:
        """Let views of several sizes attend in this form; see `Optimization.packed_attention`.

        Raises:
            ValueError: the encoder does not see views of several sizes in one sequence, or is given chunks of views.
        """
        if form == "flex":
            card, given = self.encoder.card, "optimization: packed_attention='flex' given, but"
            if not self.encoder.packs_views:
                name = f"{card.encoder} {card.arguments.get('name', '')}".strip()
                raise ValueError(f"{given} {name} does not encode views of several sizes in one sequence; leave it out")
            if self.chunk_size is not None:
                raise ValueError(f"{given} with chunk_size={self.chunk_size} there is no such sequence; leave one of them out")
        self.encoder.packed_attention = form

    def set_trunk_learns(self, learns: bool) -> None:
        """Let the trunk learn, or freeze it. A frozen trunk drops no paths.

        Its parameters keep `requires_grad`: DistributedDataParallel decides once, before the first step, which gradients it averages.
        """
        self.trunk_learns = learns
        if self.encoder.training is not learns:
            self.encoder.train(learns)

    def zero_gradient(self) -> Tensor:
        """Float[]: zero, with a gradient of zero for a frozen trunk, because DistributedDataParallel waits for one."""
        parameters = [] if self.trunk_learns or not has_process_group() else [p for p in self.encoder.parameters() if p.requires_grad]
        if not parameters or is_divided(parameters):
            return torch.zeros((), device=next(self.parameters()).device)
        # One number of each parameter: a sum over all of them may overflow in half precision, and zero times infinity is not zero.
        return 0.0 * torch.stack([parameter.reshape(-1)[0] for parameter in parameters]).sum()


def batch_norms(module: nn.Module) -> list[str]:
    """Names of the batch norms in a module, which make the features of an item depend on the other items of its batch."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [name for name, part in module.named_modules() if isinstance(part, kinds)]


def norms_in_chunks(encoder: Encoder) -> list[str]:
    """Names of the batch norms that would see a chunk only, where the encoder sees the batch in chunks."""
    return [name for name in batch_norms(encoder) if not name.startswith(tuple(f"{part}." for part in encoder.begins_with))]


def note_value_range(data: object, *encoders: Encoder) -> None:
    """Put on the encoders' cards how the files of a run are read, so that the files that they are used on are read alike."""
    if isinstance(data, _Sourced) and isinstance(data.source, Ranged):
        for encoder in encoders:
            encoder.set_value_range(data.source.value_range)
