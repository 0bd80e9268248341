"""What the two timm adapters share: sizes, channel statistics and the folder layout that timm opens by itself."""

from collections.abc import Sequence

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from glpretrain.core.types import EncoderCard


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: neither one positive number nor two.
    """
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"encoder: img_size={size} given; accepted: a positive number, or height and width")
    return sizes


def normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, *, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, with ImageNet's (three channels) or 0.5 where None is given.

    Raises:
        ValueError: their length is not the number of channels.
    """
    usual = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else ((0.5,) * in_chans,) * 2
    chosen = []
    for name, given, default in zip(("mean", "std"), (mean, std), usual, strict=True):
        values = default if given is None else tuple(given)
        if len(values) != in_chans:
            raise ValueError(f"encoder: {name} has {len(values)} values; accepted: {in_chans}, one per channel")
        chosen.append(tuple(values))
    return chosen[0], chosen[1]


def image_card(
    encoder: str,
    arguments: dict[str, str | int | float | bool | list[int] | None],
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_size: tuple[int, int],
    embed_dim: int,
) -> EncoderCard:
    """The card of a timm adapter.

    Args:
        encoder: registered name of the adapter.
        arguments: of its constructor; `in_chans`, `img_size`, `licence` and `source` among them.
        mean: as given, see `normalisation`.
        std: as given.
        patch_size: height and width of a token in pixels.
        embed_dim: width D.
    """
    channels = arguments["in_chans"]
    mean, std = normalisation(mean, std, in_chans=channels)
    return EncoderCard(
        encoder=encoder,
        arguments={**arguments, "mean": list(mean), "std": list(std)},
        modality="image",
        item_shape=(channels, *arguments["img_size"]),
        patch_size=patch_size,
        embed_dim=embed_dim,
        mean=mean,
        std=std,
        licence=arguments["licence"],
        source=arguments["source"],
    )


def timm_config(card: EncoderCard, *, model_args: dict) -> dict:
    """The `config.json` of a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""
    return {
        "architecture": card.arguments["name"],
        "num_classes": 0,
        "num_features": card.embed_dim,
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": list(card.item_shape),
            "num_classes": 0,
            "mean": list(card.mean),
            "std": list(card.std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "license": card.licence,
        },
    }
