"""A backbone that a verb was given, with the line that says what became of its tensors. Loading itself is left out (`weights`)."""

import math
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


def read_in_range(encoder: Encoder, given: str | None) -> None:
    """Read files with another range of values than that of the backbone.

    Args:
        encoder: the backbone.
        given: `LOW,HIGH`, or `none` for files as they are; None leaves the backbone's own.

    Raises:
        ValueError: it is something else, or the encoder is not for images.
    """
    if given is None:
        return
    if (modality := encoder.card.modality) != "image":
        raise ValueError(f"--value_range {given} given for {modality}; accepted: with a backbone for images")
    if given == "none":
        encoder.set_value_range(())
        return
    try:
        low, high = (float(number) for number in given.split(","))
    except ValueError:
        low = high = float("nan")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--value_range {given} given; accepted: LOW,HIGH with the lower number first, as in 0,5000; or none")
    encoder.set_value_range([(low, high)] * encoder.card.item_shape[0])
