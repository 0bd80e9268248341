"""`Branch`: an encoder and its heads, as the student and its teacher have them."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from glpretrain.core.distributed import has_process_group
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder


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

    @overload
    def encode(self, items: Tensor, *, mask: Tensor | None = None, keep: Tensor | None = None) -> EncoderOutput: ...
    @overload
    def encode(self, items: Sequence[Tensor], *, mask: Sequence[Tensor | None] | None = None) -> list[EncoderOutput]: ...

    def encode(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """`Encoder.forward`, without gradient while the trunk does not learn."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trunk_learns):
            if isinstance(items, Tensor):
                assert not isinstance(mask, Sequence), "one mask for one tensor of items"
                return self.encoder(items, mask=mask, keep=keep)
            assert keep is None and not isinstance(mask, Tensor), "a list of masks for a list of items, and none of them dropped"
            return self.encoder(items, mask=mask)

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
        if not parameters:
            return torch.zeros((), device=next(self.parameters()).device)
        # One number of each parameter: a sum over all of them may overflow in half precision, and zero times infinity is not zero.
        return 0.0 * torch.stack([parameter.reshape(-1)[0] for parameter in parameters]).sum()
