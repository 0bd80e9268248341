"""This package's own files: an exported folder is written and read, a training checkpoint is read.

A folder holds `model.safetensors` (the wrapped library's own names), `card.json` (what `load_backbone` rebuilds the encoder from)
and, for a timm model, the `config.json` with which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it too.
Nothing is ever unpickled from a folder, and Lightning is not needed for either.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from glpretrain.core.types import EncoderCard
from glpretrain.encoders import Encoder, build
from glpretrain.encoders.base import load_strictly
from glpretrain.weights.files import is_state, listed, read_json, read_safetensors
from glpretrain.weights.formats import Which
from glpretrain.weights.imported import LoadedWeights, State

WEIGHTS, CARD, LIBRARY_CONFIG = "model.safetensors", "card.json", "config.json"
# Where a method keeps the encoder.
_ENCODER_PREFIXES: dict[Which, str] = {"teacher": "teacher.branch.encoder.", "student": "student.encoder."}


def export(encoder: Encoder, folder: str | Path, *, licence: str | None = None, source: str | None = None) -> Path:
    """Write an encoder to a new folder.

    Args:
        encoder: to write; the mask token stays behind.
        folder: must not exist, or be empty.
        licence: of the weights; the card's own when None.
        source: where they come from; the card's own when None.

    Returns:
        The folder.

    Raises:
        ValueError: the folder has something in it already, or is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export: {folder} is a file; accepted: a new or empty folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"export: {folder} is not empty and nothing is overwritten; accepted: a new or empty folder")
    given = {name: value for name, value in (("licence", licence), ("source", source)) if value is not None}
    card = replace(encoder.card, **given, arguments={**encoder.card.arguments, **given})
    # safetensors refuses views of shared memory; a copy on the CPU shares with nothing.
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in encoder.backbone_state().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CARD).write_text(json.dumps(card.to_json(), indent=2) + "\n")
    if config := encoder.library_config(card):
        (folder / LIBRARY_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def read_own_folder(folder: Path) -> LoadedWeights:
    """What `export` wrote.

    Raises:
        ValueError: a file is missing or broken.
    """
    path = folder / CARD
    values = read_json(path)
    try:
        card = EncoderCard.from_json(values)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error
    return LoadedWeights("exported folder", card.encoder, dict(card.arguments), read_safetensors(folder / WEIGHTS))


def is_own_checkpoint(content: object) -> bool:
    """Whether a file was written by a training run of this package."""
    return isinstance(content, dict) and {"encoder_card", "method", "global_step"} <= content.keys() and is_state(content.get("state_dict"))


def read_own_checkpoint(content: dict, *, which: Which, path: str) -> LoadedWeights:
    """One side of a training checkpoint; the student's where a method has no teacher.

    Args:
        content: for which `is_own_checkpoint` holds.
        which: side.
        path: for messages.

    Raises:
        ValueError: it has no encoder, or one that does not fit its card.
    """
    state: State = content["state_dict"]
    sides = [which] if which == "student" else ["teacher", "student"]
    for side in sides:
        prefix = _ENCODER_PREFIXES[side]
        if own := {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}:
            break
    else:
        starts = " or ".join(_ENCODER_PREFIXES[side] for side in sides)
        raise ValueError(f"load_backbone: {path} has no encoder: no tensor starts with {starts}; found {listed(sorted(state))}")
    try:
        encoder = build(EncoderCard.from_json(content["encoder_card"]))
        if "mask_token" in own:
            encoder.add_mask_token()
        load_strictly(encoder, own)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error
    arguments = {**encoder.card.arguments, "source": f"{content['method']}, {content['global_step']} steps"}
    left_out = tuple(sorted(name for name in state if not name.startswith(prefix))) + (("mask_token",) if "mask_token" in own else ())
    return LoadedWeights(f"checkpoint ({side})", encoder.card.encoder, arguments, encoder.backbone_state(), left_out=left_out)
