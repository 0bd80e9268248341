"""Trained encoders in folders: export one, take one out of a training checkpoint, load one back.

A folder holds `model.safetensors` (the wrapped library's own names), `card.json` (what `load_backbone` rebuilds the encoder from)
and, for a timm model, the `config.json` with which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it too.
Nothing is ever unpickled on load, and Lightning is not needed.
"""

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glpretrain.encoders import Encoder, build
from glpretrain.encoders.base import load_strictly
from glpretrain.types import EncoderCard

WEIGHTS, CARD, LIBRARY_CONFIG = "model.safetensors", "card.json", "config.json"
# Where a method keeps the encoder, best first: the teacher is what is published.
_ENCODER_PREFIXES = ("teacher.branch.encoder.", "student.encoder.")


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


def load_backbone(folder: str | Path) -> Encoder:
    """The encoder of an exported folder, in evaluation mode on the CPU.

    Args:
        folder: written by `export`.

    Returns:
        An encoder whose features equal those of the exported one to the last bit.

    Raises:
        ValueError: a file is missing or broken, or a tensor is missing, unknown or mis-shaped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"load_backbone: {folder} {found}; accepted: a folder written by `glpretrain export`")
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"load_backbone: {folder / name} is missing; found: {sorted(path.name for path in folder.iterdir())}")
    encoder = build(_read_card(folder / CARD))
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(
            f"load_backbone: {folder / WEIGHTS} is no complete safetensors file ({error}); pickles are never opened"
        ) from error
    try:
        encoder.load_backbone_state(weights)
    except ValueError as error:
        raise ValueError(f"load_backbone: {folder / WEIGHTS}: {error}") from error
    return encoder.eval()


def _read_card(path: Path) -> EncoderCard:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # what both a wrong encoding and wrong JSON raise
        raise ValueError(f"load_backbone: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"load_backbone: {path} is not a JSON object but a {type(values).__name__}")
    try:
        return EncoderCard.from_json(values)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error


def export_checkpoint(checkpoint: str | Path, folder: str | Path, *, licence: str | None = None, source: str | None = None) -> Path:
    """Export the encoder of a training checkpoint: the teacher's if there is one, the student's otherwise.

    Args:
        checkpoint: written by a training run.
        folder: see `export`.
        licence: see `export`.
        source: see `export`.

    Returns:
        The folder.

    Raises:
        ValueError: the file is missing, broken or no training checkpoint of this package, or see `export`.
    """
    encoder, made_by = _encoder_of(Path(checkpoint))
    return export(encoder, folder, licence=licence, source=made_by if source is None else source)


def _encoder_of(checkpoint: Path) -> tuple[Encoder, str]:
    if not checkpoint.is_file():
        raise ValueError(f"export: {checkpoint} is not a file; accepted: a checkpoint (.ckpt) of a training run")
    if not zipfile.is_zipfile(checkpoint):  # what torch.save writes; a file cut short has lost its table of contents
        raise ValueError(f"export: {checkpoint} cannot be read as a checkpoint: it is cut short or of another format")
    try:
        # Only tensors and plain values are read: a checkpoint from elsewhere cannot run code.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"export: {checkpoint} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or "encoder_card" not in content or "state_dict" not in content:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"export: {checkpoint} is no checkpoint of this package: encoder_card and state_dict expected, found {found}")
    state: dict[str, Tensor] = content["state_dict"]
    for prefix in _ENCODER_PREFIXES:
        if own := {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}:
            break
    else:
        raise ValueError(f"export: {checkpoint} has no encoder: no tensor starts with {' or '.join(_ENCODER_PREFIXES)}")
    encoder = build(EncoderCard.from_json(content["encoder_card"]))
    if "mask_token" in own:
        encoder.add_mask_token()
    try:
        load_strictly(encoder, own)
    except ValueError as error:
        raise ValueError(f"export: {checkpoint}: {error}") from error
    return encoder, f"{content['method']}, {content['global_step']} steps"
