"""The name of an encoder by what it computes: a digest of its weights and card."""

import hashlib
import json
from dataclasses import asdict

import torch
from torch import Tensor

from glpretrain.encoders.base import Encoder


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 of the weights, with their names, and of the card: equal for an encoder and its export on any device."""
    digest = hashlib.sha256()
    card = asdict(encoder.card)
    # A licence or a note about the source changes no feature.
    for part in (card, card["arguments"]):
        part.update(dict.fromkeys(("licence", "source"), ""))
    digest.update(json.dumps(card, sort_keys=True).encode())
    for name, tensor in sorted(encoder.backbone_state().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, row by row."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
