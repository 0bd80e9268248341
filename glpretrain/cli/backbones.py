"""The verbs that open backbones: `glpretrain export` and `glpretrain inspect`.

Layouts (`glpretrain.weights.exports`) and the page (`glpretrain.report`) are left out.
"""

from pathlib import Path
from typing import Literal

from glpretrain import modalities
from glpretrain.cli.opening import opened, read_in_range
from glpretrain.core.imports import imported
from glpretrain.core.types import EncoderCard
from glpretrain.finetune import FineTuned, is_fine_tuned
from glpretrain.report import untrained as fresh
from glpretrain.runs import BACKBONE, START, calibrated_threshold
from glpretrain.use import own_source
from glpretrain.weights.exports import export_as

_OF_FOLDER = 8  # items of a folder that are shown


def export(
    backbone: str,
    out: Path,
    *,
    format: Literal["folder", "timm", "huggingface", "torch", "onnx"] = "folder",
    img_size: tuple[int, ...] | None = None,
    any_size: bool = False,
    licence: str | None = None,
    which: Literal["teacher", "student"] = "teacher",
    read_as: str | None = None,
    num_heads: int | None = None,
) -> None:
    """Write a backbone to a folder: timm, Hugging Face, torch.export or ONNX.

    The encoder is written to a new folder, with its card (mean, std, licence) beside it. The command says how far the written one is
    from the encoder on a check batch.

    formats:
      folder       model.safetensors and config.json: load_backbone and timm's local-dir: open it
      timm         the same as folder
      huggingface  config.json, model.safetensors, preprocessor_config.json: transformers.AutoModel opens it; ViTs only
      torch        encoder.pt2: torch.export.load opens it, without this package and without timm
      onnx         encoder.onnx: input images, outputs cls and patches (pip install 'glpretrain[onnx]')
    torch and onnx take any number of images, normalised with the card's mean and std, of one size (--img_size) or of --any_size.

    A fine-tuned model is written with --format torch or onnx: model.pt2 or model.onnx, with the transform and the classes in card.json.

    Args:
        backbone: checkpoints/last.ckpt of a run, an exported folder, or a published checkpoint (DINO, MAE, DINOv2 and many others,
            which docs/weights.md lists)
        out: a new or empty folder
        format: layout that is written
        img_size: pixels, or height and width, that the export is made for; the encoder's own when left out
        any_size: torch and onnx: let height and width vary (not every model can)
        licence: licence of the weights
        which: side that is written, where there are two
        read_as: layout of a published file, where its contents do not tell (dino, mae, timm, ...)
        num_heads: number of attention heads, for a published file of an unpublished width
    """
    if is_fine_tuned(backbone):
        chosen = {"img_size": img_size, "any_size": any_size or None, "licence": licence, "read_as": read_as, "num_heads": num_heads}
        if given := [name for name, value in chosen.items() if value is not None]:
            raise ValueError(f"export: {', '.join(given)} given; a fine-tuned model takes --format only")
        if format != "torch" and format != "onnx":
            raise ValueError(f"export: format {format} given; a fine-tuned model is written as torch or onnx")
        print(FineTuned.load(backbone).export(out, format=format))
        return
    size = img_size[0] if img_size is not None and len(img_size) == 1 else img_size
    encoder = opened(backbone, which=which, format=read_as, num_heads=num_heads)
    print(export_as(encoder, out, format=format, img_size=size, any_size=any_size, licence=licence))


def inspect(
    backbone: str,
    images: list[Path],
    *,
    compare: list[str] = [],  # noqa: B006 - read only
    untrained: bool = False,
    out: Path = Path("report.html"),
    size: str | None = None,
    threshold: float | None = None,
    layers: str = "all",
    value_range: str | None = None,
) -> None:
    """Write a page to look into backbones: attention, patch PCA, prompts by click.

    The page is one file, complete in itself. It shows items as backbones see them: attention of every head and block, the PCA of the
    patches, and what resembles the patch that you click, with a threshold to move.

    Before and after training, side by side:
      glpretrain inspect runs/mmc/latest/backbone photo.jpg --untrained
      glpretrain inspect runs/mmc/latest/backbone photos/ --untrained
      glpretrain inspect mmc=runs/mmc/latest/backbone a.jpg b.jpg --compare mae=runs/mae/latest/backbone --size 192

    Args:
        backbone: folder of a run or export, or a published checkpoint; NAME=PATH names it
        images: pictures, which are stretched to the size of the backbone, or folders of them, of which eight are shown, evenly spaced;
            clouds or meshes where the backbone is for points
        compare: another backbone beside it (may be repeated)
        untrained: also the architecture of the first backbone with fresh weights
        out: a new file; one that exists gets a number (report-2.html)
        size: side of the square, or HEIGHTxWIDTH, or number of points, to look at; each backbone's own when left out
        threshold: cosine that the page opens with; when left out each backbone's own: the one that its run calibrated on masks
            (results.json), or else one that divides the cosines of these pictures
        layers: blocks whose attention is kept: all, last, or numbers such as 0,5,11
        value_range: LOW,HIGH: the values of files that become black and white, for .npy, TIFF, DICOM and 16-bit images; none takes files as
            they are; that of each backbone's training when left out
    """
    out, paths = _free(out), dict[str, str]()
    for given in (backbone, *compare):
        name, path = _name(given)
        if name in paths:
            raise ValueError(f"inspect: two backbones are called {name!r}; name them, as in before={path}")
        paths[name] = path
    encoders = {name: opened(path) for name, path in paths.items()}
    for encoder in encoders.values():
        read_in_range(encoder, value_range)
    own = {name: found for name, path in paths.items() if size is None and (found := _calibrated(Path(path))) is not None}
    if untrained:
        if "untrained" in encoders:
            raise ValueError("inspect: a backbone is called 'untrained' and --untrained adds another; choose another name")
        encoders = {"untrained": fresh(next(iter(encoders.values()))), **encoders}
    card = next(iter(encoders.values())).card
    files = [file for path in images for file in (_some_of(path, card) if path.is_dir() else [path])]
    page = imported(modalities.get(card.modality).page)
    path = page(encoders, files, out=out, size=_size(size), threshold=own if threshold is None else threshold, layers=_layers(layers))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, open it in a browser")


def _free(out: Path) -> Path:
    """The path, with a number where there is such a file already."""
    count, free = 1, out
    while free.exists():
        count += 1
        free = out.with_name(f"{out.stem}-{count}{out.suffix}")
    return free


def _calibrated(backbone: Path) -> float | None:
    """The threshold that the run calibrated in which a backbone lies."""
    if backbone.name == BACKBONE:
        return calibrated_threshold(backbone.parent, when="after")
    return calibrated_threshold(backbone.parent, when="before") if backbone.name == START else None


def _some_of(folder: Path, card: EncoderCard) -> list[Path]:
    """Evenly spaced files of a folder."""
    source = own_source(folder, card)
    if not source.paths:
        raise ValueError(f"inspect: {folder} holds its items in {type(source).__name__}; accepted: files, or folders of files")
    count = min(_OF_FOLDER, len(source))
    return [Path(source.paths[(2 * number + 1) * len(source) // (2 * count)]) for number in range(count)]


def _name(given: str) -> tuple[str, str]:
    """What a backbone is called on the page, and its folder: NAME=PATH, or the end of the path that tells it from others."""
    name, equals, path = given.partition("=")
    if equals and name and not Path(given).exists():
        return name, path
    parts = Path(given).parts
    if len(parts) > 1 and parts[-1] == BACKBONE:
        parts = parts[:-1]
    return "/".join(parts[-2:]), given


def _size(given: str | None) -> int | tuple[int, int] | None:
    if given is None:
        return None
    sides = given.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"inspect: --size {given}; accepted: PIXELS, or HEIGHTxWIDTH, as in 224 or 224x320")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _layers(given: str) -> Literal["all", "last"] | list[int]:
    if given == "all" or given == "last":
        return given
    try:
        return [int(number) for number in given.split(",")]
    except ValueError as error:
        raise ValueError(f"inspect: --layers {given}; accepted: all, last, or numbers such as 0,5,11") from error
