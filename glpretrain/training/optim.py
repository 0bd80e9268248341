"""Which parameter decays, at which rate it learns, and how its gradient is clipped."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from glpretrain.encoders.base import Encoder


def parameter_groups(
    encoder: Encoder, others: Iterable[tuple[str, Tensor]], *, layer_decay: float = 1.0, patch_lr: float = 1.0
) -> list[dict]:
    """Groups for an optimizer; each carries `lr_scale` and `decays`, which the schedules are multiplied with.

    DINO's rule (utils.py, get_params_groups): biases and parameters with one axis do not decay, everything else does.

    Args:
        encoder: its parameters learn at `layer_decay` ** (layers above them).
        others: (name, parameter) of heads and decoders, at full rate.
        layer_decay: in (0, 1]; 1 gives every layer the same rate.
        patch_lr: one more factor on the rate of the patch embedding.

    Raises:
        ValueError: `layer_decay` or `patch_lr` outside (0, 1], or a `patch_lr` for an encoder without a patch embedding.
    """
    return _grouped([*_trunk(encoder, layer_decay=layer_decay, patch_lr=patch_lr), *((name, parameter, 1.0) for name, parameter in others)])


def trunk_groups(encoder: Encoder, *, layer_decay: float, patch_lr: float = 1.0) -> list[dict]:
    """As `parameter_groups`, of the encoder alone."""
    return _grouped(_trunk(encoder, layer_decay=layer_decay, patch_lr=patch_lr))


def head_groups(others: Iterable[tuple[str, Tensor]]) -> list[dict]:
    """As `parameter_groups`, of heads and decoders alone."""
    return _grouped((name, parameter, 1.0) for name, parameter in others)


def _trunk(encoder: Encoder, *, layer_decay: float, patch_lr: float) -> list[tuple[str, Tensor, float]]:
    """Name, parameter, factor on the rate."""
    for argument, value in (("layer_decay", layer_decay), ("patch_lr", patch_lr)):
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{argument}: accepted are values in (0, 1], not {value}")
    named = list(encoder.named_parameters())
    patch = {name for name, _ in named if encoder.embeds_patches(name)}
    if patch_lr != 1.0 and not patch:
        raise ValueError(f"patch_lr={patch_lr} would be ignored: {encoder.card.encoder} has no patch embedding; leave it out")
    top = encoder.num_layers + 1
    scales = {name: layer_decay ** (top - encoder.layer_of(name)) * (patch_lr if name in patch else 1.0) for name, _ in named}
    return [(name, parameter, scales[name]) for name, parameter in named]


def _grouped(scaled: Iterable[tuple[str, Tensor, float]]) -> list[dict]:
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter, lr_scale in scaled:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            groups.setdefault((lr_scale, decays), []).append(parameter)
    return [{"params": params, "lr_scale": scale, "decays": decays} for (scale, decays), params in groups.items()]


@torch.no_grad()
def clip_per_parameter(parameters: Iterable[nn.Parameter], *, max_norm: float) -> None:
    """Scale down every gradient whose own L2 norm exceeds `max_norm` (DINO utils.py, clip_gradients): not the global norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    factors = torch._foreach_add(torch._foreach_norm(gradients), 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, max_norm)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)
