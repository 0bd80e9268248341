"""How items become features: the settings that every evaluator has, and the sizes and batches that they mean for an encoder.

Reading is left out (`items`), and so are encoding itself (`encoding`) and what is done with the features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from glpretrain import modalities
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import Tokens
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import Encoding, encoded_batches
from glpretrain.evaluate.items import DecodedItems
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.reading import ItemBatch, Patches, Resize
from glpretrain.evaluate.rows import LabelledFeatures, labelled_rows


@dataclass(frozen=True)
class Features:
    """How items become features. Every evaluator has one of these among its settings.

    Args:
        size: size that items are brought to: side of the square, or height and width of an image; number of points of a cloud. None takes
            the size of the encoder's card.
        layer: block whose features are taken; negative numbers count from the last block.
        tokens: what evaluators of patches take of that block: its output under the final norm, or the queries, keys or values of its
            attention, the heads side by side, of a ViT or a point transformer.
        crop: what evaluators of `cls` see of an image. "short_side": the short side is brought to the size and the centre is cut, so that
            nothing of the short side is lost. "inner": the short side is brought to 256 / 224 of the size before, so that an eighth of
            it is cut off as well. This is the transform of DINO's k-NN and linear evaluations, and of most published for ImageNet.
        batch_size: number of items that are encoded at a time.
        bf16: whether to encode under bfloat16 autocast.
    """

    size: int | Sequence[int] | None = None
    layer: int = -1
    tokens: Tokens = "output"
    crop: Literal["short_side", "inner"] = "short_side"
    batch_size: int = 64
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"features.batch_size: {self.batch_size}; accepted: a positive number")
        if self.tokens not in (accepted := ("output", "query", "key", "value")):
            raise ValueError(f"features.tokens: {self.tokens!r}; accepted: {', '.join(accepted)}")
        if self.crop not in ("short_side", "inner"):
            raise ValueError(f"features.crop: {self.crop!r}; accepted: short_side, inner")

    @property
    def cropping(self) -> Resize:
        """How items are brought to the size by evaluators of `cls`."""
        return "inner_crop" if self.crop == "inner" else "crop"

    def refuse(self, *names: str) -> None:
        """Refuse settings that an evaluator would ignore.

        Raises:
            ValueError: one of them has another value than its default.
        """
        for field in fields(self):
            if field.name in names and vars(self)[field.name] != field.default:
                raise ValueError(f"features.{field.name}: {vars(self)[field.name]}; this evaluator does not use it; leave it out")

    def shape(self, encoder: Encoder) -> tuple[int, ...]:
        """The shape that items are brought to for an encoder.

        Raises:
            ValueError: the encoder does not take items of this size.
        """
        shape = modalities.get(encoder.card.modality).item_shape(encoder.card, self.size)
        encoder.grid(shape)
        return shape

    def image_grid(self, encoder: Encoder) -> tuple[int, int]:
        """Rows and columns of the patches of an image.

        Raises:
            ValueError: see `shape`.
        """
        rows, columns = encoder.grid(self.shape(encoder))
        return rows, columns

    def batches(self, encoder: Encoder, items: DecodedItems, *, resize: Resize, description: str) -> Iterator[ItemBatch]:
        """Items at the size for an encoder, with a progress bar.

        Args:
            encoder: the encoder that they are for.
            items: the items.
            resize: see `DecodedItems.batches`.
            description: what the bar says before the name of the source.
        """
        found = items.batches(self.shape(encoder), resize=resize, batch_size=self.batch_size)
        return tracked(found, total=-(-len(items) // self.batch_size), description=f"{description} {items.name}")

    def encode(
        self,
        encoder: Encoder,
        items: DecodedItems,
        *,
        resize: Resize,
        patches: Patches = "all",
        cache: FeatureCache | None = None,
        is_looked_at: bool = False,
    ) -> Iterator[tuple[ItemBatch, EncoderOutput]]:
        """Encode every item in evaluation mode, on the device of the encoder, without gradient.

        Args:
            encoder: the encoder; every module of it gets its own mode back.
            items: the items.
            resize: see `DecodedItems.batches`.
            patches: how much of the patches is needed, which is what comes and is kept.
            cache: features of this encoder; what is in it is not computed again.
            is_looked_at: whether the caller needs the values or masks of the items, which are not read where their features are known.

        Yields:
            Each batch with its features in float32, on the CPU.
        """
        options = {"resize": resize, "cache": cache, "is_looked_at": is_looked_at}
        for batch, outputs in self.encode_layers(encoder, items, layers={self.layer: patches}, **options):
            yield batch, outputs[self.layer]

    def encode_layers(
        self,
        encoder: Encoder,
        items: DecodedItems,
        *,
        resize: Resize,
        layers: Mapping[int, Patches],
        cache: FeatureCache | None = None,
        is_looked_at: bool = False,
    ) -> Iterator[tuple[ItemBatch, dict[int, EncoderOutput]]]:
        """`encode` for several layers, in one pass over the items. Other arguments as there.

        Args:
            layers: blocks whose features are taken, each with how much of its patches is needed.

        Yields:
            Each batch with its features by layer.
        """
        encoding = Encoding(tuple(self.shape(encoder)), resize, self.batch_size, layers, self.bf16, self.tokens)
        found = encoded_batches(encoder, items, encoding, cache=cache, is_looked_at=is_looked_at)
        return tracked(found, total=items.num_batches(self.batch_size), description=f"encoding {items.name}")

    def labelled(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None = None) -> LabelledFeatures:
        """`cls` of every item that has a label. Arguments as in `encode`; see `labelled_rows`."""
        batches = self.encode(encoder, items, resize=self.cropping, patches="none", cache=cache)
        return labelled_rows(batches, lambda output: output.cls, items=items)
