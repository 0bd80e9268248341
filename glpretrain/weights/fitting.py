"""Giving tensors to an encoder: for other channels, for another grid, and with an account of every name.

Left out: where the tensors come from.
"""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from glpretrain.encoders import Encoder, build_from
from glpretrain.encoders.timm_model import POSITION_RESIZES, normalisation, pair, resize_positions
from glpretrain.weights.files import State, listed, numbers
from glpretrain.weights.report import Arguments, LoadedWeights, LoadOptions, LoadReport

_STEM = "patch_embed.proj."
Statistics = tuple[Sequence[float], Sequence[float]]


def fit(weights: LoadedWeights, options: LoadOptions, *, path: Path | str) -> tuple[Encoder, LoadReport]:
    """Build the encoder and give it the tensors.

    Args:
        weights: what was read.
        options: options of `load_backbone`, of which in_chans, img_size, mean, std and strict count here.
        path: where the weights were read, for messages and the report.

    Returns:
        The encoder in evaluation mode, and what became of every tensor.

    Raises:
        ValueError: the match is not full, or the encoder cannot have other channels or sizes.
    """
    arguments, strict = dict(weights.arguments), options.get("strict", True)
    with torch.device("meta"):  # shapes are compared before anything takes memory
        draft = _built(weights.encoder, arguments, path=path)
    _check_card(draft, weights, path=path)
    grid = draft.grid(draft.card.item_shape)
    report = _compare(draft, weights, {}, path=path)
    if strict and not report.full_match:
        raise ValueError(_misfit(report, path=path))
    if (img_size := options.get("img_size")) is not None:
        if "img_size" not in arguments:
            raise ValueError(f"load_backbone: img_size={img_size} given; {weights.encoder} has none")
        arguments["img_size"] = list(pair(img_size))
    in_chans, channels, old = options.get("in_chans"), arguments.get("in_chans"), None
    if in_chans is not None and in_chans != channels:
        if weights.encoder != "ViT" or not isinstance(channels, int) or in_chans < 1:
            raise ValueError(f"load_backbone: in_chans={in_chans} given for {weights.encoder}; accepted: at least 1, for a ViT")
        mean, std = (numbers(arguments.get(name), name=name) for name in ("mean", "std"))
        old = normalisation(mean, std, in_chans=channels)
        arguments |= {"in_chans": in_chans, "mean": [sum(old[0]) / channels] * in_chans, "std": [sum(old[1]) / channels] * in_chans}
    given = {"mean": options.get("mean"), "std": options.get("std")}
    arguments |= {name: list(values) for name, values in given.items() if values is not None}
    encoder = _built(weights.encoder, arguments, path=path)
    changed: State = {}
    if old is not None:
        changed |= _spread_channels(weights.state, old=old, new=(encoder.card.mean, encoder.card.std), path=path)
    if "pos_embed" in weights.state and arguments.get("img_size") != weights.arguments.get("img_size"):
        changed |= _resize_grid(weights.state["pos_embed"], encoder, grid=grid, arguments=weights.arguments)
    report = _compare(encoder, weights, changed, path=path)
    if strict and not report.full_match:
        raise ValueError(_misfit(report, path=path))
    own, given = encoder.backbone_state(), weights.state | changed
    encoder.load_backbone_state({**own, **{name: given[name] for name in _fitting(given, own)}})
    ranges, num_channels = weights.value_range, encoder.card.item_shape[0]
    if len(ranges) == num_channels:
        encoder.set_value_range(ranges)
    elif len(set(ranges)) == 1:  # one for all channels, whose number is another one now
        encoder.set_value_range(ranges[:1] * num_channels)
    return encoder.eval(), report


def _built(encoder: str, arguments: Arguments, *, path: Path | str) -> Encoder:
    try:
        return build_from(encoder, arguments)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error


def _check_card(draft: Encoder, weights: LoadedWeights, *, path: Path | str) -> None:
    """A card that contradicts the arguments in it is refused, because either may be what its author meant."""
    if (card := weights.card) is None:
        return
    said, built = asdict(card), asdict(draft.card)
    for name in ("modality", "item_shape", "patch_size", "embed_dim", "mean", "std"):
        if said[name] != built[name]:
            raise ValueError(
                f"load_backbone: {path}: the card says {name}={reprlib.repr(said[name])}, its arguments say"
                f" {reprlib.repr(built[name])}; correct one of them"
            )


def _spread_channels(state: State, *, old: Statistics, new: Statistics, path: Path | str) -> State:
    """The first layer for another number of channels: an image whose channels are all equal keeps its features.

    Every new channel gets the sum of the old filters, divided by the number of new channels. Filters see normalised pixels and the
    statistics of the channels differ, so the sum is taken over filters of raw pixels and the rest goes into the bias.

    Args:
        state: tensors with timm's patch embedding.
        old: mean and std of the channels in the file.
        new: mean and std of the channels of the encoder.
        path: where the weights were read, for messages.

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


def _resize_grid(positions: Tensor, encoder: Encoder, *, grid: Sequence[int], arguments: Arguments) -> State:
    """Learned positions for the encoder's own grid; nothing where they do not cover the file's grid, which then is a mismatch."""
    rows, columns = grid
    if positions.shape[1] < rows * columns:
        return {}
    new_rows, new_columns = encoder.grid(encoder.card.item_shape)
    how = arguments.get("position_resize", "timm")
    assert how in POSITION_RESIZES  # or the encoder would have refused it
    return {"pos_embed": resize_positions(positions, grid=(rows, columns), new_grid=(new_rows, new_columns), how=how)}


def _fitting(state: State, own: State) -> set[str]:
    """Names of the tensors that have the encoder's shape, and no whole numbers where it has others, as quantised weights have."""
    return {
        name
        for name in state.keys() & own.keys()
        if state[name].shape == own[name].shape and state[name].is_floating_point() >= own[name].is_floating_point()
    }


def _compare(encoder: Encoder, weights: LoadedWeights, changed: State, *, path: Path | str) -> LoadReport:
    state, own = weights.state | changed, encoder.backbone_state()
    fitting = _fitting(state, own)
    reshaped = sorted(changed.keys() & fitting)
    without_place = sorted(state.keys() - own.keys())
    left_out = [name for name in without_place if re.match(weights.pretraining, name)]
    card = encoder.card
    width = f"{card.arguments.get('name', card.encoder)}, {card.embed_dim} wide, {encoder.num_layers} deep"
    return LoadReport(
        title=f"{weights.title} {path}",
        architecture=f"{width}, items of {' x '.join(map(str, card.item_shape))}",
        matched=tuple(sorted(fitting - set(reshaped))),
        reshaped=tuple(f"{name} {tuple(weights.state[name].shape)} to {tuple(state[name].shape)}" for name in reshaped),
        missing=tuple(sorted(own.keys() - state.keys())),
        shape_mismatch=tuple(_mismatch(name, state[name], own[name]) for name in sorted(own.keys() & state.keys() - fitting)),
        unused=tuple(name for name in without_place if name not in left_out),
        left_out=(*weights.left_out, *left_out),
        assumed=weights.assumed,
    )


def _mismatch(name: str, given: Tensor, own: Tensor) -> str:
    if given.shape == own.shape:
        return f"{name} has numbers of {given.dtype}, accepted {own.dtype}"
    return f"{name} has shape {tuple(given.shape)}, accepted {tuple(own.shape)}"


def _misfit(report: LoadReport, *, path: Path | str) -> str:
    problems = [f"{kind} {listed(list(names))}" for kind, names in (("missing", report.missing), ("unknown", report.unused)) if names]
    if more := len(report.shape_mismatch[6:]):
        problems.append(f"{'; '.join(report.shape_mismatch[:6])} and {more} more")
    else:
        problems.extend(report.shape_mismatch)
    return f"load_backbone: {path}: weights do not fit {report.architecture}: {'; '.join(problems)}; strict=False leaves these fresh"
