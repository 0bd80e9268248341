"""Items, what an encoder makes of them, the card that travels with weights, and the letters that name axes everywhere in the package.

Axis legend (views come first, so a tensor of views is `V B ...`):

    B items            V views            G global views      L local views
    N tokens (patches, point groups)      M selected tokens
    A coordinates of a place in an item   D embedding         K prototypes, or the width of a projection
    C H W image        P points           F T spectrogram

Left out: what data hands to a method, which is `glpretrain.core.batch`.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import Tensor


class Item(NamedTuple):
    """One decoded item at its own size. What is said of pixels holds for the points of a cloud, as Int[P] in place of Int[H W]."""

    image: Tensor  # UInt8[C H W], or Float[P 3] for a cloud of points
    label: int  # index into `Source.classes`, -1 where there is none
    instances: Tensor | None  # Int[H W]  0 background, 1.. objects of this item, -1 to be ignored; None without masks
    regions: Tensor | None  # Int[H W]  region id per pixel (face parts), -1 where there is none; None without regions
    semantic: Tensor | None = None  # Int[H W]  index into `Source.mask_classes`, -1 to be ignored; None without such masks


class EncoderOutput(NamedTuple):
    """One forward pass of an encoder."""

    cls: Tensor  # Float[B D]    after the final norm; the mean of the patches where an encoder has no class token
    patches: Tensor  # Float[B N D]  after the final norm; M kept tokens instead of N when `keep` was given


@dataclass(frozen=True)
class EncoderCard:
    """What must travel with the weights so that nobody has to guess.

    Args:
        encoder: name in the encoder registry.
        arguments: what the registered builder needs to make the same architecture again (plain JSON values).
        modality: name of the kind of item, see `glpretrain.modalities`.
        item_shape: shape of the items that the encoder was trained on: channels, height and width of an image, (points, 3) of a cloud.
        patch_size: inputs of a token along each axis: height and width in pixels, or the points of a group.
        embed_dim: width D of `cls` and `patches`.
        mean: mean per channel, of images scaled to [0, 1]; coordinates of points are taken as they are.
        std: standard deviation per channel, of the same values.
        licence: licence of the weights; empty where nobody has said.
        source: where the weights come from (method, recipe, steps).
    """

    encoder: str
    arguments: dict[str, str | int | float | bool | list[int] | list[float] | None]
    modality: str
    item_shape: tuple[int, ...]
    patch_size: tuple[int, ...]
    embed_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = ""
    source: str = ""

    def to_json(self) -> dict:
        """Plain values, ready for `json.dump`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "EncoderCard":
        """Inverse of `to_json`.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = set(cls.__dataclass_fields__)
        if unknown := set(values) - names:
            raise ValueError(f"encoder card: unknown fields {sorted(unknown)}; accepted: {sorted(names)}")
        optional = {"licence", "source"}
        if missing := names - set(values) - optional:
            raise ValueError(f"encoder card: missing fields {sorted(missing)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
