"""This package's own files: an exported folder, which is written and read, and a training checkpoint, which is read.

A folder holds `model.safetensors` (under the wrapped library's own names), `card.json` (from which `load_backbone` rebuilds the encoder)
and, for a timm model, the `config.json` with which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it too.
Nothing in a folder is ever unpickled, and Lightning is not needed for either.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from glpretrain.core.files import new_folder, write_json
from glpretrain.core.shards import Parts, files_of, is_head
from glpretrain.core.types import EncoderCard
from glpretrain.encoders import Encoder, build
from glpretrain.encoders.base import PRETRAINING
from glpretrain.encoders.states import load_strictly
from glpretrain.weights.files import State, in_single_precision, is_state, listed, read_content, read_json, read_pickle, read_safetensors
from glpretrain.weights.report import LoadedWeights, LoadOptions, Which

WEIGHTS, CARD, LIBRARY_CONFIG = "model.safetensors", "card.json", "config.json"
# The names under which a method keeps its branches, and these their encoders.
_BRANCHES: dict[Which, str] = {"teacher": "teacher.branch.", "student": "student."}
_ENCODER = "encoder."


def require_finite(state: State) -> None:
    """Make sure that no weight is NaN or infinite.

    Raises:
        ValueError: names the tensors in which one is.
    """
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"export: NaN or infinite weights in {listed(broken)}; accepted: finite weights; export an earlier checkpoint")


def export(encoder: Encoder, folder: str | Path, *, licence: str | None = None, source: str | None = None) -> Path:
    """Write an encoder to a new folder.

    Args:
        encoder: encoder to write; its mask token is left out.
        folder: folder to write to, which must not exist or be empty.
        licence: licence of the weights; None keeps the one on the card.
        source: where the weights come from; None keeps what the card says.

    Returns:
        The folder.

    Raises:
        ValueError: the folder has something in it already or is a file, another process is writing to it, or a weight is not finite.
    """
    folder = Path(folder)
    require_finite(encoder.backbone_state())
    card = described(encoder.card, licence=licence, source=source)
    with new_folder(folder, last=CARD, argument="export") as part:
        write_weights(encoder.backbone_state(), part)
        write_card(card, part)
        if config := encoder.library_config(card):
            write_json(part / LIBRARY_CONFIG, config)
    return folder


def described(card: EncoderCard, *, licence: str | None, source: str | None) -> EncoderCard:
    """The card with another licence or source, where one is given."""
    words = {name: value for name, value in (("licence", licence), ("source", source)) if value is not None}
    return replace(card, **words, arguments={**card.arguments, **words})


def write_weights(state: State, folder: Path) -> None:
    """Write model.safetensors."""
    # A copy on the CPU, because safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})


def write_card(card: EncoderCard, folder: Path) -> None:
    """Write card.json."""
    write_json(folder / CARD, card.to_json())


def read_own_folder(folder: Path) -> LoadedWeights:
    """A folder that `export` wrote.

    Raises:
        ValueError: a file is missing or broken.
    """
    path = folder / CARD
    values = read_json(path)
    try:
        card = EncoderCard.from_json(values)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error
    state = read_safetensors(folder / WEIGHTS)
    return LoadedWeights("exported folder", card.encoder, dict(card.arguments), state, card=card, value_range=card.value_range)


def read_own_checkpoint(content: object, options: LoadOptions, *, path: Path) -> LoadedWeights | None:
    """One side of a checkpoint of a training run; None where the file was not written by a training run of this package.

    Args:
        content: what the file holds.
        options: options of `load_backbone`; where the teacher is asked for and a method has none, the student's encoder is taken.
        path: the file, for messages.

    Raises:
        ValueError: the checkpoint has no encoder, or one that does not fit its card.
    """
    if not isinstance(content, dict) or not {"encoder_card", "method", "global_step"} <= content.keys():
        return None
    if not is_state(state := content.get("state_dict")):
        return None
    side = _side(state, options.get("which", "teacher"), path=path)
    prefix = f"{_BRANCHES[side]}{_ENCODER}"
    own = _under(prefix, content, state, path=path)
    try:
        with torch.device("meta"):  # only to give the tensors their names, so that shapes are compared before anything takes memory
            encoder = build(EncoderCard.from_json(content["encoder_card"]))
            encoder.add_pretraining(own)
        load_strictly(encoder, in_single_precision(own, path=path), assign=True)
    except ValueError as error:
        raise ValueError(f"load_backbone: {path}: {error}") from error
    arguments = {**encoder.card.arguments, "source": f"{content['method']}, {content['global_step']} steps"}
    left_out = (*sorted(name for name in state if not name.startswith(prefix)), *(name for name in PRETRAINING if name in own))
    of_it = {"left_out": left_out, "value_range": encoder.card.value_range}
    return LoadedWeights(f"checkpoint ({side})", encoder.card.encoder, arguments, encoder.backbone_state(), **of_it)


def read_heads(path: Path, *, which: Which = "teacher") -> State:
    """What one side of a checkpoint of a training run holds beside its backbone, under the names of `training.Branch`.

    Args:
        path: the file.
        which: side; where the teacher is asked for and a method has none, the student.

    Returns:
        Heads, and the tensors of the encoder that only pretraining needs (`encoders.base.PRETRAINING`).

    Raises:
        ValueError: it is no such file, or its method has no heads.
    """
    accepted = "accepted: a checkpoint of a training run, such as runs/mmc/latest/checkpoints/last.ckpt"
    if path.is_dir():
        raise ValueError(f"load_heads: {path} is a folder, which has no heads; {accepted}")
    content = read_content(path)
    state = content.get("state_dict") if isinstance(content, dict) and "encoder_card" in content else None
    if not isinstance(content, dict) or not is_state(state):
        raise ValueError(f"load_heads: {path} was not written by a training run of glpretrain; {accepted}")
    found = _under(_BRANCHES[_side(state, which, path=path)], content, state, path=path)
    wanted = {f"{_ENCODER}{name}" for name in PRETRAINING}
    found = {name: tensor for name, tensor in found.items() if name.startswith("heads.") or name in wanted}
    if not any(name.startswith("heads.") for name in found):
        raise ValueError(f"load_heads: {path} has no heads: {content.get('method')} trains without any")
    return in_single_precision(found, path=path)


def _side(state: State, which: Which, *, path: Path) -> Which:
    """The side of a checkpoint that is there: where the teacher is asked for and a method has none, the student.

    Raises:
        ValueError: the checkpoint has no encoder.
    """
    sides: tuple[Which, ...] = ("student",) if which == "student" else ("teacher", "student")
    for side in sides:
        if any(name.startswith(f"{_BRANCHES[side]}{_ENCODER}") for name in state):
            return side
    starts = " or ".join(f"{_BRANCHES[side]}{_ENCODER}" for side in sides)
    raise ValueError(f"load_backbone: {path} has no encoder: no tensor starts with {starts}; found {listed(sorted(state))}")


def _under(prefix: str, content: dict, state: State, *, path: Path) -> State:
    """The tensors whose names begin with a prefix, without it; whole ones, of a sharded checkpoint too."""
    parts = _parts(content, path=path)
    own = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): _whole(tensor, parts, name=name, path=path) for name, tensor in own.items()}


def _parts(content: dict, *, path: Path) -> Parts | None:
    """The parts of a sharded checkpoint, which are mapped into memory and not read; None of any other."""
    if not is_head(content):
        return None
    parts = []
    for file in files_of(content, path=path):
        part = read_pickle(file, mapped=True)
        if not isinstance(part, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in part.values()):
            raise ValueError(f"load_backbone: {file} does not hold the parts of a sharded checkpoint")
        parts.append(part)
    return Parts(parts)


def _whole(tensor: torch.Tensor, parts: Parts | None, *, name: str, path: Path) -> torch.Tensor:
    if parts is None or not tensor.is_meta:
        return tensor
    try:
        whole = parts.whole(("state_dict", name))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"load_backbone: {path}: its shards do not hold {name}") from error
    if whole.shape != tensor.shape:
        raise ValueError(f"load_backbone: {path}: {name} has shape {tuple(whole.shape)} in its shards, {tuple(tensor.shape)} in itself")
    return whole
