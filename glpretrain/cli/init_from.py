"""Where a run's trunk comes from when it does not start from random weights.

Left out: reading files (`backbones`), what may differ (`encoders.transfer`), and when the trunk learns (`training.warm_start`).
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Literal

import torch
from jsonargparse import Namespace

from glpretrain import encoders
from glpretrain.encoders import fingerprint
from glpretrain.encoders.timm_model import pair
from glpretrain.encoders.transfer import OF_KIND, Transfer
from glpretrain.methods.base import Method
from glpretrain.weights import load_backbone_with_report, load_heads

# What a recipe declares of its encoder, also by leaving it out. Everything else (mean, std, licence) belongs to the weights.
_DECLARED = ("name", "img_size", "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate", "source")
# Arguments of an encoder that a run chooses for itself, whatever the weights were trained with.
_OF_RUN = ("drop_path_rate", "drop_path_uniform", "rope_augmentation", "local_norm")
_VIEWS = ("global_views", "student_views", "local_views")


@dataclass(frozen=True)
class InitFrom:
    """The `init_from` of a recipe.

    Args:
        path: backbone to go on from, as `glpretrain.load_backbone` takes it.
        which: which encoder of a checkpoint that holds two.
        heads: whether to go on with the checkpoint's heads too, instead of fresh ones; its method and the recipe's must have the same.
            Centres, queues, the optimizer and schedules begin anew.
        encoder: whether to take the encoder from the backbone too, in place of the recipe's, with its size; sizes of views change by as
            much, to whole patches.
        size: side of that encoder, or height and width; None is the backbone's own.

    Raises:
        ValueError: `size` is given without `encoder`.
    """

    path: str
    which: Literal["teacher", "student"] = "teacher"
    heads: bool = False
    encoder: bool = False
    size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not self.encoder:
            raise ValueError(f"init_from: size={self.size} would be ignored without encoder: true; set the recipe's img_size instead")


class Origin:
    """A backbone that has been loaded, and what a run has to say about it.

    Args:
        given: `init_from` as it was parsed.
        in_chans: number of channels of the recipe's encoder; None for that of the weights. Where these are of another kind of item, they
            keep theirs until they are handed over.
        modality: kind of the items of the recipe's encoder; None for that of the weights.

    Raises:
        ValueError: the file is missing or broken.
    """

    def __init__(self, given: str | Namespace, *, in_chans: int | None = None, modality: str | None = None) -> None:
        self.init_from = InitFrom(given) if isinstance(given, str) else InitFrom(**given.as_dict())
        try:
            self.heads = load_heads(self.init_from.path, which=self.init_from.which) if self.init_from.heads else None
            with torch.random.fork_rng(devices=[]):  # heads draw what they draw in a run from random weights
                self.backbone, self.report = load_backbone_with_report(self.init_from.path, which=self.init_from.which)
                self._is_other_kind = modality not in (None, self.backbone.card.modality)
                if in_chans not in (None, len(self.backbone.card.mean)) and not self._is_other_kind:
                    self.backbone, self.report = load_backbone_with_report(
                        self.init_from.path, which=self.init_from.which, in_chans=in_chans
                    )
        except ValueError as error:
            raise ValueError(f"init_from: {error}") from error
        self.sha256 = fingerprint(self.backbone)
        self.transfer: Transfer | None = None

    def complete(self, encoder: Namespace, *, views: Namespace) -> None:
        """Fill in what a recipe's encoder leaves open and the weights depend on; all of it where `init_from` says `encoder`.

        Args:
            encoder: class_path and init_args; changed in place, so that the run's config.yaml says what was used.
            views: likewise; changed where `init_from` says `encoder`.

        Raises:
            ValueError: the encoder of a backbone of another kind of items is asked for.
        """
        if self.init_from.encoder:
            if self._is_other_kind:
                raise ValueError(
                    f"init_from: encoder=true given; {self.init_from.path} is of kind {self.backbone.card.modality}; leave it out"
                )
            self._replace(encoder, views)
            return
        module, _, name = encoder.class_path.rpartition(".")
        parameters = inspect.signature(vars(import_module(module))[name]).parameters
        kept = (*_DECLARED, *OF_KIND) if self._is_other_kind else _DECLARED
        for argument, value in self.backbone.card.arguments.items():
            if argument not in kept and argument in parameters and encoder.init_args[argument] == parameters[argument].default:
                encoder.init_args[argument] = value

    def _replace(self, encoder: Namespace, views: Namespace) -> None:
        """The backbone's encoder in place of the recipe's, except what a run chooses for itself; views grow as it does."""
        card, before = self.backbone.card, encoder.init_args.get("img_size")
        chosen = {name: encoder.init_args[name] for name in _OF_RUN if name in encoder.init_args}
        chosen |= {} if self.init_from.size is None else {"img_size": self.init_from.size}
        parameters = {name: one.default for name, one in inspect.signature(vars(encoders)[card.encoder]).parameters.items()}
        taken = parameters | {name: value for name, value in (card.arguments | chosen).items() if name in parameters}
        encoder.class_path, encoder.init_args = f"{encoders.__name__}.{card.encoder}", Namespace(**taken)
        if before is not None and "img_size" in taken:
            height, width = card.item_shape[1:] if self.init_from.size is None else pair(self.init_from.size)
            _resize(views, pair(before), (height, width), patch=card.patch_size)

    def start(self, model: Method) -> None:
        """Hand the weights over.

        Raises:
            ValueError: they do not fit the recipe's encoder.
        """
        try:
            self.transfer = model.init_from(self.backbone, heads=self.heads)
        except ValueError as error:
            path = self.init_from.path
            way = (
                f"; or take this encoder with init_from: {{path: {path}, encoder: true}}"
                if str(error).startswith("the backbone has")
                else ""
            )
            raise ValueError(f"init_from: {path}: {error}{way}") from error

    @property
    def taken(self) -> str:
        """`52 tensors, pos_embed resized from 6x6 to 14x14, and 12 of heads`."""
        return f"{self.transfer}, and {self._num_heads_tensors} of heads" if self.heads is not None else str(self.transfer)

    @property
    def _num_heads_tensors(self) -> int:
        return sum(name.startswith("heads.") for name in self.heads or {})

    @property
    def name(self) -> str:
        """`runs/mmc/latest/backbone (sha256 0123456789ab)`."""
        return f"{self.init_from.path} (sha256 {self.sha256[:12]})"

    def results(self, model: Method) -> dict[str, object]:
        """What results.json says about it."""
        card, trunk = self.backbone.card, model.trunk
        assert trunk is not None and self.transfer is not None
        return {
            **asdict(self.init_from),
            "sha256": self.sha256,
            "loaded": str(self.report),
            "source": card.source,
            "tensors": self.transfer.num_tensors,
            **({"heads_tensors": self._num_heads_tensors} if self.heads is not None else {}),
            **({"summed_channels": self.transfer.summed} if self.transfer.summed else {}),
            "resized": {name: {"from": list(old), "to": list(new)} for name, (old, new) in self.transfer.resized.items()},
            "trunk": asdict(trunk.settings),
            "trunk_released_at": None if math.isinf(trunk.released) else trunk.released,
        }


def _resize(views: Namespace, before: tuple[int, int], after: tuple[int, int], *, patch: Sequence[int]) -> None:
    """Give all views the sizes that they have in a recipe whose encoder is `after` high and wide, not `before`."""

    def scaled(side: int, axis: int) -> int:
        return max(1, round(side * after[axis] / before[axis] / patch[axis])) * patch[axis]

    for spec in (spec for kind in _VIEWS for spec in views.init_args.get(kind) or []):
        if "size" in spec:
            height, width = (scaled(side, axis) for axis, side in enumerate(pair(spec["size"])))
            spec["size"] = height if height == width else (height, width)
        if "frames" in spec:
            spec["frames"] = scaled(spec["frames"], 0)
    for sizes in (views.init_args, *(views.init_args.get("other_sizes") or [])):
        for name in ("clean_size", "global_size", "local_size"):
            if sizes.get(name):
                sizes[name] = scaled(sizes[name], 0)
