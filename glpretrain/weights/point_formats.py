"""Published checkpoints of point transformers: Point-MAE (pretrained and fine-tuned), Point-BERT and POS-BERT.

What no tensor says (points of a group, points per token, attention heads) is taken as published, and the report says so.
Left out: files of images (`formats`).
"""

import re

from torch import Tensor

from glpretrain.weights.files import is_state, listed
from glpretrain.weights.formats import Which
from glpretrain.weights.imported import LoadedWeights, State

# What only one of the two families of tokens has.
_POINT_MARK, _POS_MARK = "encoder.first_conv.0.weight", "gather_local_0.conv1.weight"
_HEADS = {192: 4, 384: 6, 512: 8}
# Sides of a file, and what stands before the encoder's names in each: Point-MAE's, Point-BERT's, a classifier's and POS-BERT's.
_PREFIXES = {
    "teacher": ("MAE_encoder.", "transformer_k.", "transformer_q.", "backbone.", ""),
    "student": ("transformer_q.", "backbone."),
}
_POINT_NAMES = (
    (r"^encoder\.(first|second)_conv\.", r"tokens.\1."),
    (r"^reduce_dim\.", "project."),
    (r"^pos_embed\.", "position."),
    (r"^cls_pos$", "cls_position"),
    (r"^blocks\.blocks\.", "blocks."),
)
_POS_NAMES = tuple(
    (rf"^{old}{number}\.", f"{new}.{place}.")
    for old, new in (("", "tokens.first"), ("gather_local_0.", "tokens.second"))
    for number, place in (("conv1", 0), ("bn1", 1), ("conv2", 3), ("bn2", 4))
)
_PRETRAINING = r"cls_head|lm_head|mask_token|pos_embedding\.|head\."


def read_point_checkpoint(content: object, *, which: Which, num_heads: int | None, path: str) -> LoadedWeights | None:
    """A published point transformer; None where the file holds none.

    Args:
        content: of the file.
        which: side, where there are two.
        num_heads: None is the published number for the width.
        path: for messages.

    Raises:
        ValueError: the side is not there, or the heads are not known.
    """
    if not isinstance(content, dict):
        return None
    inside = {
        key: value
        for key, value in content.items()
        if key in ("base_model", "teacher", "student", "model", "state_dict") and is_state(value)
    }
    if is_state(content):
        inside[""] = content
    if not any(name.endswith((_POINT_MARK, _POS_MARK)) for state in inside.values() for name in state):
        return None
    own_sides = {"teacher", "student"} & inside.keys()
    if own_sides and which not in own_sides:
        raise ValueError(f"load_backbone: which={which!r} given; {path} holds {sorted(own_sides)}")
    whole = inside[which] if own_sides else next(iter(inside.values()))
    whole = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in whole.items()}
    for prefix in _PREFIXES["teacher"] if own_sides else _PREFIXES[which]:
        if prefix + _POINT_MARK in whole or prefix + _POS_MARK in whole:
            break
    else:
        raise ValueError(f"load_backbone: which={which!r} given; {path} holds {listed(sorted(whole))}")
    state = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    left_out = tuple(sorted(name for name in whole if not name.startswith(prefix)))
    side = which if own_sides or prefix.startswith("transformer_") else ""
    return _imported(state, left_out=left_out, side=side, num_heads=num_heads, path=path)


def _imported(state: State, *, left_out: tuple[str, ...], side: str, num_heads: int | None, path: str) -> LoadedWeights:
    pos_bert = _POS_MARK in state
    if pos_bert:
        title, name, points_per_token = "POS-BERT", "pos_bert_large" if len(state["norm.weight"]) > 192 else "pos_bert_base", 32
    else:
        title, name = ("Point-BERT", "point_bert") if "reduce_dim.weight" in state else ("Point-MAE", "point_mae")
        points_per_token = 16
    renamed = _renamed(state, names=_POS_NAMES if pos_bert else _POINT_NAMES)
    embed_dim = len(state["norm.weight"])
    assumed = [f"groups of 32 points and one token for {points_per_token}, as published"]
    if num_heads is None:
        if embed_dim not in _HEADS:
            raise ValueError(f"load_backbone: {path} is {embed_dim} wide, none of the published {sorted(_HEADS)}; give num_heads")
        num_heads = _HEADS[embed_dim]
        assumed.append(f"{num_heads} heads, as published at width {embed_dim}")
    title = f"{title} ({side})" if side else title
    arguments = {
        "name": name,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(found[1]) for key in renamed if (found := re.match(r"blocks\.(\d+)\.", key))),
        "num_heads": num_heads,
        "mlp_ratio": renamed["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "tokens_dim": renamed["tokens.first.0.weight"].shape[0],
        "class_token": "cls_token" in renamed,
        "source": f"{title}, {path}",
    }
    return LoadedWeights(title, "PointTransformer", arguments, renamed, _PRETRAINING, left_out, tuple(assumed))


def _renamed(state: State, *, names: tuple[tuple[str, str], ...]) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        for old, new in names:
            name = re.sub(old, new, name)
        renamed[name] = _reshaped(name, tensor)
    return renamed


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """Convolutions over single points as linear layers, and POS-BERT's class token as others have it."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if name.startswith("tokens.") and tensor.dim() == 3:
        return tensor.squeeze(2)
    if name == "cls_token" and tensor.shape[2] == 1:
        return tensor.transpose(1, 2)
    return tensor
