"""Tensors into an encoder: for other channels, for another grid, and with an account of every name.

Left out: where the tensors come from.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from glpretrain.encoders import Encoder, build_from
from glpretrain.encoders.timm_model import normalisation, pair, resize_positions
from glpretrain.weights.files import listed
from glpretrain.weights.imported import Arguments, LoadedWeights, State
from glpretrain.weights.report import LoadReport

_STEM = "patch_embed.proj."
Statistics = tuple[Sequence[float], Sequence[float]]


def fit(
    imported: LoadedWeights,
    *,
    in_chans: int | None,
    img_size: int | Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    strict: bool,
    path: str,
) -> tuple[Encoder, LoadReport]:
    """Build the encoder and give it the tensors.

    Args:
        imported: what was read.
        in_chans: other channels than the file's.
        img_size: another height and width than the file's.
        mean: per channel, instead of the format's.
        std: likewise.
        strict: raise unless the match is full.
        path: for messages and the report.

    Returns:
        The encoder in evaluation mode, and what became of every tensor.

    Raises:
        ValueError: the match is not full, or the encoder takes no other channels or sizes.
    """
    arguments: Arguments = dict(imported.arguments)
    if img_size is not None:
        if "img_size" not in arguments:
            raise ValueError(f"load_backbone: img_size={img_size} given; {imported.encoder} has none")
        arguments["img_size"] = list(pair(img_size))
    channels = arguments.get("in_chans")
    spread = in_chans is not None and in_chans != channels
    if spread:
        if imported.encoder != "ViT" or in_chans < 1:
            raise ValueError(f"load_backbone: in_chans={in_chans} given for {imported.encoder}; accepted: at least 1, for a ViT")
        old = normalisation(arguments.get("mean"), arguments.get("std"), in_chans=channels)
        arguments |= {"in_chans": in_chans, "mean": [sum(old[0]) / channels] * in_chans, "std": [sum(old[1]) / channels] * in_chans}
    arguments |= {key: list(values) for key, values in (("mean", mean), ("std", std)) if values is not None}
    try:
        encoder = build_from(imported.encoder, arguments)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error
    changed: State = {}
    if spread:
        changed |= spread_channels(imported.state, old=old, new=(encoder.card.mean, encoder.card.std), path=path)
    if "pos_embed" in imported.state and arguments["img_size"] != imported.arguments["img_size"]:
        changed |= _resize_grid(imported.state["pos_embed"], encoder, imported.arguments)
    return encoder.eval(), _assign(encoder, imported, changed, strict=strict, path=path)


def spread_channels(state: State, *, old: Statistics, new: Statistics, path: str) -> State:
    """The first layer for another number of channels: an image whose channels are all equal keeps its features.

    Every new channel gets the sum of the old filters over the number of new channels. Filters see normalised pixels and the
    statistics of the channels differ, so the sum is taken over filters of raw pixels and the rest goes into the bias.

    Args:
        state: with timm's patch embedding.
        old: mean and std of the channels that there are.
        new: mean and std of those that there will be.
        path: for messages.

    Returns:
        Weight and bias.

    Raises:
        ValueError: the first layer is another one or has no bias.
    """
    if f"{_STEM}weight" not in state or f"{_STEM}bias" not in state:
        raise ValueError(f"load_backbone: in_chans given; {path} has no {_STEM}weight with a bias, which is what other channels need")
    weight, bias = state[f"{_STEM}weight"].double(), state[f"{_STEM}bias"].double()
    (old_mean, old_std), (new_mean, new_std) = ([torch.tensor(values, dtype=torch.float64) for values in pair_of] for pair_of in (old, new))
    raw = weight / old_std[:, None, None]  # [D C p p] of pixels that are not normalised
    total = raw.sum(dim=1, keepdim=True)  # [D 1 p p]
    shift = (total.sum(dim=(1, 2, 3)) * new_mean.mean()) - (raw.sum(dim=(2, 3)) * old_mean).sum(dim=1)  # [D]
    spread = total * new_std[:, None, None] / len(new_std)  # [D C' p p]
    return {f"{_STEM}weight": spread.float(), f"{_STEM}bias": (bias + shift).float()}


def _resize_grid(positions: Tensor, encoder: Encoder, arguments: Arguments) -> State:
    """Learned positions for the encoder's own grid; nothing, and so a mismatch later, where they are not of the file's grid."""
    rows, columns = (size // length for size, length in zip(pair(arguments["img_size"]), encoder.card.patch_size, strict=True))
    if positions.shape[1] < rows * columns:
        return {}
    how = arguments.get("position_resize", "timm")
    return {"pos_embed": resize_positions(positions, grid=(rows, columns), new_grid=encoder.grid(encoder.card.item_shape), how=how)}


def _assign(encoder: Encoder, imported: LoadedWeights, changed: State, *, strict: bool, path: str) -> LoadReport:
    state = {**imported.state, **changed}
    own = encoder.backbone_state()
    fitting = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    reshaped = sorted(changed.keys() & fitting.keys())
    without_place = sorted(state.keys() - own.keys())
    left_out = [name for name in without_place if re.match(imported.pretraining, name)]
    card = encoder.card
    width = f"{card.arguments.get('name', card.encoder)}, {card.embed_dim} wide, {encoder.num_layers} deep"
    report = LoadReport(
        title=f"{imported.title} {path}",
        architecture=f"{width}, items of {' x '.join(map(str, card.item_shape))}",
        matched=tuple(sorted(fitting.keys() - set(reshaped))),
        reshaped=tuple(f"{name} {tuple(imported.state[name].shape)} to {tuple(state[name].shape)}" for name in reshaped),
        missing=tuple(sorted(own.keys() - state.keys())),
        shape_mismatch=tuple(
            f"{name} has shape {tuple(state[name].shape)}, accepted {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys() - fitting.keys())
        ),
        unused=tuple(name for name in without_place if name not in left_out),
        left_out=(*imported.left_out, *left_out),
        assumed=imported.assumed,
    )
    if strict and not report.full_match:
        problems = []
        if report.missing:
            problems.append(f"missing {listed(list(report.missing))}")
        if report.unused:
            problems.append(f"unknown {listed(list(report.unused))}")
        if report.shape_mismatch:
            problems.append(
                "; ".join(report.shape_mismatch[:6])
                + (f" and {len(report.shape_mismatch) - 6} more" if len(report.shape_mismatch) > 6 else "")
            )
        raise ValueError(
            f"load_backbone: {path}: weights do not fit {report.architecture}: {'; '.join(problems)}; strict=False leaves these fresh"
        )
    encoder.load_backbone_state({**own, **fitting})
    return report
