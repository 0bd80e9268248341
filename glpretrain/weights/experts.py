"""A frozen teacher by where its weights are: what a recipe writes for each of its experts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from glpretrain.encoders import build_from, timm_adapter
from glpretrain.training.teacher import FrozenTeacher, Precision
from glpretrain.weights.formats import Which
from glpretrain.weights.loading import load_backbone


def load_expert(
    path: str,
    *,
    size: int | tuple[int, int] | None = None,
    precision: Precision = "float32",
    random_weights: bool = False,
    which: Which = "teacher",
    format: str | None = None,
    name: str | None = None,
    num_heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrozenTeacher:
    """A frozen teacher with trained weights.

    Args:
        path: what `load_backbone` takes: a folder that this package, timm or Hugging Face wrote, or a checkpoint file.
        size: height and width that views are resized to; None is the size that the expert was trained on.
        precision: of its weights and of what it computes.
        random_weights: `path` is the name of a timm model, which is built and left untrained. For trying a recipe out.
        which: see `load_backbone`, as what follows.
        format: of a published file.
        name: a ViT of timm, for a published file.
        num_heads: for a published file.
        mean: per channel, of items scaled to [0, 1].
        std: likewise.

    Raises:
        ValueError: nothing is there, it does not fit, or a setting would be ignored.
    """
    if random_weights:
        hints = {"which": which if which != "teacher" else None, "format": format, "name": name, "num_heads": num_heads}
        if given := [hint for hint, value in hints.items() if value is not None]:
            raise ValueError(f"load_expert: {', '.join(given)} given; an expert of random weights has no file that they would describe")
        with torch.random.fork_rng(devices=[]):  # the student draws what it draws without experts
            encoder = build_from(timm_adapter(path), {"name": path, "mean": mean, "std": std, "source": "random weights"})
        return FrozenTeacher(encoder, size=size, precision=precision)
    if not Path(path).exists():
        raise ValueError(
            f"load_expert: {path} does not exist; accepted: a backbone that a run of this package exported, or a folder or file that you "
            "downloaded; weights behind a licence (UNI, Phikon, CONCH) come from their owners, their files go into this folder"
        )
    with torch.random.fork_rng(devices=[]):  # here too: what is drawn is overwritten by the file
        encoder = load_backbone(path, which=which, format=format, name=name, num_heads=num_heads, mean=mean, std=std)
    return FrozenTeacher(encoder, size=size, precision=precision)
