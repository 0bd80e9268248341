"""Image files on disk as sources: folders, list files, and folders of images with masks.

The files are found when a source is constructed, so that an empty folder fails at once. They are decoded one at a time on request.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from glpretrain.data.sources.base import Item, Source, UnreadableItemError, checked_index, label_items
from glpretrain.data.sources.images.decoding import ENDINGS, decode, decode_mask, existing_folder, find_images

_FRAME = "_frame_"
_TEST_FOLDERS = ("val", "test")
_MASK_FOLDERS = (("images", "masks"), ("JPEGImages", "Annotations"))


def mask_folders(root: str | Path) -> dict[str, Path]:
    """The folders of images with masks in `root`: "masked_train" and "masked" where it holds `train/` and `val/` (or `test/`), else
    "masked" alone."""
    folder = existing_folder(root, "masks")
    split = _split_folders(folder)
    return {"masked": folder} if split is None else {"masked_train": split[0], "masked": split[1]}


def _split_folders(root: Path) -> tuple[Path, Path] | None:
    """`train/` and, beside it, `val/` or `test/`; None where they are not there."""
    held_out = [root / name for name in _TEST_FOLDERS if (root / name).is_dir()]
    return (root / "train", held_out[0]) if held_out and (root / "train").is_dir() else None


def _nothing_found(what: str, folder: Path) -> ValueError:
    return ValueError(f"{what}: no image in {folder}; accepted endings: {' '.join(ENDINGS)}")


class ImageFolder(Source):
    """All images of a folder, flat or nested.

    The first-level subfolders are the classes, if there are at least two of them and every image is inside one. In a folder with
    `train/` and `val/` (or `test/`) the classes are the subfolders of these.

    Args:
        root: path of the folder.
        channels: number of channels of every item; files are converted between grey and colour.
        split: which split of a folder with `train/` and `val/` is read. When left out, `train` of such a folder, and all images of any
            other.

    Raises:
        ValueError: the folder is missing, has no image, has no splits although `split` is given, or holds masks.
    """

    def __init__(self, root: str | Path, *, channels: int = 3, split: Literal["all", "train", "val"] | None = None) -> None:
        self.root = existing_folder(root, "ImageFolder")
        self.channels = channels
        for images, masks in _MASK_FOLDERS:
            if (self.root / images).is_dir() and (self.root / masks).is_dir():
                raise ValueError(f"ImageFolder: {self.root} holds masks ({masks}/); use MaskedFolder, or give {self.root / images}")
        self._split_folders = _split_folders(self.root)
        if split is not None and self._split_folders is None:
            raise ValueError(f"ImageFolder: split={split!r}, but {self.root} has no train/ beside val/ or test/; leave split out")
        folders = [self.root]
        if self._split_folders is not None:
            train, val = self._split_folders
            folders = {"all": [train, val], "train": [train], "val": [val]}[split or "train"]
        self._files = [(path, path.relative_to(folder).parts) for folder in folders for path in find_images(folder)]
        if not self._files:
            raise _nothing_found("ImageFolder", self.root if len(folders) > 1 else folders[0])
        inside = all(len(parts) > 1 for _, parts in self._files)
        names = sorted({parts[0] for _, parts in self._files}) if inside else []
        self.name, self.classes = self.root.resolve().name, names if len(names) > 1 else []

    @property
    def paths(self) -> Sequence[Path]:
        """The file of each item."""
        return [path for path, _ in self._files]

    @property
    def groups(self) -> Sequence[str]:
        """Images of one group are frames of one video: they lie in one folder below the class folder, or in one folder with the same
        name before `_frame_`."""
        names = [_group_of(parts, depth=1 if self.classes else 0) for _, parts in self._files]
        return names if len(set(names)) < len(names) else ()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path, parts = self._files[checked_index(index, len(self))]
        label = self.classes.index(parts[0]) if self.classes else -1
        return Item(values=decode(path, channels=self.channels), label=label, instances=None, regions=None)

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._split_folders is None or not self.classes:
            return None
        train = ImageFolder(self.root, channels=self.channels, split="train")
        test = ImageFolder(self.root, channels=self.channels, split="val")
        both = [parts for part in (train, test) for _, parts in part._files]
        if all(len(parts) > 1 for parts in both):  # a part may lack classes, and may show one only
            train.classes = test.classes = sorted({parts[0] for parts in both})
        return train, test


def _group_of(parts: tuple[str, ...], *, depth: int) -> str:
    """Name of the video that the image at this relative path belongs to; the image's own name where it belongs to none."""
    *folders, name = parts
    before, frame, _ = name.rpartition(_FRAME)
    return "/".join(folders if len(folders) > depth and not frame else [*folders, before if frame else name])


class ImageList(Source):
    """The images that are listed in a text file, one per line: a path relative to the file, then white space and an optional class name.

    Where a path contains white space, a tab must precede the class name, or no line may have a class name.

    Args:
        path: path of the text file; empty lines and lines that begin with `#` are ignored.
        channels: number of channels of every item.

    Raises:
        ValueError: the file is missing or names no image, or only some lines have a class name.
    """

    def __init__(self, path: str | Path, *, channels: int = 3) -> None:
        self.path = Path(path).expanduser()
        self.name, self.channels = self.path.stem, channels
        if not self.path.is_file():
            raise ValueError(f"ImageList: {self.path} is not a file")
        lines = [line.strip() for line in self.path.read_text(encoding="utf-8").splitlines()]
        entries = [_split_line(line) for line in lines if line and not line.startswith("#")]
        if not entries:
            raise ValueError(f"ImageList: {self.path} lists no image; expected a path [and a class name] per line")
        self._files = [self.path.parent / name for name, _ in entries]
        self.classes, self._labels = label_items([label for _, label in entries], owner=f"ImageList: {self.path}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path = self._files[checked_index(index, len(self))]
        return Item(values=decode(path, channels=self.channels), label=self._labels[index], instances=None, regions=None)


def _split_line(line: str) -> tuple[str, str | None]:
    name, tab, label = line.partition("\t")
    if tab:
        return name, label.strip() or None
    if line.lower().endswith(ENDINGS):
        return line, None
    name, space, label = line.rpartition(" ")
    return (name.strip(), label) if space else (line, None)


class MaskedFolder(Source):
    """Images with masks: `images/` beside `masks/`, or `JPEGImages/` beside `Annotations/` (as in DAVIS). An image and its mask have the
    same relative path, except for the ending.

    A mask is a palette or grey PNG. The value 0 is background and k is the k-th object. Where masks hold classes instead of objects (as
    in CamVid), each class counts as one object of the image.

    Args:
        root: path of the folder that holds both folders.
        channels: number of channels of every item.
        ignore: mask value that is neither background nor object.
        offset: number that is added to every other mask value; 1 where the masks count classes from 0 and there is no background.
        mask_classes: names of the values 0, 1, 2 ... where masks hold classes; None where they hold objects.

    Raises:
        ValueError: neither pair of folders exists, there is no image, or an image has no mask.
    """

    has_masks = True

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        ignore: int | None = None,
        offset: int = 0,
        mask_classes: Sequence[str] | None = None,
    ) -> None:
        self.root = existing_folder(root, "MaskedFolder")
        self.channels, self.ignore, self.offset = channels, ignore, offset
        folder = self.root.resolve()
        self.name = f"{folder.parent.name}/{folder.name}" if folder.name in ("train", *_TEST_FOLDERS) else folder.name
        self.mask_classes = tuple(mask_classes or ())
        pairs = [(self.root / images, self.root / masks) for images, masks in _MASK_FOLDERS]
        present = [(images, masks) for images, masks in pairs if images.is_dir() and masks.is_dir()]
        if not present:
            accepted = " or ".join(f"{images}/ beside {masks}/" for images, masks in _MASK_FOLDERS)
            raise ValueError(f"MaskedFolder: {self.root} does not hold {accepted}")
        images, masks = present[0]
        files = find_images(images)
        if not files:
            raise _nothing_found("MaskedFolder", images)
        self._files = [(path, masks / path.relative_to(images).with_suffix(".png")) for path in files]
        if missing := [mask for _, mask in self._files if not mask.is_file()]:
            raise ValueError(f"MaskedFolder: {len(missing)} of {len(files)} images have no mask, the first of them {missing[0]}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path, mask_path = self._files[checked_index(index, len(self))]
        image = decode(path, channels=self.channels)
        values = decode_mask(mask_path, size=image.shape[1:])
        instances = values + self.offset
        if self.ignore is not None:
            instances[values == self.ignore] = -1
        return Item(values=image, label=-1, instances=instances, regions=None, semantic=self._semantic(values, mask_path))

    def _semantic(self, values: Tensor, path: Path) -> Tensor | None:
        if not self.mask_classes:
            return None
        semantic = values.clone()
        if self.ignore is not None:
            semantic[values == self.ignore] = -1
        if (top := int(semantic.max())) >= (count := len(self.mask_classes)):
            raise UnreadableItemError(f"{path}: value {top}; accepted: 0 to {count - 1} (mask_classes), and ignore={self.ignore}")
        return semantic
