"""Loading a frozen teacher from a file or folder: what a recipe writes for each of its experts."""

from collections.abc import Sequence
from pathlib import Path

import torch

from glpretrain.encoders import build_from, timm_adapter
from glpretrain.training.teacher import FrozenTeacher, Precision
from glpretrain.weights.load import load_backbone
from glpretrain.weights.report import Which


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

    All arguments are written out here, because the config.yaml of a run lists them with their defaults.

    Args:
        path: what `load_backbone` accepts: a folder that this package, timm or Hugging Face wrote, or a checkpoint file.
        size: height and width that views are resized to; None takes the size that the expert was trained on.
        precision: precision of the weights and of what the expert computes.
        random_weights: whether `path` is the name of a timm model, which is built and left untrained, for trying a recipe out.
        which: see `load_backbone`, also for the arguments that follow.
        format: format of a published file.
        name: name of a ViT of timm, for a published file.
        num_heads: number of attention heads, for a published file.
        mean: mean per channel, of items scaled to [0, 1].
        std: standard deviation per channel, likewise.

    Raises:
        ValueError: there is nothing at `path`, the weights do not fit, or a setting would be ignored.
    """
    if random_weights:
        hints = {"which": which if which != "teacher" else None, "format": format, "name": name, "num_heads": num_heads}
        if given := [hint for hint, value in hints.items() if value is not None]:
            raise ValueError(f"load_expert: {', '.join(given)} given; an expert of random weights has no file that they would describe")
        with torch.random.fork_rng(devices=[]):  # so that the student draws the same numbers as without experts
            encoder = build_from(timm_adapter(path), {"name": path, "mean": mean, "std": std, "source": "random weights"})
        return FrozenTeacher(encoder, size=size, precision=precision)
    if not Path(path).exists():
        raise ValueError(
            f"load_expert: {path} does not exist; accepted: a backbone that a run of this package exported, or a folder or file that you "
            "downloaded; get weights behind a licence (UNI, Phikon, CONCH) from their owners and put their files there"
        )
    with torch.random.fork_rng(devices=[]):  # for the same reason; the file overwrites what is drawn
        encoder = load_backbone(path, which=which, format=format, name=name, num_heads=num_heads, mean=mean, std=std)
    return FrozenTeacher(encoder, size=size, precision=precision)
