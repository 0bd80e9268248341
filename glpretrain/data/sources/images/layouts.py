"""How images and their masks lie in folders: published data sets by a table, and a user's own folders by their names.

The table says where the parts of Pascal VOC, ADE20K and COCO-Stuff are and what the values of their masks mean, as their own archives
unpack. A user's own folder may say by a file `classes.csv` what its values mean. Left out: reading the files (`masked`).
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from glpretrain.core.listing import say_once, subfolders

Split = Literal["train", "val"]
_CLASSES_FILE = "classes.csv"
_TEST_FOLDERS = ("val", "valid", "validation", "test", "testing")
_TRAIN_FOLDERS = ("train", "training")
_MASK_FOLDERS = (("images", "masks"), ("JPEGImages", "Annotations"))
_VOID_NAMES = ("unlabelled", "unlabeled", "void", "ignore", "ignored")
_BACKGROUND = "background"
_OBJECT_INFO = "objectInfo150.txt"
_VOC_NAMES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, "
    "pottedplant, sheep, sofa, train, tvmonitor"
)
# labels.txt of github.com/nightrome/cocostuff without its 0, unlabelled: the value in a file is the number there less one. Eleven of the
# names, such as street sign and hat, belong to no pixel.
_COCO_STUFF_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye "
    "glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, "
    "carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, "
    "floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, "
    "ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, "
    "plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, "
    "sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, "
    "vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, "
    "window-blind, window-other, wood"
)


class Meaning(NamedTuple):
    """What the values of masks mean; the defaults are those of a folder that says nothing."""

    classes: Sequence[str] = ()  # names of the values from `first` on; empty where nothing names them
    first: int = 0  # value of the first class
    ignore: int | None = None  # value that is neither background nor object; None where nothing says so
    offset: int = 0  # what is added to a value for the number of an object: 1 for the first one, while 0 is background


class MaskPart(NamedTuple):
    """Where the images and masks of one part are, and what the masks mean."""

    name: str  # for tables
    root: Path
    images: str  # folder below `root`
    masks: str  # folder below `root` with a file for each image
    meaning: Meaning
    objects: str | None = None  # a second folder of masks, of objects where `masks` holds classes
    listed: Path | None = None  # file with the names of the images without endings; None for all that are there


class Layout(NamedTuple):
    """A published data set. In its paths, `{}` stands for its own name of a part."""

    name: str
    parts: Mapping[Split, str]  # its own names of the parts
    images: str
    masks: tuple[str, ...]  # accepted folders of the masks of classes; the first that is there is taken
    meaning: Meaning  # without the names of the classes
    classes: Callable[[Path], Sequence[str]]  # function of the root to the names of the classes
    objects: str | None = None  # folder of the masks of objects, which may be missing
    listed: str | None = None  # file with the names of a part's images

    def __str__(self) -> str:
        paths = (self.images, " or ".join(self.masks), *([self.listed] if self.listed else []))
        return f"{self.name}: {', '.join(paths)}".replace("{}", f"{{{','.join(self.parts.values())}}}")

    def is_at(self, root: Path) -> bool:
        """Whether images and masks of one of the parts are in a folder."""
        return any(self._there(root, [self.images], split) and self._there(root, self.masks, split) for split in self.parts)

    def splits(self, root: Path) -> list[Split]:
        """The parts that are in a folder."""
        return [split for split in self.parts if self._there(root, [self.listed or self.images], split)]

    def part(self, root: Path, split: Split, *, names_classes: bool) -> MaskPart:
        """One part, with the names of its classes if they are wanted.

        Raises:
            ValueError: something of it is missing.
        """
        wanted = ((self.images,), self.masks, *([(self.listed,)] if self.listed else []))
        found = [self._there(root, paths, split) for paths in wanted]
        if missing := [" or ".join(paths) for paths, there in zip(wanted, found, strict=True) if there is None]:
            lacks = " and no ".join(missing).replace("{}", self.parts[split])
            raise ValueError(f"MaskedFolder: {root} has no {lacks}; accepted: {self}")
        images, masks, *lists = [there for there in found if there is not None]
        meaning = self.meaning._replace(classes=self.classes(root)) if names_classes else self.meaning
        objects = None if self.objects is None else self._there(root, [self.objects], split)
        listed = root / lists[0] if lists else None
        return MaskPart(f"{root.resolve().name}/{split}", root, images, masks, meaning, objects, listed)

    def _there(self, root: Path, paths: Sequence[str], split: Split) -> str | None:
        """The first of the paths that is in a folder."""
        named = (path.replace("{}", self.parts[split]) for path in paths)
        return next((path for path in named if (root / path).exists()), None)


def _ade20k_classes(root: Path) -> Sequence[str]:
    """The first word of each line of the file that comes with the images."""
    path = root / _OBJECT_INFO
    if not path.is_file():
        raise ValueError(f"MaskedFolder: {root} has no {_OBJECT_INFO}, which names its classes; copy it there or give mask_classes")
    rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    numbers = [row[0].strip() for row in rows[1:]]
    if numbers != [str(number + 1) for number in range(len(numbers))]:
        raise ValueError(f"MaskedFolder: {path}: numbers {numbers[:3]} ...; accepted: a heading, then a line for each of 1, 2, 3 ...")
    names = [row[-1].strip() for row in rows[1:]]
    short = [name.partition(",")[0].partition(";")[0] for name in names]
    return short if len(set(short)) == len(short) else names


LAYOUTS = (
    Layout(
        name="Pascal VOC",
        parts={"train": "train", "val": "val"},
        images="JPEGImages",
        masks=("SegmentationClass",),
        meaning=Meaning(ignore=255),
        classes=lambda root: _VOC_NAMES.split(", "),
        objects="SegmentationObject",
        listed="ImageSets/Segmentation/{}.txt",
    ),
    Layout(
        name="ADE20K",
        parts={"train": "training", "val": "validation"},
        images="images/{}",
        masks=("annotations/{}",),
        meaning=Meaning(first=1, ignore=0),
        classes=_ade20k_classes,
    ),
    Layout(
        name="COCO-Stuff",
        parts={"train": "train2017", "val": "val2017"},
        images="images/{}",
        masks=("annotations/{}", "stuffthingmaps/{}"),
        meaning=Meaning(ignore=255, offset=1),
        classes=lambda root: _COCO_STUFF_NAMES.split(", "),
    ),
)


def mask_splits(root: Path) -> list[Split]:
    """The parts of a folder of images with masks; empty where it is not divided."""
    if (layout := _layout_at(root)) is not None:
        return layout.splits(root)
    return ["train", "val"] if split_folders(by_lower_name(root)) is not None else []


def names_its_classes(root: Path) -> bool:
    """Whether a folder says itself what the values of its masks mean."""
    return _layout_at(root) is not None or _classes_file(root) is not None


def mask_part(root: Path, split: Split | None, *, names_classes: bool) -> MaskPart:
    """Where images and masks are.

    Args:
        root: an existing folder.
        split: the part that is read; None takes the validation part of a divided folder.
        names_classes: whether what the folder says about classes is wanted.

    Raises:
        ValueError: they are missing, or there is no such part.
    """
    if (layout := _layout_at(root)) is not None:
        return layout.part(root, split or "val", names_classes=names_classes)
    folders = by_lower_name(root)
    parts, folder = split_folders(folders), root
    if parts is None and split is not None:
        raise ValueError(f"MaskedFolder: split={split!r}, but {root} has no train/ beside val/ or test/; leave split out")
    if parts is not None and (split is not None or image_and_mask_folders(folders) is None):
        folder = parts[split != "train"]
    pair = image_and_mask_folders(by_lower_name(folder))
    if pair is None:
        accepted = " or ".join(f"{images}/ beside {masks}/" for images, masks in _MASK_FOLDERS)
        published = "; ".join(map(str, LAYOUTS))
        raise ValueError(f"MaskedFolder: {folder} does not hold {accepted}, in train/ and val/ or not, nor that of {published}")
    meaning = _own_meaning(folder) if names_classes else Meaning()
    real = folder.resolve()
    name = f"{real.parent.name}/{real.name}" if real.name in ("train", *_TEST_FOLDERS) else real.name
    return MaskPart(name, folder, pair[0].name, pair[1].name, meaning)


def masks_beside_images(root: Path) -> tuple[Path, Path] | None:
    """The folder of images and the one of masks, where a folder holds both."""
    if (layout := _layout_at(root)) is not None:
        return root / layout.images.partition("/")[0], root / layout.masks[0].partition("/")[0]
    return image_and_mask_folders(by_lower_name(root))


def _layout_at(root: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.is_at(root)), None)


def _classes_file(folder: Path) -> Path | None:
    """`classes.csv` in a folder, or beside it where it is one of several parts."""
    is_part = folder.resolve().name.lower() in (*_TRAIN_FOLDERS, *_TEST_FOLDERS)
    places = [folder, folder.resolve().parent] if is_part else [folder]
    return next((place / _CLASSES_FILE for place in places if (place / _CLASSES_FILE).is_file()), None)


def _own_meaning(folder: Path) -> Meaning:
    """What the file says that names the classes of a folder.

    Raises:
        ValueError: the numbers of the classes have gaps, or several values are to be ignored.
    """
    if (path := _classes_file(folder)) is None:
        return Meaning()
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not all(row.get("name") and (row.get("index") or "").isdecimal() for row in rows):
        say_once(f"{path}: not read, since not every line has an index and a name")
        return Meaning()
    names = {int(row["index"]): row["name"] for row in rows}
    void = [value for value, name in names.items() if name.lower() in _VOID_NAMES]
    values = sorted(names.keys() - set(void))
    first = values[0] if values else 0
    if len(void) > 1 or not values or values != list(range(first, first + len(values))):
        raise ValueError(
            f"MaskedFolder: {path}: classes {values} and ignored values {void}; accepted: numbers without gaps, and at most one of the "
            f"names {', '.join(_VOID_NAMES)}; or give mask_classes"
        )
    classes = [names[value] for value in values]
    return Meaning(classes, first, void[0] if void else None, 0 if classes[0].lower() == _BACKGROUND else 1 - first)


def by_lower_name(root: Path) -> dict[str, Path]:
    """The folders in a folder by their names in small letters."""
    return {folder.name.lower(): folder for folder in subfolders(root)}


def split_folders(found: Mapping[str, Path]) -> tuple[Path, Path] | None:
    """`train/` and, beside it, `val/` or `test/`, under one of the names that they have; None where they are not there."""
    train = next((found[name] for name in _TRAIN_FOLDERS if name in found), None)
    held_out = next((found[name] for name in _TEST_FOLDERS if name in found), None)
    return None if train is None or held_out is None else (train, held_out)


def image_and_mask_folders(found: Mapping[str, Path]) -> tuple[Path, Path] | None:
    """The folder of images and the folder of masks; None where they are not there."""
    pairs = [(found.get(images.lower()), found.get(masks.lower())) for images, masks in _MASK_FOLDERS]
    return next(((images, masks) for images, masks in pairs if images is not None and masks is not None), None)
