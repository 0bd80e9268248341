"""Any backbone that this package knows, as an encoder: own folders and checkpoints, published checkpoints, timm and Hugging Face.

Left out: reading each of them (`folders`, `published`), and giving the tensors to an encoder (`fitting`).
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from glpretrain.encoders import Encoder
from glpretrain.weights.files import State, listed, read_content, read_json
from glpretrain.weights.fitting import fit
from glpretrain.weights.folders import CARD, LIBRARY_CONFIG, read_heads, read_own_checkpoint, read_own_folder
from glpretrain.weights.names import FILES
from glpretrain.weights.places import located
from glpretrain.weights.published import read_huggingface_folder, read_published_file, read_timm_folder
from glpretrain.weights.report import LoadedWeights, LoadOptions, LoadReport, Which

_log = logging.getLogger(__name__)


def load_backbone(x: str | Path, **options: Unpack[LoadOptions]) -> Encoder:
    """A trained encoder in evaluation mode on the CPU. What was loaded, and the name of every tensor, is logged (`logging`, level INFO).

    Args:
        x: a folder written by `export`, a checkpoint of a training run, a published checkpoint file (DINO, iBOT, Mugs, MAE, FSFM, DINOv2,
            DINOv3, MoCo v3, MSN, CONCH, ASiT, AST, Point-MAE, Point-BERT, POS-BERT, a timm state dict), a timm folder or a folder of a
            Hugging Face ViT or AST. Or, from the cache of huggingface_hub or the network: a name in `places.PUBLISHED`, such as
            facebook/dinov2-small; hf:OWNER/NAME; https://...#sha256=HEX.
        which: "teacher" (the default) or "student", for a checkpoint that holds both; the teacher is the moving copy (MoCo v3's momentum
            encoder, MSN's target encoder).
        in_chans: number of channels, where it should differ from the file's; an image whose channels are all equal keeps its features.
        img_size: height and width, where they should differ from the file's; learned positions are resized once, as the format's own
            code does it.
        strict: whether to raise where a tensor is missing, has no place or has another shape (the default); False leaves such tensors
            of the encoder as they were initialised.
        format: format of a published file, where it should not be guessed from the contents: a key of `names.FILES`.
        name: name of a ViT of timm, for a published file whose architecture cannot be read off its tensors.
        num_heads: number of attention heads, for a published file of a width that nobody published.
        mean: mean per channel, of items scaled to [0, 1]; None takes what the format was trained with.
        std: standard deviation per channel, likewise.

    Returns:
        An encoder. One from a folder that this package wrote gives the features of the exported encoder to the last bit.

    Raises:
        ValueError: something is missing, broken, unknown or does not fit; the message names it. Nothing in a file is ever run.
    """
    encoder, report = load_backbone_with_report(x, **options)
    for line in (str(report), *report.lines()):
        _log.info("%s", line)
    return encoder


def load_backbone_with_report(x: str | Path, **options: Unpack[LoadOptions]) -> tuple[Encoder, LoadReport]:
    """Like `load_backbone`, with the same arguments and errors, but returns the report instead of logging it."""
    _check(options)
    which, place = options.get("which", "teacher"), located(x)
    path = place.path
    try:
        weights = _read_folder(path) if path.is_dir() else _read_file(path, options)
    except ValueError as error:
        text = " ".join(str(error).split())  # a file's own words may hold line breaks
        raise ValueError(text if text.startswith("load_backbone: ") else f"load_backbone: {path}: {text}") from error
    hints = {"format": options.get("format"), "name": options.get("name"), "num_heads": options.get("num_heads")}
    if ignored := [f"{name}={value!r}" for name, value in hints.items() if value is not None and name not in weights.hints]:
        accepted = ", ".join(weights.hints) or "none of format, name and num_heads, for it says so itself"
        raise ValueError(f"load_backbone: {', '.join(ignored)} given; {path} ({weights.title}) accepts {accepted}")
    if which == "student" and "(student)" not in weights.title:
        raise ValueError(f"load_backbone: which='student' given; {path} ({weights.title}) does not hold a student of its own")
    if place.source and weights.card is None:
        words = {"source": place.source, "licence": place.licence or weights.arguments.get("licence")}
        weights = replace(weights, arguments=weights.arguments | {name: word for name, word in words.items() if word})
    return fit(weights, options, path=place.name)


def load_heads(x: str | Path, *, which: Which = "teacher") -> State:
    """The heads in a checkpoint of a training run, for `Method.init_from`.

    Args:
        x: checkpoint, such as runs/mmc/latest/checkpoints/last.ckpt.
        which: side; where the teacher is asked for and a method has none, the student.

    Returns:
        Tensors under the names of `training.Branch`, those of the encoder that only pretraining needs among them.

    Raises:
        ValueError: there is no such file, it is another one, or its method has no heads.
    """
    return read_heads(located(x).path, which=which)


def _check(options: LoadOptions) -> None:
    accepted = LoadOptions.__annotations__
    if unknown := sorted(options.keys() - accepted.keys()):
        raise ValueError(f"load_backbone: unknown arguments {', '.join(unknown)} given; accepted: {', '.join(accepted)}")
    if (which := options.get("which", "teacher")) not in ("teacher", "student"):
        raise ValueError(f"load_backbone: which={which!r} given; accepted: teacher, student")
    if (format := options.get("format")) is not None and format not in FILES:
        raise ValueError(f"load_backbone: format={format!r} given; accepted: {', '.join(FILES)}")


def _read_folder(folder: Path) -> LoadedWeights:
    config = read_json(folder / LIBRARY_CONFIG) if (folder / LIBRARY_CONFIG).is_file() else {}
    if "model_type" in config:  # before the card, because an export in Hugging Face's layout has one too
        return read_huggingface_folder(folder)
    if (folder / CARD).is_file():
        return read_own_folder(folder)
    if "architecture" in config:
        return read_timm_folder(folder)
    raise ValueError(
        f"load_backbone: {folder} has no {CARD}, and no {LIBRARY_CONFIG} with architecture (timm) or model_type (Hugging Face); "
        f"found: {listed(sorted(path.name for path in folder.iterdir()))}"
    )


def _read_file(path: Path, options: LoadOptions) -> LoadedWeights:
    content = read_content(path)
    if (weights := read_own_checkpoint(content, options, path=path)) is not None:
        return weights
    return read_published_file(content, options, path=path)
