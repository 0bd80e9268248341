"""A step of the official DINO code beside ours, on the same views: what `glpretrain bench --against official-dino PATH` runs.

The code is not part of this package. It is imported from a clone that the user names, so it may do whatever its authors, or whoever has
changed it, wrote in it. Its network, head, loss, clipping and groups of parameters are used as they are; the lines of its loop
(main_dino.py, train_one_epoch, facebookresearch/dino @ 7c446df) are followed here, without its logging and without a process group.
"""

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glpretrain.bench.alone import Alone
from glpretrain.bench.machine import taken_bytes
from glpretrain.core.batch import Batch
from glpretrain.encoders import ViT
from glpretrain.methods import DINO
from glpretrain.methods.base import Method

_FILES = ("main_dino", "utils", "vision_transformer")
_EPOCH, _EPOCHS = 1, 2  # of its schedules: after the first epoch nothing is frozen
_WARMUP = 2


class Compared(NamedTuple):
    """The same step by two codes."""

    milliseconds: float  # median
    official_milliseconds: float
    taken_bytes: int  # by the allocator, beyond what is held between steps
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


def require_code(code: Path) -> None:
    """Check that the official code is there, without executing it.

    Raises:
        ValueError: a file of it is missing.
    """
    if missing := [name for name in _FILES if not (code / f"{name}.py").is_file()]:
        raise ValueError(f"bench: {code} has no {missing[0]}.py; accepted: a clone of facebookresearch/dino")


def compare(method: Method, batch: Batch, *, code: Path, dtype: torch.dtype | None, steps: int) -> Compared:
    """Time steps of both codes in turns.

    Args:
        method: a DINO method with a ViT, on its device.
        batch: a batch for it.
        code: clone of facebookresearch/dino. Its code is executed.
        dtype: type of autocast, for both; None for none.
        steps: number of steps of each that are timed.

    Raises:
        ValueError: there is no such code, or it has nothing that the method could be compared with.
    """
    groups = [batch.views[name] for name in ("global", "local") if name in batch.views]
    official = _Official(_loaded(code), method, num_views=sum(len(group.items) for group in groups), dtype=dtype)
    views = [view for group in groups for view in group.items.unbind()]
    ours = Alone(method.train(), num_items=len(batch.index), dtype=dtype)
    actions: list[Callable[[], object]] = [partial(ours.step, batch), partial(official.step, views)]
    device = batch.index.device
    times: list[list[float]] = [[], []]
    for number in range(_WARMUP + steps):
        for which in (0, 1) if number % 2 else (1, 0):
            milliseconds = _milliseconds(actions[which], device)
            if number >= _WARMUP:
                times[which].append(milliseconds)
    own, official_own = (statistics.median(found) for found in times)
    taken, official_taken = (taken_bytes(action, device) for action in actions)
    return Compared(own, official_own, taken, official_taken)


class _Official:
    """Student, teacher, loss and optimizer of the official code, of the same sizes as ours.

    Args:
        module: its main_dino.py.
        method: ours.
        num_views: number of views of an item.
        dtype: type of autocast.
    """

    def __init__(self, module: ModuleType, method: Method, *, num_views: int, dtype: torch.dtype | None) -> None:
        encoder = method.encoder
        if not isinstance(method, DINO) or not isinstance(encoder, ViT):
            raise ValueError(f"bench: official-dino beside {type(method).__name__} of {type(encoder).__name__}; accepted: DINO of ViT")
        self._utils, self._dtype = module.utils, dtype
        rate = encoder.card.arguments.get("drop_path_rate", 0.0)
        self._networks = [self._network(module, method, encoder, drop_path_rate=rate) for rate in (rate, 0.0)]
        student, teacher = self._networks
        given, own = (sum(one.numel() for one in module.parameters()) for module in (student, method.student))
        if given != own:
            raise ValueError(f"bench: official-dino has {given} parameters and the recipe {own}; accepted: a plain ViT with a class token")
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
        device = next(method.parameters()).device
        student.to(device)
        teacher.to(device)
        num_prototypes = method.cls_objective.centre.numel()
        self._loss = module.DINOLoss(num_prototypes, num_views, 0.04, 0.04, 0, _EPOCHS).to(device)
        self._optimizer = torch.optim.AdamW(module.utils.get_params_groups(student), lr=1e-6)
        clip = method.optimization.clip
        self._clip = 0.0 if clip is None or not isinstance(clip.max_norm, float) else clip.max_norm

    @staticmethod
    def _network(module: ModuleType, method: DINO, encoder: ViT, *, drop_path_rate: object) -> nn.Module:
        projection, prototypes = method.student.heads["cls"].children()
        layers = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)]
        num_heads = encoder.get_submodule("model.blocks.0.attn").num_heads
        hidden = encoder.backbone_state()["blocks.0.mlp.fc1.weight"]
        backbone = module.vits.VisionTransformer(
            img_size=[encoder.card.item_shape[-1]],
            patch_size=encoder.card.patch_size[0],
            embed_dim=encoder.embed_dim,
            depth=encoder.num_layers,
            num_heads=num_heads,
            mlp_ratio=len(hidden) / encoder.embed_dim,
            qkv_bias=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        head = module.DINOHead(
            encoder.embed_dim,
            len(prototypes.get_parameter("directions")),
            norm_last_layer=not prototypes.get_parameter("gain").requires_grad,
            nlayers=len(layers),
            hidden_dim=layers[0].out_features,
            bottleneck_dim=layers[-1].out_features,
        )
        return module.utils.MultiCropWrapper(backbone, head)

    def step(self, images: Sequence[Tensor]) -> None:
        """The lines of `train_one_epoch`."""
        student, teacher = self._networks
        with torch.autocast(images[0].device.type, dtype=self._dtype, enabled=self._dtype is not None):
            teacher_output = teacher(images[:2])
            student_output = student(images)
            loss = self._loss(student_output, teacher_output, _EPOCH)
        assert math.isfinite(loss.item())
        self._optimizer.zero_grad()
        loss.backward()
        if self._clip:
            self._utils.clip_gradients(student, self._clip)
        self._utils.cancel_gradients_last_layer(_EPOCH, student, 1)
        self._optimizer.step()
        with torch.no_grad():
            momentum = 0.996
            for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.data.mul_(momentum).add_((1 - momentum) * ours.detach().data)


def _milliseconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _loaded(code: Path) -> ModuleType:
    """The official main_dino.py, with its neighbours; its modules have names that others may have too."""
    require_code(code)
    # torch advises against the weight norm of its head, which is part of what is timed
    warnings.filterwarnings("ignore", message=".*weight_norm.*is deprecated.*")
    with _first(code):
        module = import_module(_FILES[0])
    module.dist = _OneProcess  # pyright: ignore[reportAttributeAccessIssue]
    return module


@contextmanager
def _first(folder: Path) -> Iterator[None]:
    """Import from a folder before all others, and forget its modules afterwards."""
    known = {name: sys.modules.pop(name) for name in _FILES if name in sys.modules}
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in _FILES:
            sys.modules.pop(name, None)
        sys.modules.update(known)
