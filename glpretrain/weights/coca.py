"""CONCH's file: of a model of images and texts (CoCa), the image tower.

Left out: the text tower, the decoder, the pool that it reads, and the projection into the space of texts.
"""

import re

from glpretrain.weights.architecture import infer
from glpretrain.weights.formats import FORMATS
from glpretrain.weights.imported import LoadedWeights, State

_TRUNK, _QUERY = "visual.trunk.", "visual.attn_pool_contrast.query"
_KEPT = r"visual\.(trunk|attn_pool_contrast|ln_contrast)\."
_POOL_HEADS = 8
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's, as conch/open_clip_custom says


def is_coca(state: State) -> bool:
    """Whether the tensors are those of a CoCa with an attention pool behind its image tower."""
    return _QUERY in state and f"{_TRUNK}patch_embed.proj.weight" in state


def read_coca(state: State, *, num_heads: int | None, name: str | None, path: str, file: str) -> LoadedWeights:
    """The image tower of such a file.

    Args:
        state: for which `is_coca` holds, in single precision.
        num_heads: of the ViT, where its width is not published.
        name: of the timm model.
        path: for messages.
        file: for the card.

    Raises:
        ValueError: see `infer`.
    """
    kept = {key.removeprefix("visual."): tensor for key, tensor in state.items() if re.match(_KEPT, key)}
    trunk = {key.removeprefix("trunk."): tensor for key, tensor in kept.items() if key.startswith("trunk.")}
    own, _, assumed = infer(trunk, name=name, num_heads=num_heads, heads=FORMATS["timm"].heads, periods=None, path=path)
    arguments = {key: value for key, value in own.items() if key != "rope_periods"} | {
        "pool_dim": kept["attn_pool_contrast.query"].shape[1],
        "pool_heads": _POOL_HEADS,
        "mean": _MEAN,
        "std": _STD,
        "source": f"CONCH, {file}",
    }
    assumed = (*assumed, f"{_POOL_HEADS} heads of the pool, as published")
    left_out = tuple(sorted(key for key in state if not re.match(_KEPT, key)))
    return LoadedWeights("CONCH", "PooledViT", arguments, kept, left_out=left_out, assumed=assumed)
