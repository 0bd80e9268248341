"""A step of official code beside ours, on the same views: what `glpretrain bench --against official-dino PATH` runs.

The code is not part of this package. It is imported from a clone that the user names, so it may do whatever its authors, or whoever has
changed it, wrote in it. Its network, head, loss, clipping and groups of parameters are used as they are; the lines of its loop
(train_one_epoch of main_dino.py, facebookresearch/dino @ 7c446df, and of main_ibot.py, bytedance/ibot @ da316d8) are followed here,
without its logging and without a process group.
"""

import math
import statistics
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from glpretrain.bench.alone import Alone
from glpretrain.bench.lightly import Lightly
from glpretrain.bench.machine import taken_bytes
from glpretrain.core.batch import Batch
from glpretrain.encoders import ViT
from glpretrain.encoders.base import Encoder
from glpretrain.methods import DINO, IBOT
from glpretrain.methods.base import Method

_PLACEHOLDERS = ("tensorboardX", "munkres", "sklearn")  # imported by official code, and not run here
_EPOCH, _EPOCHS = 1, 2  # of its schedules: after the first epoch nothing is frozen
_WARMUP = 2
_GLOBAL = 2  # number of global views


class Compared(NamedTuple):
    """The same step by two codes."""

    milliseconds: float  # median
    official_milliseconds: float
    taken_bytes: int  # by the allocator, beyond weights and optimizer, gradients that are held between steps included
    official_taken_bytes: int

    @property
    def speed(self) -> float:
        """How many times as fast ours is; above 1 ours is faster."""
        return self.official_milliseconds / self.milliseconds


class _OneProcess:
    """In place of `torch.distributed`, which the official loss asks for a sum and a count even in a run of one process."""

    @staticmethod
    def all_reduce(tensor: Tensor) -> None:
        """The sum over one process."""

    @staticmethod
    def get_world_size() -> int:
        """One."""
        return 1


def require_code(name: str, code: Path) -> None:
    """Check that official code is there, without executing it.

    Raises:
        ValueError: the name is unknown, or a file of the code is missing.
    """
    if name not in OFFICIAL:
        raise ValueError(f"bench: --against {name} given; accepted: {', '.join(OFFICIAL)}, each followed by the PATH of a clone")
    kind = OFFICIAL[name]
    if missing := [module for module in kind.modules if not (code / f"{module.replace('.', '/')}.py").is_file()]:
        raise ValueError(f"bench: {code} has no {missing[0].replace('.', '/')}.py; accepted: a clone of {kind.repository}")


class Other(Protocol):
    """Somebody else's step."""

    def step(self, images: Sequence[Tensor], masks: Sequence[Tensor] | None) -> None:
        """A step over views, Float[B C H W] each; Bool[B h w] says what is hidden in each global view, where anything is."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What learns."""
        ...


def compare(method: Method, batch: Batch, *, name: str, code: Path | None, dtype: torch.dtype | None, steps: int) -> Compared:
    """Time steps of both codes in turns.

    Args:
        method: the method that the official code trains, with a ViT, on its device.
        batch: a batch for it.
        name: `lightly`, or the name of official code, one of `OFFICIAL`.
        code: clone of the official code. It is executed.
        dtype: type of autocast, for both; None for none.
        steps: number of steps of each that are timed.

    Raises:
        ValueError: there is no such code, or it has nothing that the method could be compared with.
    """
    groups = [batch.views[role] for role in ("global", "local") if role in batch.views]
    if code is None:
        other: Other = Lightly(method, dtype=dtype)
    else:
        other = _official(method, name=name, code=code, num_views=sum(len(group.items) for group in groups), dtype=dtype)
    views = [view for group in groups for view in group.items.unbind()]
    masks = None if (mask := batch.views["global"].mask) is None else mask.unflatten(2, method.encoder.grid(views[0].shape[1:])).unbind()
    ours = Alone(method.train(), num_items=len(batch.index), dtype=dtype)
    actions: list[Callable[[], object]] = [partial(ours.step, batch), partial(other.step, views, masks)]
    device = batch.index.device
    times: list[list[float]] = [[], []]
    for number in range(_WARMUP + steps):
        for which in (0, 1) if number % 2 else (1, 0):
            milliseconds = _milliseconds(actions[which], device)
            if number >= _WARMUP:
                times[which].append(milliseconds)
    own, official_own = (statistics.median(found) for found in times)
    taken, official_taken = (
        taken_bytes(action, device) + sum(one.grad.nbytes for one in parameters if one.grad is not None)
        for action, parameters in zip(actions, (list(method.parameters()), list(other.parameters())), strict=True)
    )
    return Compared(own, official_own, taken, official_taken)


def _official(method: Method, *, name: str, code: Path, num_views: int, dtype: torch.dtype | None) -> "_Official":
    kind = OFFICIAL[name]
    if not isinstance(method, kind.method) or not isinstance(method.encoder, ViT):
        given = f"{type(method).__name__} of {type(method.encoder).__name__}"
        raise ValueError(f"bench: {name} beside {given}; accepted: {kind.method.__name__} of ViT")
    require_code(name, code)
    return kind(_loaded(kind, code), method, name=name, num_views=num_views, dtype=dtype)


class _Official(ABC):
    """Student, teacher, loss and optimizer of official code, of the same sizes as ours.

    Args:
        module: its main module.
        method: ours.
        name: name of the official code.
        num_views: number of views of an item.
        dtype: type of autocast.
    """

    modules: ClassVar[tuple[str, ...]]  # the main module first
    repository: ClassVar[str]
    method: ClassVar[type[DINO | IBOT]]

    def __init__(self, module: ModuleType, method: DINO | IBOT, *, name: str, num_views: int, dtype: torch.dtype | None) -> None:
        self.module, self._dtype = module, dtype
        encoder = method.encoder
        rate = encoder.card.arguments.get("drop_path_rate", 0.0)
        student = self._network(method, encoder, drop_path_rate=rate, learns=True)
        teacher = self._network(method, encoder, drop_path_rate=0.0, learns=False)
        self._networks = (student, teacher)
        given, own = (sum(one.numel() for one in module.parameters()) for module in (student, method.student))
        if given != own:
            raise ValueError(f"bench: {name} has {given} parameters and the recipe {own}; accepted: a plain ViT with a class token")
        teacher.load_state_dict(student.state_dict(), strict=False)
        teacher.requires_grad_(False)
        device = next(method.parameters()).device
        student.to(device)
        teacher.to(device)
        self._loss = self._loss_of(method.cls_objective.centre.numel(), num_views).to(device)
        self._optimizer = torch.optim.AdamW(module.utils.get_params_groups(student), lr=1e-6)
        clip = method.optimization.clip
        self._clip = 0.0 if clip is None or not isinstance(clip.max_norm, float) else clip.max_norm

    def _network(self, method: DINO | IBOT, encoder: Encoder, *, drop_path_rate: object, learns: bool) -> nn.Module:
        (head,) = method.student.heads.values()
        projection, prototypes = head.children()
        layers = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)]
        num_heads = encoder.get_submodule("model.blocks.0.attn").num_heads
        hidden = encoder.backbone_state()["blocks.0.mlp.fc1.weight"]
        backbone = self._backbone(
            img_size=[encoder.card.item_shape[-1]],
            patch_size=encoder.card.patch_size[0],
            embed_dim=encoder.embed_dim,
            depth=encoder.num_layers,
            num_heads=num_heads,
            mlp_ratio=len(hidden) / encoder.embed_dim,
            qkv_bias=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            learns=learns,
        )
        head = self._head(
            encoder.embed_dim,
            len(prototypes.get_parameter("directions")),
            norm_last_layer=not prototypes.get_parameter("gain").requires_grad,
            nlayers=len(layers),
            hidden_dim=layers[0].out_features,
            bottleneck_dim=layers[-1].out_features,
        )
        return self.module.utils.MultiCropWrapper(backbone, head)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the student."""
        return self._networks[0].parameters()

    @abstractmethod
    def _backbone(self, *, learns: bool, **sizes) -> nn.Module:  # noqa: ANN003
        """Its ViT."""

    @abstractmethod
    def _head(self, *sizes: int, **options) -> nn.Module:  # noqa: ANN003
        """Its head."""

    @abstractmethod
    def _loss_of(self, num_prototypes: int, num_views: int) -> nn.Module:
        """Its loss."""

    @abstractmethod
    def _value(self, images: Sequence[Tensor], masks: Sequence[Tensor] | None) -> Tensor:
        """The loss of a batch."""

    def step(self, images: Sequence[Tensor], masks: Sequence[Tensor] | None) -> None:
        """The lines of `train_one_epoch`.

        Args:
            images: Float[B C H W], one tensor for each view.
            masks: Bool[B h w] of each global view; None without masks.
        """
        student, teacher = self._networks
        with torch.autocast(images[0].device.type, dtype=self._dtype, enabled=self._dtype is not None):
            loss = self._value(images, masks)
        assert math.isfinite(loss.item())
        self._optimizer.zero_grad()
        loss.backward()
        if self._clip:
            self.module.utils.clip_gradients(student, self._clip)
        self.module.utils.cancel_gradients_last_layer(_EPOCH, student, 1)
        self._optimizer.step()
        theirs = dict(teacher.named_parameters())
        with torch.no_grad():
            momentum = 0.996
            for name, ours in student.named_parameters():
                if name in theirs:
                    theirs[name].data.mul_(momentum).add_((1 - momentum) * ours.detach().data)


class _OfficialDINO(_Official):
    modules = ("main_dino", "utils", "vision_transformer")
    repository = "facebookresearch/dino"
    method = DINO

    def _backbone(self, *, learns: bool, **sizes) -> nn.Module:  # noqa: ANN003
        return self.module.vits.VisionTransformer(**sizes)

    def _head(self, *sizes: int, **options) -> nn.Module:  # noqa: ANN003
        return self.module.DINOHead(*sizes, **options)

    def _loss_of(self, num_prototypes: int, num_views: int) -> nn.Module:
        return self.module.DINOLoss(num_prototypes, num_views, 0.04, 0.04, 0, _EPOCHS)

    def _value(self, images: Sequence[Tensor], masks: Sequence[Tensor] | None) -> Tensor:
        student, teacher = self._networks
        teacher_output = teacher(images[:_GLOBAL])
        return self._loss(student(images), teacher_output, _EPOCH)


class _OfficialIBOT(_Official):
    modules = ("main_ibot", "utils", "loader", "models.head", "models.vision_transformer")
    repository = "bytedance/ibot"
    method = IBOT

    def _backbone(self, *, learns: bool, **sizes) -> nn.Module:  # noqa: ANN003
        return self.module.models.VisionTransformer(return_all_tokens=True, masked_im_modeling=learns, **sizes)

    def _head(self, *sizes: int, **options) -> nn.Module:  # noqa: ANN003
        return self.module.iBOTHead(*sizes, patch_out_dim=sizes[1], shared_head=True, **options)

    def _loss_of(self, num_prototypes: int, num_views: int) -> nn.Module:
        sizes = (num_prototypes, num_prototypes, _GLOBAL, num_views - _GLOBAL)
        return self.module.iBOTLoss(*sizes, 0.04, 0.04, 0.04, 0.04, 0, _EPOCHS)

    def _value(self, images: Sequence[Tensor], masks: Sequence[Tensor] | None) -> Tensor:
        student, teacher = self._networks
        teacher_output = teacher(images[:_GLOBAL])
        student_output = student(images[:_GLOBAL], mask=masks)
        backbone = vars(student.get_submodule("backbone"))
        backbone["masked_im_modeling"] = False
        local = student(images[_GLOBAL:])[0] if len(images) > _GLOBAL else None
        backbone["masked_im_modeling"] = True
        return self._loss(student_output, teacher_output, local, masks, _EPOCH)["loss"]


OFFICIAL: dict[str, type[_Official]] = {"official-dino": _OfficialDINO, "official-ibot": _OfficialIBOT}


def _milliseconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _loaded(kind: type[_Official], code: Path) -> ModuleType:
    """The official main module, with its neighbours; its modules have names that others may have too."""
    # torch and timm advise against some of its names, and against the weight norm of its head, which is part of what is timed
    warnings.filterwarnings("ignore", message=".*weight_norm.*is deprecated.*")
    warnings.filterwarnings("ignore", message="Importing from timm.*")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    with _first(code):
        module = import_module(kind.modules[0])
    module.dist = _OneProcess  # pyright: ignore[reportAttributeAccessIssue]
    return module


class _Placeholder(ModuleType):
    """A module that is imported by official code and not there."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@contextmanager
def _first(folder: Path) -> Iterator[None]:
    """Import from a folder before all others, and forget its modules afterwards."""
    own = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    known = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
    missing = [name for name in _PLACEHOLDERS if find_spec(name) is None]
    sys.modules.update({name: _Placeholder(name) for name in missing})
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in list(sys.modules):
            if name in missing or name.partition(".")[0] in own:
                del sys.modules[name]
        sys.modules.update(known)
