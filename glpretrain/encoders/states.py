"""Weights of encoders by name: loaded strictly, and told apart by a fingerprint.

Left out: files (`glpretrain.weights`).
"""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from glpretrain.encoders.base import Encoder


def load_strictly(module: nn.Module, state: dict[str, Tensor], *, assign: bool = False) -> None:
    """`load_state_dict` that accepts exactly the module's names and shapes.

    Args:
        module: module to fill.
        state: its tensors.
        assign: whether the module keeps the given tensors instead of copying their numbers.

    Raises:
        ValueError: names every missing tensor, every unknown one and every tensor of a wrong shape.
    """
    own = module.state_dict()
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"missing {missing}")
    if extra := sorted(state.keys() - own.keys()):
        problems.append(f"unknown {extra}")
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, accepted {tuple(own[name].shape)}")
    if problems:
        raise ValueError("weights do not fit the encoder: " + "; ".join(problems))
    module.load_state_dict(state, assign=assign)


def fingerprint(encoder: "Encoder") -> str:
    """SHA-256 of the weights, their names and the card: the same for an encoder and its export, on any device."""
    digest = hashlib.sha256()
    card = asdict(encoder.card)
    # What the pixels of a file are, the licence and the source of the weights change no feature.
    del card["value_range"]
    for part in (card, card["arguments"]):
        part.update(dict.fromkeys(("licence", "source"), ""))
    digest.update(json.dumps(card, sort_keys=True).encode())
    for name, tensor in sorted(encoder.backbone_state().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:  # a plan of memory has shapes and no numbers
            digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
