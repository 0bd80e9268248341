"""A backbone that a verb was given, with the line that says what became of its tensors. Loading itself is left out (`weights`)."""

from pathlib import Path
from typing import Unpack

import torch

from glpretrain.encoders import Encoder
from glpretrain.weights import LoadOptions, load_backbone_with_report


def opened(backbone: str | Path, **options: Unpack[LoadOptions]) -> Encoder:
    """`load_backbone`, and a line on standard output."""
    encoder, report = load_backbone_with_report(backbone, **options)
    print(report)
    return encoder


def opened_to_work(backbone: str | Path) -> Encoder:
    """The same on a GPU, where there is one."""
    encoder = opened(backbone)
    return encoder.cuda() if torch.cuda.is_available() else encoder
