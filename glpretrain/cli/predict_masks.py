"""What `glpretrain predict` writes with a model for segmentation: masks and overlays, the colours, and a table of the shares of classes.

What a model computes is left out (`glpretrain.finetune`), and so are predictions of one class for each file (`predict`).
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from glpretrain.core.files import part_file
from glpretrain.core.listing import printable
from glpretrain.evaluate.figures import class_colours, picture
from glpretrain.evaluate.progress import tracked
from glpretrain.finetune import FineTuned, segmentations

_MOST_CLASSES = 256  # of a palette file
_OPACITY = 0.5  # of the colours over a picture
_QUALITY = 92  # of overlays, in JPEG


def write_masks(
    model: FineTuned, paths: Sequence[Path], *, given: Sequence[Path], out: Path, folder: Path, batch_size: int, num_workers: int
) -> None:
    """Write `folder`/masks, `folder`/overlays, `folder`/classes.csv, and the table `out`; a file that cannot be read costs one line.

    Args:
        model: a model for segmentation.
        paths: the files.
        given: what the user named: files, and folders below which a mask keeps the path of its file.
        out: table with the share of each class in each file.
        folder: folder of the masks.
        batch_size: number of windows that are computed at once.
        num_workers: processes that read.

    Raises:
        ValueError: there are too many classes, two files would have the same mask, or none can be read.
    """
    if len(model.classes) > _MOST_CLASSES:
        raise ValueError(f"predict: the model has {len(model.classes)} classes; accepted: {_MOST_CLASSES} at most, as in a palette file")
    names = mask_names(paths, given)
    colours = (255 * torch.tensor(class_colours(len(model.classes)))).round().byte()  # [K 3]
    _write_colours(folder / "classes.csv", model.classes, colours)
    num_written = 0
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with part_file(out) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *model.classes])
        found = segmentations(model, paths, batch_size=batch_size, num_workers=num_workers)
        for (path, image, classes, reason), name in zip(tracked(found, total=len(paths), description="predicting"), names, strict=True):
            if image is None or classes is None:
                console.print(f"skipped, cannot be read: {printable(reason)}", markup=False)
                continue
            with part_file(folder / "masks" / name) as mask:
                palette_image(classes, colours).save(mask, format="PNG")
            with part_file(folder / "overlays" / name.with_suffix(".jpg")) as shown:
                overlay(image, classes, colours).save(shown, format="JPEG", quality=_QUALITY)
            shares = classes.flatten().bincount(minlength=len(model.classes)) / classes.numel()
            writer.writerow([path, *(f"{share:.6f}" for share in shares.tolist())])
            num_written += 1
        if not num_written:
            raise ValueError(f"predict: none of {len(paths)} files can be read; the first is {paths[0]}")
    left_out = "" if num_written == len(paths) else f", {len(paths) - num_written} that cannot be read are left out"
    print(f"{num_written} masks in {folder}/masks, overlays in {folder}/overlays, colours in {folder}/classes.csv{left_out}")
    print(f"shares of the classes in {out}")


def mask_names(paths: Sequence[Path], given: Sequence[Path]) -> list[Path]:
    """The path of each file's mask below the folder of masks: that of the file below the folder that was given, ending in .png.

    Raises:
        ValueError: two files would have the same.
    """
    folders = [folder for folder in given if folder.is_dir()]
    names: dict[Path, Path] = {}
    for path in paths:
        folder = next((one for one in folders if path.is_relative_to(one)), path.parent)
        name = path.relative_to(folder).with_suffix(".png")
        if name in names:
            raise ValueError(f"predict: {names[name]} and {path} would have the same mask, {name}; give them in two calls")
        names[name] = path
    return list(names)


def palette_image(classes: Tensor, colours: Tensor) -> Image.Image:
    """A palette image whose values are the classes Int[H W], in the colours UInt8[K 3]."""
    image = Image.fromarray(classes.byte().numpy())
    image.putpalette(colours.flatten().tolist())
    return image


def overlay(image: Tensor, classes: Tensor, colours: Tensor) -> Image.Image:
    """The image UInt8[C H W] under the colours of its classes."""
    return Image.blend(Image.fromarray(picture(image)), Image.fromarray(colours[classes].numpy()), _OPACITY)


def _write_colours(path: Path, classes: Sequence[str], colours: Tensor) -> None:
    """The value, the name and the colour of each class, as `MaskedFolder` reads them."""
    with part_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "name", "colour"])
        writer.writerows(
            [number, name, "#" + bytes(colour).hex()] for number, (name, colour) in enumerate(zip(classes, colours.tolist(), strict=True))
        )
