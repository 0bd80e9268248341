"""Any backbone that this package knows, as an encoder: own folders and checkpoints, published checkpoints, timm and Hugging Face.

Left out: how each of them names its tensors (`formats`, `configured`), and writing (`folders`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from glpretrain.encoders import Encoder
from glpretrain.weights.architecture import infer
from glpretrain.weights.coca import is_coca, read_coca
from glpretrain.weights.configured import read_huggingface_folder, read_timm_folder
from glpretrain.weights.files import read_json, read_pickle, read_safetensors
from glpretrain.weights.fitting import fit
from glpretrain.weights.folders import CARD, LIBRARY_CONFIG, is_own_checkpoint, read_own_checkpoint, read_own_folder
from glpretrain.weights.formats import FORMATS, SATELLITE, Which, in_single_precision, recognise, unwrap
from glpretrain.weights.imported import LoadedWeights
from glpretrain.weights.point_formats import read_point_checkpoint
from glpretrain.weights.report import LoadReport

_log = logging.getLogger(__name__)


def load_backbone(
    x: str | Path,
    *,
    which: Which = "teacher",
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    strict: bool = True,
    format: str | None = None,
    name: str | None = None,
    num_heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Encoder:
    """A trained encoder in evaluation mode on the CPU; prints one line about what was loaded and logs every name.

    Args:
        x: a folder written by `export`, a checkpoint of a training run, a published checkpoint file (DINO, iBOT, Mugs, MAE, FSFM, DINOv2,
            DINOv3, MoCo v3, MSN, CONCH, Point-MAE, Point-BERT, POS-BERT, a timm state dict), a timm folder or a folder of a Hugging Face
            ViT.
        which: side of a checkpoint that holds both; the teacher is the moving copy (MoCo v3's momentum encoder, MSN's target encoder).
        in_chans: channels other than the file's; an image whose channels are all equal keeps its features.
        img_size: height and width other than the file's; learned positions are resized once, as the format's own code does.
        strict: raise where a tensor is missing, without a place, or of another shape; otherwise such tensors stay fresh.
        format: of a published file, where it should not be guessed from its contents: a key of `formats.FORMATS`.
        name: a ViT of timm, for a published file whose architecture cannot be read off its tensors.
        num_heads: for a published file of an unpublished width.
        mean: per channel, of items scaled to [0, 1]; None is what the format was trained with.
        std: likewise.

    Returns:
        An encoder; one from a folder of this package gives the features of the exported one to the last bit.

    Raises:
        ValueError: names what is missing, broken, unknown or does not fit. Nothing in a file is ever run.
    """
    encoder, report = load_backbone_with_report(
        x,
        which=which,
        in_chans=in_chans,
        img_size=img_size,
        strict=strict,
        format=format,
        name=name,
        num_heads=num_heads,
        mean=mean,
        std=std,
    )
    for line in report.lines():
        _log.info("%s", line)
    print(report)
    return encoder


def load_backbone_with_report(
    x: str | Path,
    *,
    which: Which = "teacher",
    in_chans: int | None = None,
    img_size: int | Sequence[int] | None = None,
    strict: bool = True,
    format: str | None = None,
    name: str | None = None,
    num_heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Encoder, LoadReport]:
    """`load_backbone` that says nothing and returns its report too; the same arguments and errors."""
    if which not in ("teacher", "student"):
        raise ValueError(f"load_backbone: which={which!r} given; accepted: teacher, student")
    if format is not None and format not in FORMATS:
        raise ValueError(f"load_backbone: format={format!r} given; accepted: {', '.join(FORMATS)}")
    path, hints = Path(x), {"format": format, "name": name, "num_heads": num_heads}
    if path.is_dir():
        _refuse(hints, path=path)
        imported = _read_folder(path)
    elif path.is_file():
        imported = _read_file(path, which=which, **hints)
    else:
        raise ValueError(f"load_backbone: {path} does not exist; accepted: a folder or a checkpoint file")
    if which == "student" and "(student)" not in imported.title:
        raise ValueError(f"load_backbone: which='student' given; {path} is {imported.title} and does not hold a student of its own")
    return fit(imported, in_chans=in_chans, img_size=img_size, mean=mean, std=std, strict=strict, path=str(path))


def _read_folder(folder: Path) -> LoadedWeights:
    config = read_json(folder / LIBRARY_CONFIG) if (folder / LIBRARY_CONFIG).is_file() else {}
    if "model_type" in config:  # before the card: an export in Hugging Face's layout has one too
        return read_huggingface_folder(folder)
    if (folder / CARD).is_file():
        return read_own_folder(folder)
    if "architecture" in config:
        return read_timm_folder(folder)
    raise ValueError(
        f"load_backbone: {folder} has no {CARD}, and no {LIBRARY_CONFIG} with architecture (timm) or model_type (Hugging Face); "
        f"found: {sorted(path.name for path in folder.iterdir())}"
    )


def _read_file(path: Path, *, which: Which, format: str | None, name: str | None, num_heads: int | None) -> LoadedWeights:
    pickled = path.suffix != ".safetensors"
    content = read_pickle(path) if pickled else read_safetensors(path)
    if is_own_checkpoint(content):
        _refuse({"format": format, "name": name, "num_heads": num_heads}, path=path)
        return read_own_checkpoint(content, which=which, path=str(path))
    if (points := read_point_checkpoint(content, which=which, num_heads=num_heads, path=path.name)) is not None:
        _refuse({"format": format, "name": name}, path=path)
        return points
    found = unwrap(content, which=which, path=str(path))
    if is_coca(found.state):
        if format is not None:
            raise ValueError(f"load_backbone: format={format!r} given; {path} is CONCH's, which has no other name")
        return read_coca(in_single_precision(found.state), name=name, num_heads=num_heads, path=str(path), file=path.name)
    format = format or recognise(found, pickled=pickled, path=str(path))
    kind = FORMATS[format]
    raw = in_single_precision(found.state)
    state = kind.rename(raw)
    arguments, state, assumed = infer(
        state, name=name, num_heads=num_heads, heads=kind.heads, periods=raw.get("rope_embed.periods"), path=str(path)
    )
    registers = "reg_token" in state
    statistics = SATELLITE if format == "dinov3" and "sat493m" in path.name else kind.statistics
    title = f"{kind.title} ({found.side})" if found.side else kind.title
    arguments |= {
        # DINOv2 resizes the positions of its models with registers as timm does.
        "position_resize": "timm" if format == "dinov2" and registers else kind.position_resize,
        "mean": statistics[0],
        "std": statistics[1],
        "source": f"{title}, {path.name}",
    }
    return LoadedWeights(title, "ViT", arguments, state, kind.pretraining, found.left_out, assumed)


def _refuse(hints: dict[str, str | int | None], *, path: Path) -> None:
    """A setting that is ignored is an error."""
    if given := [hint for hint, value in hints.items() if value is not None]:
        raise ValueError(f"load_backbone: {', '.join(given)} given; {path} says so itself, they are for published checkpoint files")
