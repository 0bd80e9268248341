"""What the parts hand to one another, and the letters that name axes everywhere in the package.

Axis legend (views come first, so a tensor of views is `V B ...`):

    B items            V views            G global views      L local views
    N tokens (patches, point groups)      M selected tokens
    D embedding        K prototypes, or the width of a projection
    C H W image        P points           F T spectrogram

Left out on purpose: a free-form field for extras. A method that needs something new from the data adds a field here.
"""

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class EncoderOutput(NamedTuple):
    """One forward pass of an encoder."""

    cls: Tensor  # Float[B D]    after the final norm; the mean of the patches where an encoder has no class token
    patches: Tensor  # Float[B N D]  after the final norm; M kept tokens instead of N when `keep` was given
    registers: Tensor | None = None  # Float[B R D]  after the final norm: the other tokens (registers, distillation); None without any


class Batch(NamedTuple):
    """All that a method ever sees of the data."""

    global_views: Tensor  # Float[G B *item]  normalised
    local_views: Tensor | None  # Float[L B *item]
    mask: Tensor | None  # Bool[G B N]       True: hidden from the student
    region_mask: Tensor | None  # Bool[G B N]       True: hidden as a part of the region that is hidden whole (region masks)
    corrupted_views: Tensor | None  # Float[G B *item]  the global views with groups of pixels replaced (GMML)
    corruption: Tensor | None  # Bool[G B H W]     True: pixel was replaced; Bool[G B P] of points
    student_views: Tensor | None  # Float[G B *item]  the student's own crops of the global size; None: it sees the teacher's
    weak: Tensor | None  # Bool[B]           True: the student's own crops were weakly augmented
    regions: Tensor | None  # Int[G B N]        region id of each token, -1 where there is none
    boxes: Tensor | None  # Float[V B 5]      each view's crop in the item's unit square (x0 y0 x1 y1), flip (0 or 1) + 2 * quarter turns
    index: Tensor  # Int[B]            dataset index
    coarse_views: tuple[Tensor, ...] | None = None  # Float[V B *item] per lower resolution


@dataclass(frozen=True)
class EncoderCard:
    """What must travel with the weights so that nobody has to guess.

    Args:
        encoder: name in the encoder registry.
        arguments: what the registered builder needs to make the same architecture again (plain JSON values).
        modality: kind of item.
        item_shape: of the item that it was trained on: channels, height and width of an image, (points, 3) of a cloud.
        patch_size: inputs of a token along each axis: height and width in pixels, or the points of a group.
        embed_dim: width D of `cls` and `patches`.
        mean: per channel, of images scaled to [0, 1]; coordinates of points are taken as they are.
        std: likewise.
        licence: of the weights, empty when the user has not said.
        source: where the weights come from (method, recipe, steps).
    """

    encoder: str
    arguments: dict[str, str | int | float | bool | list[int] | list[float] | None]
    modality: Literal["image", "points", "audio"]
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
