"""What the parts hand to one another, and the letters that name axes everywhere in the package.

Axis legend (views come first, so a tensor of views is `V B ...`):

    B items            V views            G global views      L local views
    N tokens (patches, point groups)      M selected tokens
    D embedding        K prototypes, or the width of a projection
    C H W image        P points           F T spectrogram

Left out on purpose: a free-form field for extras. A method that needs something new from the data adds a field here.
"""

from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from glpretrain import __version__


class EncoderOutput(NamedTuple):
    """One forward pass of an encoder."""

    cls: Tensor  # Float[B D]    after the final norm; the mean of the patches where an encoder has no class token
    patches: Tensor  # Float[B N D]  after the final norm; M kept tokens instead of N when `keep` was given


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


# What the fields of a card are in JSON, which makes lists of tuples.
_JSON_TYPES = {
    **dict.fromkeys(("encoder", "modality", "licence", "source"), (str,)),
    **dict.fromkeys(("item_shape", "patch_size", "mean", "std"), (list, tuple)),
    "arguments": (dict,),
    "embed_dim": (int,),
}


@dataclass(frozen=True)
class EncoderCard:
    """What must travel with the weights so that nobody has to guess.

    A written card also says its format and the version of the package that wrote it. A new field comes with a default, so that cards of
    older formats can still be read, and raises `format` by one. A card without a format is of format 1.

    Args:
        encoder: name of the encoder in the registry.
        arguments: arguments of the registered builder that make the same architecture again (plain JSON values).
        modality: kind of item.
        item_shape: shape of the items that the encoder was trained on: channels, height and width of an image, (points, 3) of a cloud.
        patch_size: inputs of a token along each axis: height and width in pixels, or the points of a group.
        embed_dim: width D of `cls` and `patches`.
        mean: mean per channel, of images scaled to [0, 1]; coordinates of points are taken as they are.
        std: standard deviation per channel, likewise.
        licence: licence of the weights, empty where the user has not given one.
        source: where the weights come from (method, recipe, steps).
    """

    format: ClassVar[int] = 2

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
        return {"format": self.format, "written_by": f"glpretrain {__version__}", **asdict(self)}

    @classmethod
    def from_json(cls, values: object) -> "EncoderCard":
        """Inverse of `to_json`. Fields that a card of an older format lacks get their defaults.

        Raises:
            ValueError: the card is of a newer format, or a field is missing, unknown or of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"encoder card: a {type(values).__name__} given; accepted: a JSON object")
        card: dict = {"format": 1, "written_by": "a newer version", **values}
        format, writer = card.pop("format"), card.pop("written_by")
        if type(format) is not int or format < 1:
            raise ValueError(f"encoder card: format={format!r} given; accepted: 1 to {cls.format}")
        if format > cls.format:
            raise ValueError(
                f"encoder card: format={format} given, written by {writer!r}; glpretrain {__version__} reads formats 1 to {cls.format}; "
                "install the version that wrote the card or a newer one"
            )
        required = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(cls)}
        if unknown := sorted(map(str, card.keys() - required.keys())):
            raise ValueError(f"encoder card: unknown fields {unknown}; accepted: {sorted(required)}")
        if missing := sorted(name for name in required.keys() - card.keys() if required[name]):
            raise ValueError(f"encoder card: missing fields {missing}")
        for name, value in card.items():
            if not isinstance(value, _JSON_TYPES[name]):
                raise ValueError(f"encoder card: {name}={value!r} given; accepted: {_JSON_TYPES[name][0].__name__}")
            if isinstance(value, list):
                card[name] = tuple(value)
        return cls(**card)
