"""A final norm of its own for class token and registers of local views in training, as DINOv3's ViT-7B has.

Small views have other statistics than large ones, and only the large ones are what a backbone is used for (Simeoni et al., "DINOv3", arXiv
2508.10104; `untie_global_and_local_cls_norm` in models/vision_transformer.py of facebookresearch/dinov3 at 6876159). Patches, evaluation
mode, and so every teacher, have the common norm. The norm is no part of a backbone: neither cards nor exports know it.

Ours: local views are those of another size than the first ones of a list; officially they are the second entry of a list.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LocalNorm(nn.LayerNorm):
    """The second norm; which one class token and registers pass is said by `of_views`.

    Args:
        common: norm that all others pass; the second one starts with its numbers.
        has_class_token: whether there is a class token.

    Raises:
        ValueError: there is none, or no layer norm behind the last block.
    """

    is_local = False

    def __init__(self, common: nn.Module, *, has_class_token: bool) -> None:
        if not isinstance(common, nn.LayerNorm) or not has_class_token:
            missing = "class token" if isinstance(common, nn.LayerNorm) else "layer norm behind its last block"
            raise ValueError(f"ViT: local_norm=True given; the model has no {missing}; leave local_norm out")
        super().__init__(list(common.normalized_shape), eps=common.eps)
        self.follow(common)

    def follow(self, common: nn.Module) -> None:
        """Take over the numbers of the common norm, such as those of a backbone that was loaded."""
        self.load_state_dict(common.state_dict())


def normed_tokens(tokens: Tensor, common: nn.Module, *, local: LocalNorm | None, num_prefix_tokens: int) -> Tensor:
    """Float[B T D]: tokens under their norms; the first `num_prefix_tokens` are class token and registers."""
    if local is None or not (local.is_local and local.training):
        return common(tokens)
    prefix, patches = tokens.tensor_split([num_prefix_tokens], dim=1)
    return torch.cat((local(prefix), common(patches)), dim=1) if patches.shape[1] else local(prefix)


@contextmanager
def of_views(module: nn.Module, *, are_local: bool) -> Iterator[None]:
    """Inside this context, the second norms in a module know whether the views that are encoded are local ones."""
    norms = [part for part in module.modules() if isinstance(part, LocalNorm)] if are_local else []
    for norm in norms:
        norm.is_local = True
    try:
        yield
    finally:
        for norm in norms:
            norm.is_local = False


def needs_local_views(encoder: nn.Module, *, name: str, together: bool) -> bool:
    """Whether a second norm waits for local views, so that a method has to have some.

    Args:
        encoder: encoder of the student.
        name: name of the method.
        together: whether the method encodes its global and local views in one list.

    Raises:
        ValueError: it does not, and the encoder cannot tell the views apart.
    """
    if not any(isinstance(part, LocalNorm) for part in encoder.modules()):
        return False
    if not together:
        raise ValueError(f"ViT: local_norm=True given, but {name} does not encode global and local views together; leave it out")
    return True
