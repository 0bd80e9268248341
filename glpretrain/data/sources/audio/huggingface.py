"""Sounds of Hugging Face datasets. How a column is read is told in `data.sources.huggingface`."""

from pathlib import Path, PurePosixPath

from glpretrain.data.sources.audio.decoding import ENDINGS, WAV, AudioSource, audio_item, check_seconds, damage_named, decode, decode_bytes
from glpretrain.data.sources.base import Item
from glpretrain.data.sources.huggingface import Column
from glpretrain.data.sources.kinds import FileKind

_KIND = FileKind("HuggingFaceSounds", "sound", ENDINGS)


class HuggingFaceSounds(AudioSource):
    """A column of sounds of a Hugging Face dataset. Needs the extra `huggingface`; files are decoded here, and not by the package.

    Args:
        path: a folder that `save_to_disk` wrote, or anything that `datasets.load_dataset` accepts.
        split: name of the split.
        audio: name of the column of sounds.
        label: name of the column of classes; None where the dataset has none.
        seconds: how much of a sound is read, from its beginning; when left out, all of it.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: there is no such split or column, or `seconds` is not above 0.
    """

    def __init__(
        self, path: str, *, split: str = "train", audio: str = "audio", label: str | None = None, seconds: float | None = None
    ) -> None:
        check_seconds(seconds, owner="HuggingFaceSounds")
        self._column = Column(path, _KIND, feature="Audio", split=split, column=audio, label=label)
        self.name, self.classes, self.seconds = self._column.name, self._column.classes, seconds

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> Item:
        with damage_named(self._column.named(index)):
            file, label = self._column.row(index)
            if file.content is None:
                samples = decode(Path(str(file.path)), seconds=self.seconds)
            else:  # a row without a name holds what the package writes itself
                ending = PurePosixPath(file.path or "").suffix or WAV[0]
                samples = decode_bytes(file.content, ending=ending, seconds=self.seconds)
        return audio_item(samples, label=label)
