"""Image files on disk as sources: folders, list files, and folders of images with masks.

Files are found when a source is made, so an empty folder fails at once, and decoded one at a time when asked for. Nothing
is resized here.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps
from torch import Tensor

from glpretrain.data.sources.base import Item, Source, UnreadableItemError, checked_index

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".npy")
# A damaged file shows as any of these: PIL's plugins raise SyntaxError and ValueError for broken headers, EOFError and OSError
# for truncated data, and refuse what would decode to an absurd size.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_FRAME = "_frame_"
_TEST_FOLDERS = ("val", "test")
_MASK_FOLDERS = (("images", "masks"), ("JPEGImages", "Annotations"))


def decode(path: Path, *, channels: int) -> Tensor:
    """One image file as UInt8[C H W].

    PIL decodes 1 or 3 channels, with the orientation of the EXIF tag applied and 16 bits scaled to 8 over their whole range.
    Any other number of channels is read from `.npy` (H W C) or from TIFF through tifffile.

    Raises:
        UnreadableItemError: the file is damaged, is no image, or has another number of channels.
    """
    try:
        if path.suffix.lower() == ".npy":
            return _from_array(np.load(path, allow_pickle=False), path, channels=channels)
        if channels not in (1, 3):
            return _from_array(_read_tiff(path), path, channels=channels)
        with Image.open(path) as opened:
            return from_pil(opened, channels=channels)
    except UnreadableItemError:
        raise
    except DAMAGE as error:
        raise UnreadableItemError(f"{path}: {error}") from error


def from_pil(opened: Image.Image, *, channels: int) -> Tensor:
    """UInt8[C H W] of an opened PIL image with 1 or 3 channels."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image, dtype=np.float32)
        # 16-bit files use their whole range; a float file is taken as [0, 1] unless it exceeds it.
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(wide.max()))
        image = Image.fromarray(np.clip(wide * (255.0 / top), 0, 255).astype(np.uint8))
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()  # [C H W]


def decode_mask(path: Path, *, size: Sequence[int]) -> Tensor:
    """Values of a palette or grey file as Int[H W].

    Raises:
        UnreadableItemError: the file is damaged, or has not the height and width of its image.
    """
    try:
        with Image.open(path) as opened:
            values = torch.from_numpy(np.array(opened)).long()
    except DAMAGE as error:
        raise UnreadableItemError(f"{path}: {error}") from error
    if values.shape != tuple(size):
        raise UnreadableItemError(f"{path}: shape {tuple(values.shape)}, the image has {tuple(size)}")
    return values


def _read_tiff(path: Path) -> np.ndarray:
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError("only .tif, .tiff and .npy hold other than 1 or 3 channels")
    return tifffile.imread(path)


def _from_array(array: np.ndarray, path: Path, *, channels: int) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] != channels:
        raise UnreadableItemError(f"{path}: shape {array.shape}, expected (height, width, {channels})")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UnreadableItemError(f"{path}: type {array.dtype}, expected uint8 or uint16")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))  # [C H W]


def find_images(root: Path) -> list[Path]:
    """Image files below `root` in the order of their names; hidden files and folders are passed over."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    return sorted(found)


def existing_folder(root: str | Path, what: str) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} is not a folder")
    return folder


def _nothing_found(what: str, folder: Path) -> ValueError:
    return ValueError(f"{what}: no image in {folder}; accepted endings: {' '.join(ENDINGS)}")


class ImageFolder(Source):
    """All images of a folder, flat or nested.

    The first-level subfolders are the classes where there are at least two and every image is inside one. A folder divided into
    `train/` and `val/` (or `test/`) is looked into one level deeper.

    Args:
        root: the folder.
        channels: of every item; files are converted between grey and colour.
        split: part of a divided folder. Left out: `train` of a divided folder, everything of any other.

    Raises:
        ValueError: the folder is missing, has no image, is not divided though `split` is given, or holds masks.
    """

    def __init__(self, root: str | Path, *, channels: int = 3, split: Literal["all", "train", "val"] | None = None) -> None:
        self.root = existing_folder(root, "ImageFolder")
        self.channels = channels
        for images, masks in _MASK_FOLDERS:
            if (self.root / images).is_dir() and (self.root / masks).is_dir():
                raise ValueError(f"ImageFolder: {self.root} holds masks ({masks}/); use MaskedFolder, or give {self.root / images}")
        self._divided = self._division_folders()
        if split is not None and self._divided is None:
            raise ValueError(f"ImageFolder: split={split!r}, but {self.root} has no train/ beside val/ or test/; leave split out")
        folders = [self.root]
        if self._divided is not None:
            folders = {"all": list(self._divided), "train": [self._divided[0]], "val": [self._divided[1]]}[split or "train"]
        self._files = [(path, path.relative_to(folder).parts) for folder in folders for path in find_images(folder)]
        if not self._files:
            raise _nothing_found("ImageFolder", self.root if len(folders) > 1 else folders[0])
        inside = all(len(parts) > 1 for _, parts in self._files)
        names = sorted({parts[0] for _, parts in self._files}) if inside else []
        self._classes = names if len(names) > 1 else []

    def _division_folders(self) -> tuple[Path, Path] | None:
        held_out = [self.root / name for name in _TEST_FOLDERS if (self.root / name).is_dir()]
        return (self.root / "train", held_out[0]) if held_out and (self.root / "train").is_dir() else None

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    @property
    def paths(self) -> Sequence[Path]:
        """Where each item is."""
        return [path for path, _ in self._files]

    @property
    def groups(self) -> Sequence[str]:
        """Frames of a video: images of one folder below a class folder, or of one folder with equal names before `_frame_`."""
        names = [_group_of(parts, depth=1 if self._classes else 0) for _, parts in self._files]
        return names if len(set(names)) < len(names) else ()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path, parts = self._files[checked_index(index, len(self))]
        label = self._classes.index(parts[0]) if self._classes else -1
        return Item(image=decode(path, channels=self.channels), label=label, instances=None, regions=None)

    def train_test_split(self) -> tuple[Source, Source] | None:
        if self._divided is None or not self._classes:
            return None
        train = ImageFolder(self.root, channels=self.channels, split="train")
        test = ImageFolder(self.root, channels=self.channels, split="val")
        if train.classes != test.classes:
            raise ValueError(f"ImageFolder: {self.root} has classes {train.classes} to train and {test.classes} to test; they must agree")
        return train, test


def _group_of(parts: tuple[str, ...], *, depth: int) -> str:
    """The name of the video that the image at this relative path is from, or its own."""
    *folders, name = parts
    before, frame, _ = name.rpartition(_FRAME)
    return "/".join(folders if len(folders) > depth and not frame else [*folders, before if frame else name])


class ImageList(Source):
    """The images that a text file names, one a line: a path relative to the file, and after white space an optional class name.

    A path with white space in it needs a tab before the class name, or no class name in the whole file.

    Args:
        path: the text file; empty lines and lines that begin with `#` are passed over.
        channels: of every item.

    Raises:
        ValueError: the file is missing or names no image, or only some lines have a class name.
    """

    def __init__(self, path: str | Path, *, channels: int = 3) -> None:
        self.path = Path(path).expanduser()
        self.channels = channels
        if not self.path.is_file():
            raise ValueError(f"ImageList: {self.path} is not a file")
        lines = [line.strip() for line in self.path.read_text(encoding="utf-8").splitlines()]
        entries = [_split_line(line) for line in lines if line and not line.startswith("#")]
        if not entries:
            raise ValueError(f"ImageList: {self.path} names no image; expected a path [and a class name] per line")
        labelled = [label is not None for _, label in entries]
        if any(labelled) != all(labelled):
            raise ValueError(f"ImageList: {self.path} gives a class name on {sum(labelled)} of {len(entries)} lines; give all or none")
        self._files = [self.path.parent / name for name, _ in entries]
        self._classes = sorted({label for _, label in entries if label is not None})
        self._labels = [-1 if label is None else self._classes.index(label) for _, label in entries]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path = self._files[checked_index(index, len(self))]
        return Item(image=decode(path, channels=self.channels), label=self._labels[index], instances=None, regions=None)


def _split_line(line: str) -> tuple[str, str | None]:
    name, tab, label = line.partition("\t")
    if tab:
        return name, label.strip() or None
    if line.lower().endswith(ENDINGS):
        return line, None
    name, space, label = line.rpartition(" ")
    return (name.strip(), label) if space else (line, None)


class MaskedFolder(Source):
    """Images with masks: `images/` beside `masks/`, or `JPEGImages/` beside `Annotations/` (as DAVIS), with equal paths but for the ending.

    A mask is a palette or grey PNG: 0 ground, k the k-th object. Where masks hold classes instead (as CamVid), each class of an
    image counts as one object.

    Args:
        root: the folder that holds the two.
        channels: of every item.
        ignore: mask value that is neither ground nor object.
        offset: added to every other mask value; 1 where the masks count classes from 0 and there is no ground.
        mask_classes: what the values 0, 1, 2 ... mean, where masks hold classes; None where they hold objects.

    Raises:
        ValueError: neither pair of folders is there, there is no image, or an image has no mask.
    """

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
        self.channels = channels
        self.ignore = ignore
        self.offset = offset
        self._mask_classes = () if mask_classes is None else tuple(mask_classes)
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

    @property
    def name(self) -> str:
        folder = self.root.resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.name in ("train", *_TEST_FOLDERS) else folder.name

    @property
    def classes(self) -> Sequence[str]:
        return []

    @property
    def has_masks(self) -> bool:
        return True

    @property
    def mask_classes(self) -> Sequence[str]:
        return self._mask_classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Item:
        path, mask_path = self._files[checked_index(index, len(self))]
        image = decode(path, channels=self.channels)
        values = decode_mask(mask_path, size=image.shape[1:])
        instances = values + self.offset
        if self.ignore is not None:
            instances[values == self.ignore] = -1
        return Item(image=image, label=-1, instances=instances, regions=None, semantic=self._semantic(values, mask_path))

    def _semantic(self, values: Tensor, path: Path) -> Tensor | None:
        if not self._mask_classes:
            return None
        semantic = values.clone()
        if self.ignore is not None:
            semantic[values == self.ignore] = -1
        if (top := int(semantic.max())) >= len(self._mask_classes):
            raise UnreadableItemError(
                f"{path}: value {top}; accepted: 0 to {len(self._mask_classes) - 1} (mask_classes), and ignore={self.ignore}"
            )
        return semantic


def mask_folders(root: str | Path) -> dict[str, Path]:
    """Which folders of images with masks `root` holds: "masked_train" and "masked" where it is divided, else "masked" alone."""
    folder = existing_folder(root, "masks")
    tests = [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]
    return {"masked_train": folder / "train", "masked": tests[0]} if tests and (folder / "train").is_dir() else {"masked": folder}
