"""Published encoders of spectrograms: what their tensors are for our views, in which time comes first.

AST and its copy in Hugging Face transformers see the filterbank with frequency first and let patches overlap; ASiT has time first and
patches side by side. No file of either says how many frames and bins it was trained on. Left out: the names of the tensors (`names`).
"""

from pathlib import Path

from torch import Tensor

from glpretrain.core.patches import strided_grid
from glpretrain.weights.files import State
from glpretrain.weights.formats import infer
from glpretrain.weights.report import Arguments

BINS = 128  # of every published model
_DISTILLED = "deit_base_distilled_patch16_224"  # timm's model with these two tokens, in any size
# AST's published models by their number of patches: the step from patch to patch along both axes, and frames (README.md, egs/*/run.sh).
_AST = {1212: (10, 1024), 850: (12, 1024), 657: (14, 1024), 512: (16, 1024), 600: (10, 512), 144: (10, 128)}
_STRIDE = 10  # of models with other numbers of patches


def infer_spectrograms(
    state: State,
    *,
    name: str | None,
    num_heads: int | None,
    heads: dict[int, int],
    path: Path,
    size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> tuple[Arguments, State, list[str]]:
    """The arguments of `ViT` that fit the tensors of an encoder of spectrograms.

    Args:
        state: tensors under timm's names. Those with a `dist_token` are AST's, frequency first; others have time first.
        name: name of the timm model; None reads it off the tensors.
        num_heads: number of attention heads; None takes it from `heads`.
        heads: number of attention heads of the published models by width.
        path: file or folder, for messages.
        size: frames and bins; None takes the published ones.
        stride: frames and bins from one patch to the next, given with `size`; None for patches side by side.

    Returns:
        The arguments, the tensors with time first, and what had to be assumed.

    Raises:
        ValueError: the positions fit no such grid, or see `formats.infer`.
    """
    patch, assumed = state["patch_embed.proj.weight"].shape[-1], list[str]()
    is_ast = "dist_token" in state
    if size is None:
        size, stride = _published(state, patch=patch, is_ast=is_ast)
        steps = "" if stride is None else f" and a patch every {stride[0]}"
        assumed.append(f"{size[0]} frames of {size[1]} bins{steps}, as published for {_num_patches(state)} patches")
    grid = strided_grid(size, patch_size=(patch, patch), stride=stride or (patch, patch))
    covered = (grid[0] * patch, grid[1] * patch)  # by as many patches side by side, which is how timm counts them
    if is_ast and grid[0] * grid[1] == _num_patches(state):
        state = state | {
            "patch_embed.proj.weight": state["patch_embed.proj.weight"].transpose(2, 3).contiguous(),
            "pos_embed": _time_first(state["pos_embed"], grid=grid),
        }
    found, state, more = infer(
        state, name=name or (_DISTILLED if is_ast else None), num_heads=num_heads, heads=heads, periods=None, path=path, img_size=covered
    )
    found |= {"img_size": list(size), "modality": "audio"}
    if stride is not None and stride != (patch, patch):
        found["patch_stride"] = list(stride)
    return found, state, [*assumed, *more]


def _num_patches(state: State) -> int:
    return state["pos_embed"].shape[1] - 1 - int("dist_token" in state)


def _published(state: State, *, patch: int, is_ast: bool) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Frames and bins, and the step from patch to patch where it is AST's."""
    count = _num_patches(state)
    if not is_ast:
        return (count * patch // (BINS // patch) if patch <= BINS else patch, BINS), None
    rows = strided_grid((BINS, BINS), patch_size=(patch, patch), stride=(_STRIDE, _STRIDE))[1]
    step, frames = _AST.get(count, (_STRIDE, (count // rows - 1) * _STRIDE + patch))
    return (frames, BINS), (step, step)


def _time_first(positions: Tensor, *, grid: tuple[int, int]) -> Tensor:
    """Float[1 2+N D] in AST's order, frequency by frequency, in ours; `grid` counts patches along time and frequency."""
    own = positions.clone()
    own[:, 2:] = positions[:, 2:].unflatten(1, (grid[1], grid[0])).transpose(1, 2).flatten(1, 2)
    return own
