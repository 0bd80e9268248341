"""Features of a frozen encoder, computed once: kept in memory during an evaluation and, where a folder is given, on disk.

Everything is found by content. A batch of features is named by the digests of its items, the size they were brought to, the layer
and the precision; its folder by the encoder's weights and card. So a changed file, weight or setting can never meet old features,
an interrupted evaluation goes on where it stopped, and evaluators that read the same items share one extraction. Only `cls` and `patches`
are kept: an output that comes from the cache has no registers.
"""

import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder, fingerprint

_LOG = logging.getLogger(__name__)
_MEMORY_BYTES = 1 << 30


def default_folder() -> Path:
    """`glpretrain/features` below the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glpretrain" / "features"


class FeatureCache:
    """The features of one encoder.

    Args:
        encoder: the encoder; its weights must not change while the cache is used.
        folder: folder where features outlive the process; None keeps them in memory only.
        memory_bytes: number of bytes that are kept in memory at most; more is read from the folder, or computed again.
    """

    def __init__(self, encoder: Encoder, *, folder: Path | None = None, memory_bytes: int = _MEMORY_BYTES) -> None:
        self.encoder, self.memory_bytes = encoder, memory_bytes
        self.fingerprint = fingerprint(encoder)
        self.folder = None if folder is None else folder / self.fingerprint[:32]
        self.num_computed = 0  # batches that had to be encoded
        self._memory: dict[str, Tensor] = {}
        self._bytes = 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "card.json").write_text(json.dumps(encoder.card.to_json(), indent=2, allow_nan=False) + "\n")

    def find(self, name: str, *, patches: bool) -> EncoderOutput | None:
        """The features of a batch, on the CPU; None where they were not computed yet.

        Args:
            name: name of the batch.
            patches: whether they are needed; without, the output has Float[B 0 D] for patches.
        """
        cls = self._find(f"{name}.cls")
        if cls is None:
            return None
        found = self._find(f"{name}.patches") if patches else cls.new_empty(len(cls), 0, cls.shape[1])
        return None if found is None else EncoderOutput(cls, found)

    def keep(self, name: str, output: EncoderOutput, *, patches: bool) -> None:
        """Keep the features of a batch, Float[B D] and Float[B N D] on the CPU.

        Args:
            name: name of the batch.
            output: features of the batch.
            patches: whether they are kept too; those of a large set that only `cls` was asked of would fill a disk.
        """
        self.num_computed += 1
        # Kept apart: k-NN over a large set neither reads nor writes the patches.
        for part, rows in (("cls", output.cls), ("patches", output.patches))[: 2 if patches else 1]:
            tensor = rows.contiguous()
            self._remember(f"{name}.{part}", tensor)
            if self.folder is not None:
                path = self.folder / f"{name}.{part}.safetensors"
                unfinished = path.with_suffix(f".{os.getpid()}")
                save_file({part: tensor.clone()}, unfinished)
                unfinished.replace(path)

    def _find(self, name: str) -> Tensor | None:
        if name in self._memory:
            return self._memory[name]
        tensor = None if self.folder is None else _read(self.folder / f"{name}.safetensors")
        if tensor is not None:
            self._remember(name, tensor)
        return tensor

    def _remember(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._bytes + size <= self.memory_bytes:
            self._memory[name] = tensor
            self._bytes += size


def _read(path: Path) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        (tensor,) = load_file(path).values()
    except (SafetensorError, ValueError) as error:
        _LOG.warning("cached features %s cannot be read (%s); they are computed again", path, error)
        return None
    return tensor
