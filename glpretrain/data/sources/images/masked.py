"""Images with masks as a source: a user's folders and published data sets.

The files are found when a source is constructed, so that a missing mask fails at once. How they lie in folders and what masks mean is in
`layouts`; left out are videos (`videos`).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from glpretrain.core.listing import say_once
from glpretrain.data.sources.base import Item, Source, UnreadableItemError, check_choice, checked_index
from glpretrain.data.sources.images.arrays import ValueRange, levels_of, ranges_of
from glpretrain.data.sources.images.decoding import (
    IMAGE_RULES,
    LEAST_SAVED,
    decode,
    decode_mask,
    existing_folder,
    images_below,
    void_of,
)
from glpretrain.data.sources.images.folders import no_image_found
from glpretrain.data.sources.images.layouts import MaskPart, Split, mask_part, mask_splits
from glpretrain.data.sources.images.pairs import mask_places, with_labels
from glpretrain.data.sources.paths import Paths
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

_MASKS = "masks."  # what the names of the arrays of masks begin with
_LISTED_ENDINGS = (".jpg", ".png")  # of an image and of its mask, where a file lists them without


def mask_roles(root: str | Path) -> dict[str, Split | None]:
    """Roles of the parts of a folder of images with masks: "masked_train" and "masked", or "masked" alone where it is not divided."""
    splits = mask_splits(existing_folder(root, "masks"))
    return {"masked_train" if split == "train" else "masked": split for split in splits} or {"masked": None}


class MaskedFolder(Source):
    """Images with masks: `images/` beside `masks/`, or `JPEGImages/` beside `Annotations/` (as in DAVIS), in `train/` and `val/` or not;
    or the folder of a published data set as its archive unpacks: VOC2012 of Pascal VOC, ADEChallengeData2016 of ADE20K, or COCO-Stuff
    (`images/train2017/` beside `annotations/train2017/` or `stuffthingmaps/train2017/`). An image and its mask have the same relative
    path, except for the ending.

    A mask is a palette or grey PNG. The value 0 is background and k is the k-th object. Where masks hold classes instead of objects (as
    in CamVid), each class counts as one object of the image; Pascal VOC has masks of both. What the values mean is known of a published
    data set. A user's folder says so by `classes.csv` in it, or beside the parts: lines of `index,name`, one of which may be `unlabelled`.

    Args:
        root: path of the folder that holds both folders, or its parts.
        channels: number of channels of every item.
        split: which part of a divided folder is read; the validation part when left out.
        ignore: mask value that is neither background nor object. When left out, it is what the folder says; where it says nothing, 255 in
            masks that hold other labels too, while in a mask of 0 and 255 it is the object. A value that no mask holds, such as -1,
            switches this off.
        offset: number that is added to every other mask value; 1 where the masks count classes from 0 and there is no background. When
            left out, it is what the folder says, and 0 where it says nothing.
        mask_classes: names of the values 0, 1, 2 ... where masks hold classes (of 1, 2 ... in ADE20K); when left out, those that the
            folder gives, and none where masks hold objects.
        value_range: as for `ImageFolder`.

    Raises:
        ValueError: the folders are missing, there is no image, or an image has no mask.
    """

    has_masks = True

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        split: Split | None = None,
        ignore: int | None = None,
        offset: int | None = None,
        mask_classes: Sequence[str] | None = None,
        value_range: ValueRange | None = None,
    ) -> None:
        if split is not None:
            check_choice(split, ("train", "val"), what="MaskedFolder: split")
        folder = existing_folder(root, "MaskedFolder")
        part = mask_part(folder, split, names_classes=mask_classes is None)
        self.root, self.name, self.channels = part.root, part.name, channels
        self._levels = levels_of(value_range, channels=channels, owner="MaskedFolder")
        self.value_range = ranges_of(self._levels)
        self.ignore = part.meaning.ignore if ignore is None else ignore
        self.offset = part.meaning.offset if offset is None else offset
        self.mask_classes = tuple(part.meaning.classes if mask_classes is None else mask_classes)
        self._first = part.meaning.first
        divided = split is None and mask_splits(folder) == ["train", "val"]
        same = {"channels": channels, "ignore": ignore, "offset": offset, "mask_classes": mask_classes, "value_range": value_range}
        self._parts = partial(MaskedFolder, root, **same) if divided else None
        self.paths, self._masks, *objects = _walked(part) if part.listed is None else _listed(part, part.listed)
        self._objects = objects[0] if objects else None  # masks of objects, where `_masks` holds classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path, mask_path = self.paths[checked_index(index, len(self))], self._masks[index]
        image = decode(path, channels=self.channels, levels=self._levels)
        values = decode_mask(mask_path, size=image.shape[1:])
        semantic, instances = self._semantic(values, mask_path), self._instances(values)
        if self._objects is not None:
            instances = self._instances(decode_mask(self._objects[index], size=image.shape[1:]))
        return Item(values=image, label=-1, instances=instances, regions=None, semantic=semantic)

    def train_test_split(self) -> tuple[Source, Source] | None:
        """The training and the validation part of a divided folder, unless one of them was named.

        Raises:
            ValueError: their masks hold other classes, or see the class.
        """
        if self._parts is None:
            return None
        train, test = self._parts(split="train"), self._parts(split="val")
        if train.mask_classes != test.mask_classes:
            classes = f"classes {', '.join(train.mask_classes)}, {test.name} has {', '.join(test.mask_classes)}"
            raise ValueError(f"MaskedFolder: {train.name} has {classes}; accepted: the same, such as one classes.csv beside them")
        return train, test

    def _listing(self) -> tuple[object, ...]:
        objects = () if self._objects is None else (self._objects.digest(),)
        return *super()._listing(), self._masks.digest(), *objects

    def _instances(self, values: Tensor) -> Tensor:
        instances = values + self.offset
        if (ignore := self._ignored(values)) is not None:
            instances[values == ignore] = -1
        return instances

    def _ignored(self, values: Tensor) -> int | None:
        return self.ignore if self.ignore is not None else void_of(values, first=0 if self.offset or self.mask_classes else 1)

    def _semantic(self, values: Tensor, path: Path) -> Tensor | None:
        if not self.mask_classes:
            return None
        semantic = values - self._first
        if (ignore := self._ignored(values)) is not None:
            semantic[values == ignore] = -1
        count = len(self.mask_classes)
        if bool((wrong := (semantic >= count) | ((semantic < 0) & (values != ignore))).any()):
            accepted = f"{self._first} to {self._first + count - 1} (mask_classes), and ignore={self.ignore}"
            raise UnreadableItemError(f"{path}: value {int(values[wrong].max())}; accepted: {accepted}")
        return semantic


def _walked(part: MaskPart) -> list[Paths]:
    """All images of a part, and the mask of each."""
    walk = partial(_masked_below, images=part.images, masks=part.masks)
    rules = f"masked {part.images} {part.masks} {IMAGE_RULES}"
    found = listing_of(part.root, walk=walk, rules=rules, least=LEAST_SAVED)
    if found.note:
        say_once(f"{part.root}: {found.note}")
    return [found.paths, Paths.part_of(part.root, found.arrays, _MASKS, file=found.paths.file)]


def _listed(part: MaskPart, path: Path) -> list[Paths]:
    """The images that a file names, and the masks of each: of classes, and of objects where there are any."""
    names = path.read_text().split()
    if not names:
        raise ValueError(f"MaskedFolder: {path} names no image; accepted: one name without its ending in every line")
    image, mask = _LISTED_ENDINGS
    folders = {part.images: image, part.masks: mask} | ({part.objects: mask} if part.objects else {})
    found = [Paths.of(part.root, [f"{folder}/{name}{ending}" for name in names]) for folder, ending in folders.items()]
    for paths in found:
        if missing := [file for file in paths if not file.is_file()]:
            raise ValueError(f"MaskedFolder: {path} names {len(names)} images; {len(missing)} files are missing, the first {missing[0]}")
    return found


def _masked_below(root: Path, *, images: str, masks: str) -> Walked:
    """The images in one folder of `root` in natural order, and the mask of each in another one.

    Raises:
        ValueError: see `MaskedFolder`.
    """
    walked, of_masks = images_below(root / images), images_below(root / masks)
    files, candidates = walked.listing.paths.naturally(), with_labels(of_masks.listing.paths)
    if not files:
        raise no_image_found("MaskedFolder", root / images)
    places = mask_places(files, candidates, owner="MaskedFolder")
    if len(missing := np.flatnonzero(places < 0)):
        folder, name = files.parts(int(missing[0]))
        expected = Path(root, masks, folder, name).with_suffix(".png")
        raise ValueError(f"MaskedFolder: {len(missing)} of {len(files)} images have no mask, the first of them {expected}")
    notes = [f"{folder}: {one.listing.note}" for folder, one in ((images, walked), (masks, of_masks)) if one.listing.note]
    listing = Listing(files.below(root, images), "; ".join(notes), candidates.at(places).below(root, masks).arrays(_MASKS))
    states = [*walked.states_below(images), *of_masks.states_below(masks)]
    return Walked(listing, states, [*walked.real, *of_masks.real], walked.is_certain and of_masks.is_certain)
