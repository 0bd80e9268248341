"""Bounds of the numbers and words in a card, which may come from anywhere. Left out: which of them fit each other (the encoders)."""

import math
import reprlib
from collections.abc import Sequence

_LARGEST_COUNTS = {
    **{"in_chans": 4096, "patch_size": 1024, "embed_dim": 16_384, "depth": 256, "num_heads": 1024, "reg_tokens": 1024},
    **{"num_points": 10_000_000, "points_per_token": 65_536, "group_size": 65_536, "tokens_dim": 16_384},
    **{"pool_dim": 16_384, "pool_heads": 1024},
}
_LARGEST = {"mlp_ratio": 64, "norm_eps": 1, "init_values": 1000}
_NEVER_NONE = ("drop_path_rate", "group_size", "num_points")  # numbers that no architecture has of its own


def check_numbers(encoder: str, **numbers: object) -> None:
    """Refuse, with a ValueError, arguments that are no numbers or lie far beyond what anyone published; None is left out where it
    stands for the number of the architecture.

    A constructor calls this first, because a card may come from anywhere and a depth of 20,000 would be built for a minute.
    """
    for name, value in numbers.items():
        if value is None and name not in _NEVER_NONE:
            continue
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if name in _LARGEST_COUNTS:
            accepted = f"at least 1 and at most {_LARGEST_COUNTS[name]}"
            fits = isinstance(number, int) and 1 <= number <= _LARGEST_COUNTS[name]
        elif name in _LARGEST:
            accepted, fits = f"above 0 and at most {_LARGEST[name]}", 0.0 < number <= _LARGEST[name]
        else:
            assert name == "drop_path_rate"
            accepted, fits = "[0, 1)", 0.0 <= number < 1.0
        if not fits:
            raise ValueError(f"{encoder}: {name}={reprlib.repr(value)} given; accepted: {accepted}")


def check_words(encoder: str, **words: tuple[object, Sequence[object]]) -> None:
    """Refuse, with a ValueError, arguments that are none of the accepted words.

    Args:
        encoder: name of the encoder, for messages.
        words: value and accepted values of each argument.
    """
    for name, (value, accepted) in words.items():
        if value not in accepted:
            raise ValueError(f"{encoder}: {name}={value!r} given; accepted: {', '.join(map(str, accepted))}")
