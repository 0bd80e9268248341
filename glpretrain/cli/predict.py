"""`glpretrain predict`: classes of new files by a fine-tuned model, as a table and as pictures to look at.

What a model computes is left out (`glpretrain.finetune`), and so are masks (`predict_masks`).
"""

import csv
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from glpretrain import modalities
from glpretrain.cli.predict_masks import write_masks
from glpretrain.core.files import part_file
from glpretrain.core.listing import printable
from glpretrain.data.label_sets import joined
from glpretrain.evaluate.progress import tracked
from glpretrain.finetune import FineTuned, Multilabel, Parts, Segmentation, Transform, predictions
from glpretrain.runs import require_outside

_FOUND = 0.5  # probability from which a file has a label, where it may have several
_SHOWN = 24  # files on a contact sheet
_COLUMNS, _CELL = 6, 1.9  # cells of a contact sheet, and their size in inches
_SIDE = 160  # pixels of a picture on it, at least


class _Certain(NamedTuple):
    probability: float
    path: Path
    name: str  # of the class


def predict(
    model: str,
    files: list[Path],
    *,
    out: Path = Path("predictions.csv"),
    top: int | None = None,
    pictures: Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> None:
    """Predict the classes of new files, or of their pixels, with a fine-tuned model.

    The table has a row per file: its path, the predicted class and its probability, then the next classes; and where a file may have
    several labels, those of a probability above one half before these. It is complete or not there.
    A file that cannot be read costs one line and has no row.
      glpretrain predict runs/finetune/classification/latest/model photos/
      glpretrain predict runs/finetune/classification/latest/model a.jpg b.jpg --out ab.csv --pictures sheets/
    With a model for segmentation, the table has the share of each class in a file, and the folder of pictures has masks/ (palette PNGs with
    the names of the files), overlays/ and classes.csv, the colours.
      glpretrain predict runs/finetune/segmentation/latest/model photos/           predictions_pictures/masks/...

    Args:
        model: folder that glpretrain finetune wrote: runs/.../latest/model
        files: images, or folders of images; clouds and meshes for a model of clouds, sounds for a model of sounds
        out: table that is written, in CSV
        top: number of classes that a row names, of a model for classification; 3 when left out
        pictures: folder for two contact sheets: the files of which the model is most and least certain; or for masks: the name of --out
            with _pictures when left out
        batch_size: number of files, or of windows of one file, that are computed at once
        num_workers: processes that read the files; this one alone with 0

    Raises:
        ValueError: there is no such model or no image, or none of them can be read.
    """
    if (top is not None and top < 1) or batch_size < 1:
        raise ValueError(f"predict: --top {top} and --batch_size {batch_size} given; accepted: numbers from 1 on")
    if out.is_dir():
        raise ValueError(f"predict: --out {out} is a folder; accepted: a file, such as {out / 'predictions.csv'}")
    tuned = FineTuned.load(model)
    if tuned.card.task == Parts.task:
        raise ValueError(f"predict: {model} needs the category of each cloud, which files do not say; give it in Python: FineTuned.predict")
    paths = _found(files, find=tuned.transform.files_in, kind=tuned.transform.kind)
    if pictures is not None:
        require_outside("pictures", pictures, given=files)
    if torch.cuda.is_available():
        tuned.cuda()
    if tuned.card.task == Segmentation.task:
        if top is not None:
            raise ValueError(f"predict: --top {top} given; a model for segmentation takes none, its table has the shares of all classes")
        folder = pictures or out.with_name(f"{out.stem}_pictures")
        require_outside("pictures", folder, given=files)
        write_masks(tuned, paths, given=files, out=out, folder=folder, batch_size=batch_size, num_workers=num_workers)
        return
    shown = min(3 if top is None else top, len(tuned.classes))
    most: list[_Certain] = []
    least: list[_Certain] = []
    num_predicted = 0
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with part_file(out) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        further = [f"{name}_{number}" for number in range(2, shown + 1) for name in ("class", "probability")]
        several = tuned.card.task == Multilabel.task
        writer.writerow(["file", *(["labels"] if several else []), "class", "probability", *further])
        found = predictions(tuned, paths, batch_size=batch_size, num_workers=num_workers)
        for path, probabilities, reason in tracked(found, total=len(paths), description="predicting"):
            if probabilities is None:
                console.print(f"skipped, cannot be read: {printable(reason)}", markup=False)
                continue
            row = _row(probabilities, tuned.classes, shown)
            labels = [joined([name for name, there in zip(tuned.classes, probabilities > _FOUND, strict=True) if there])] if several else []
            writer.writerow([path, *labels, *(word for name, probability in row for word in (name, f"{probability:.6f}"))])
            num_predicted += 1
            if pictures is not None:
                certain = _Certain(row[0][1], path, row[0][0])
                most = heapq.nlargest(_SHOWN, [*most, certain])
                least = heapq.nsmallest(_SHOWN, [*least, certain])
        if not num_predicted:
            raise ValueError(f"predict: none of {len(paths)} files can be read; the first is {paths[0]}")
    left_out = "" if num_predicted == len(paths) else f", {len(paths) - num_predicted} that cannot be read are left out"
    print(f"{num_predicted} predictions in {out}{left_out}")
    if pictures is not None:
        for name, chosen in (("most_certain", most), ("least_certain", least)):
            with part_file(pictures / f"{name}.png") as part:
                contact_sheet(chosen, tuned).savefig(part, dpi=110, format="png")
        print(f"contact sheets in {pictures}/: most_certain.png, least_certain.png")


def _found(files: Sequence[Path], *, find: Callable[[Path], Iterable[Path]], kind: str) -> list[Path]:
    """All files, those of folders in the order of their names, each once.

    Raises:
        ValueError: a path does not exist, or there is no image or cloud.
    """
    found: dict[Path, None] = {}
    for path in files:
        if not path.exists():
            raise ValueError(f"predict: {path} does not exist; accepted: {kind}s and folders of {kind}s")
        found |= dict.fromkeys(find(path) if path.is_dir() else [path])
    if not found:
        raise ValueError(f"predict: no {kind} in {', '.join(map(str, files))}")
    return list(found)


def _row(probabilities: Tensor, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The most probable classes with their probabilities."""
    return [(classes[int(place)], float(probabilities[place])) for place in probabilities.topk(count).indices]


def contact_sheet(chosen: Sequence[_Certain], model: FineTuned) -> Figure:
    """Pictures of images, clouds or sounds with their class and its probability in percent, in the given order."""
    num_rows = math.ceil(len(chosen) / _COLUMNS)
    figure = Figure(figsize=(_CELL * _COLUMNS, (_CELL + 0.3) * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, one in zip(axes.flat, chosen, strict=False):
        if not isinstance(model.transform, Transform):
            card = model.card.encoder
            pixels = modalities.get(card.modality).pictures(model.transform.read(one.path)[None], card=card)[0].numpy()  # [H W 3]
        else:
            pixels = model.transform.decoded(one.path, side=_SIDE).permute(1, 2, 0).numpy()  # [H W C]
        axis.imshow(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels, cmap="gray")
        axis.set_title(f"{one.name} {100 * one.probability:.0f} %\n{printable(one.path.name)[:28]}", fontsize=8)
    return figure
