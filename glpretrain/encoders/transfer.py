"""Copy the weights of one encoder into another that computes the same, to train on from where someone stopped.

The two are compared by what they compute, not by their names: a model of another name is accepted when its features are equal. A ViT may
also go on for another kind of item, such as one of images for spectrograms: its kernels are then summed over the colours, as the code of
ASiT of 2024 and that of AST do it (main_ASiT.py; ast_models.py), and all else is compared on items of its own kind.
Left out: reading files (`glpretrain.weights`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glpretrain.encoders.base import Encoder, build
from glpretrain.encoders.timm_model import resize_positions
from glpretrain.encoders.vit import ViT

_POSITIONS, _KERNELS = "pos_embed", "patch_embed.proj.weight"
# Arguments that a run chooses for itself, whatever the weights were trained with.
_FREE = ("img_size", "num_points", "drop_path_rate", "drop_path_uniform", "licence", "source")
# Arguments that belong to a kind of item, and not to what goes on for another one.
OF_CHANNELS = ("in_chans", "mean", "std")
OF_KIND = (*OF_CHANNELS, "modality", "position_resize")
_TOLERANCE = 1e-5  # as a share of the largest feature; the operations are the same, so only rounding differs


@dataclass(frozen=True)
class Transfer:
    """What `copy_backbone` did.

    Args:
        num_tensors: number of tensors that were copied: all of the backbone.
        resized: grid before and after of every tensor that was resized, by the tensor's name.
        summed: number of channels over which the kernels of the patch embedding were summed; 0 where they were not.
    """

    num_tensors: int
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    summed: int = 0

    def __str__(self) -> str:
        """`52 tensors, pos_embed resized from 6x6 to 14x14`."""
        grids = [f"{name} resized from {_by(old)} to {_by(new)}" for name, (old, new) in self.resized.items()]
        kernels = [f"{_KERNELS} summed over {self.summed} channels"] if self.summed else []
        return ", ".join([f"{self.num_tensors} tensors", *kernels, *grids])


def copy_backbone(source: Encoder, *, target: Encoder) -> Transfer:
    """Copy the weights of `source` into `target`. The grid of positions may have another size, and ViTs may be of two kinds of items.

    Args:
        source: an encoder with loaded weights.
        target: the encoder that is going to be trained; its mask token stays as it is.

    Returns:
        How many tensors were copied, and which were resized.

    Raises:
        ValueError: the two differ in anything else; the message says in what, and with which arguments `target` has to be built.
    """
    is_other_kind = _is_other_kind(source, target=target)
    theirs, ours = (_facts(encoder, with_channels=not is_other_kind) for encoder in (source, target))
    if differing := [f"{name} {theirs[name]} where the recipe says {ours[name]}" for name in theirs if theirs[name] != ours[name]]:
        raise ValueError(f"the backbone has {', '.join(differing)}{_advice(source, target=target)}")
    state = source.backbone_state()
    _check_features(source, state, target=target)
    resized, summed = {}, 0
    if is_other_kind and len(source.card.mean) != len(target.card.mean):
        summed = len(source.card.mean)
        state = {**state, _KERNELS: state[_KERNELS].sum(dim=1, keepdim=True)}  # [D 1 p p]
    grids = [encoder.grid(encoder.card.item_shape) for encoder in (source, target)]
    if isinstance(source, ViT) and _POSITIONS in state and grids[0] != grids[1]:
        how = target.position_resize if is_other_kind and isinstance(target, ViT) else source.position_resize
        resized_grid = resize_positions(state[_POSITIONS], grid=grids[0], new_grid=grids[1], how=how)
        state = {**state, _POSITIONS: resized_grid}
        resized[_POSITIONS] = (grids[0], grids[1])
    try:
        target.load_backbone_state(state)
    except ValueError as error:  # such as relative positions, which are tied to one size
        raise ValueError(f"the backbone's {error}; accepted for this kind: img_size={list(source.card.item_shape[1:])}") from error
    return Transfer(num_tensors=len(state), resized=resized, summed=summed)


def _is_other_kind(source: Encoder, *, target: Encoder) -> bool:
    """Whether a ViT of one kind of item goes on for another, so that their channels are not compared.

    Raises:
        ValueError: the kinds differ, and the encoders are no ViTs, or the target has several channels and not as many as the source.
    """
    kinds = [encoder.card.modality for encoder in (source, target)]
    if kinds[0] == kinds[1]:
        return False
    counts = [len(encoder.card.mean) for encoder in (source, target)]
    if not (isinstance(source, ViT) and isinstance(target, ViT)) or counts[1] not in (1, counts[0]):
        accepted = f"two ViTs, the recipe's with one channel or with {counts[0]}"
        raise ValueError(f"the backbone has items of kind {kinds[0]} where the recipe says {kinds[1]}; accepted: {accepted}")
    return True


def _facts(encoder: Encoder, *, with_channels: bool) -> dict[str, str]:
    """What has to be equal and can be named in a message; `_check_features` finds every other difference."""
    card = encoder.card
    channels = {"in_chans": str(len(card.mean)), "mean": str(list(card.mean)), "std": str(list(card.std))}
    return {
        "encoder": card.encoder,
        "patch_size": _by(card.patch_size),
        "patch_stride": str(card.arguments.get("patch_stride")),
        "embed_dim": str(encoder.embed_dim),
        "depth": str(encoder.num_layers),
        **(channels if with_channels else {}),
    }


def _check_features(source: Encoder, state: dict[str, Tensor], *, target: Encoder) -> None:
    """Equal shapes do not make equal functions: attention heads, activation and registers are compared by the features."""
    arguments = dict(target.card.arguments)
    if "img_size" in arguments:
        arguments["img_size"] = list(source.card.item_shape[1:])
    if source.card.modality != target.card.modality:
        own = source.card.arguments
        arguments |= {"modality": source.card.modality, **{name: own.get(name) for name in OF_CHANNELS}}
    with torch.random.fork_rng(devices=[]):  # these weights are overwritten; the run's own random numbers must not move
        twin = build(replace(target.card, arguments=arguments)).eval()
    try:
        twin.load_backbone_state(state)
    except ValueError as error:
        raise ValueError(f"the backbone's {_shortened(str(error))}{_advice(source, target=target)}") from error
    count = torch.Size(source.card.item_shape).numel()
    item = torch.sin(0.37 * torch.arange(count, dtype=torch.float32)).reshape(1, *source.card.item_shape)
    was_training = source.training
    source.eval()
    with torch.no_grad():
        expected, found = source(item), twin(item)
    source.train(was_training)
    for name, value, wanted in zip(found._fields, found, expected, strict=True):
        if value is None or wanted is None:
            assert value is wanted, f"{name}: one encoder has none"
        elif not torch.allclose(value, wanted, rtol=0.0, atol=_TOLERANCE * wanted.abs().max().item()):
            off = (value - wanted).abs().max().item()
            raise ValueError(
                f"the backbone's weights fit the recipe's encoder, which computes something else with them ({name} is off by {off:.2g})"
                + _advice(source, target=target)
            )


def _advice(source: Encoder, *, target: Encoder) -> str:
    """What to change in the recipe: the arguments that would make the two equal."""
    given, own = source.card.arguments, target.card.arguments
    free = (*_FREE, *OF_KIND) if source.card.modality != target.card.modality else _FREE
    wanted = {name: value for name, value in given.items() if name not in free and value is not None and value != own.get(name)}
    listed = ", ".join(f"{name}={value}" for name, value in wanted.items())
    return f"; set the recipe's encoder to {source.card.encoder}" + (f" with {listed}" if listed else "")


def _shortened(text: str, *, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
