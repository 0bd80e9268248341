"""The one place where tests of wiring make batches, reduce terms, build methods and train them: what a redesign has to change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import pytorch_lightning as pl
import torch
from golden import noise, official_weights
from pytorch_lightning.loggers import Logger
from torch import Tensor

from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.frames import crop_frames
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.training.branch import Branch
from glpretrain.training.optim import Clip, Optimization, TrunkRelease

AnyMethod = TypeVar("AnyMethod", bound=Method)
Summary = tuple[float, float]


def batch_of(
    global_views: Tensor,
    *,
    local_views: Tensor | None = None,
    mask: Tensor | None = None,
    region_mask: Tensor | None = None,
    corrupted_views: Tensor | None = None,
    corruption: Tensor | None = None,
    student_views: Tensor | None = None,
    weak: Tensor | None = None,
    coarse_views: Sequence[Tensor] = (),
    crops: Tensor | None = None,
    flipped: Tensor | None = None,
    index: Tensor | None = None,
    weight: Tensor | None = None,
) -> Batch:
    """A batch of what is given and nothing else.

    Args:
        global_views: Float[G B *item].
        local_views: Float[L B *item].
        mask: Bool[G B N], True: hidden from the student.
        region_mask: Bool[G B N], True: hidden as a part of the region that is hidden whole.
        corrupted_views: Float[G B *item].
        corruption: Bool[G B H W], True: the pixel was replaced; Bool[G B P] of points.
        student_views: Float[G B *item], the student's own crops.
        weak: Bool[B], True: the student's own crops were weakly augmented.
        coarse_views: Float[V B *item] for each lower resolution.
        crops: Float[G B 4], x0 y0 x1 y1 of every global view in the item's unit square.
        flipped: Bool[G B], True: the view was flipped left to right.
        index: Int[B], dataset indices; None counts from 0.
        weight: Float[B], weights of the items; None is 1 for all.
    """
    num_items = global_views.shape[1]
    frame = None
    if crops is not None:
        flip = torch.zeros(crops.shape[:2], dtype=torch.bool) if flipped is None else flipped
        frame = crop_frames(crops, flip=flip, turns=torch.zeros(crops.shape[:2], dtype=torch.int64))
    parts = {"mask": mask, "region_mask": region_mask, "corrupted": corrupted_views, "corruption": corruption}
    views = {"global": ViewGroup(global_views, frame=frame, **parts)}
    if local_views is not None:
        views["local"] = ViewGroup(local_views)
    if student_views is not None:
        views["student"] = ViewGroup(student_views, strong=None if weak is None else ~weak)
    views |= {f"coarse_{coarse.shape[2]}": ViewGroup(coarse) for coarse in coarse_views}
    return Batch(
        index=torch.arange(num_items) if index is None else index,
        views=views,
        weight=torch.ones(num_items) if weight is None else weight,
    )


def views_of(letter: str, count: int, *, step: int = 0, items: int = 3, size: int = 32) -> Tensor:
    """Float[V B 3 size size], the views of the golden runs: noise(B, 3, size, size, name="<letter><view>.<step>")."""
    return torch.stack([noise(items, 3, size, size, name=f"{letter}{view}.{step}") for view in range(count)])


def value_of(term: Tensor) -> Tensor:
    """A term as one number, Float[]."""
    return term.mean()


def values_of(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """All terms as one number each."""
    return {name: value_of(term) for name, term in terms.items()}


@dataclass(frozen=True)
class Optimized:
    """How a method's parameters are moved; the defaults move all alike, by a rate that stays.

    Args:
        lr: learning rate.
        weight_decay: weight decay of parameters with more than one axis, except biases.
        betas: AdamW's two momenta.
        layer_decay: factor on the rate from one layer to the one below.
        patch_lr: one more factor on the rate of the patch embedding.
        clip: largest norm of each parameter's gradient.
        clip_mode: what a norm is taken over.
        clip_skip: names of modules that are not clipped.
        freeze_prototypes: share of the run in which prototypes do not move.
        freeze_by: how they are kept from moving.
        mask_token: whether the mask token learns like a head or like an embedding.
        tokens_decay: whether class tokens and positions decay.
        trunk: when the trunk of a run from trained weights learns.
        max_refused: number of steps in a row that may be refused.
    """

    lr: Schedule = Schedule(1e-3, shape="constant")  # noqa: RUF009  frozen
    weight_decay: Schedule = Schedule(0.0, shape="constant")  # noqa: RUF009
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float | None = None
    patch_lr: float = 1.0
    clip: float | Schedule | None = None
    clip_mode: Literal["parameter", "module", "joint"] = "parameter"
    clip_skip: tuple[str, ...] = ()
    freeze_prototypes: float = 0.0
    freeze_by: Literal["gradient", "rate"] = "gradient"
    mask_token: Literal["head", "embedding"] = "head"
    tokens_decay: bool = True
    trunk: TrunkRelease | None = None
    max_refused: int = 10


def method(kind: Callable[..., AnyMethod], encoder: Encoder, optimized: Optimized | None = None, /, **settings: object) -> AnyMethod:
    """A method with the settings of its optimizer, and whatever else it takes."""
    values = dict(vars(Optimized() if optimized is None else optimized))
    bound, mode, skip = (values.pop(name) for name in ("clip", "clip_mode", "clip_skip"))
    clip = None if bound is None else Clip(mode=mode, max_norm=bound, skip=skip)
    return kind(encoder, optimization=Optimization(**values, clip=clip), **settings)


def teacher_of(model: Method) -> Branch:
    """The moving copy of the student."""
    assert model.teacher is not None
    branch = model.teacher.branch
    assert isinstance(branch, Branch)
    return branch


class Given:
    """A loader of batches that are there already."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Recorder(pl.Callback):
    """Notes what happens in a fit.

    `gradients` of each optimizer step, before anything is done to them; and after each micro-batch what is `logged`, the `clipped`
    gradients, learning rate and weight decay of every parameter (`rates`), and all tensors of the module (`states`).
    """

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []
        self.clipped: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, tuple[float, float]]] = []
        self.states: list[dict[str, Tensor]] = []
        self._used: dict[str, Tensor] | None = None  # by the optimizer; the method lets go of them right after it

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        let_go = pl_module.zero_grad

        def noted(set_to_none: bool = True) -> None:
            self._used = _gradients(pl_module)
            let_go(set_to_none)

        pl_module.zero_grad = noted

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module.zero_grad

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append(_gradients(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.clipped.append(_gradients(pl_module) if self._used is None else self._used)
        self._used = None
        groups = {id(parameter): group for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
        held = {name: groups[id(parameter)] for name, parameter in pl_module.named_parameters() if id(parameter) in groups}
        self.rates.append({name: (group["lr"], group["weight_decay"]) for name, group in held.items()})
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def _gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def fitted(
    model: Method, batches: Sequence[Batch], *, callbacks: Sequence[pl.Callback] = (), logger: Logger | Literal[False] = False
) -> Recorder:
    """Train on these batches, one step on each, by the same loop as a real run.

    Args:
        model: trained in place.
        batches: one for every step.
        callbacks: those that are tested; they run before what happens is noted.
        logger: where the trainer and its callbacks log to.

    Returns:
        What happened.
    """
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(batches),
        log_every_n_steps=1,
        callbacks=[*callbacks, recorder],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Given(batches))
    assert trainer.global_step == len(batches)
    return recorder


def summary(values: Tensor, name: str) -> Summary:
    """Two numbers that stand for a tensor in the golden runs: its product with noise of the parameter's name, summed, and its norm."""
    values = values.detach().double()
    return float((values * noise(*values.shape, name=f"project {name}").double()).sum()), float(values.norm())


def largest_difference(found: dict[str, Tensor], expected: dict[str, Summary], shapes: dict[str, list[int]]) -> float:
    """How far tensors are from their summaries, relative to the norm of each and at least to a thousandth of the largest norm.

    Args:
        found: tensors by their official names, perhaps of another shape with as many numbers.
        expected: their summaries.
        shapes: the official ones.
    """
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    floor = 1e-3 * max(norm for _, norm in expected.values())
    worst = 0.0
    for name, (projection, norm) in expected.items():
        ours = summary(found[name].reshape(shapes[name]), name)
        worst = max(worst, *(abs(a - b) / max(norm, floor) for a, b in zip(ours, (projection, norm), strict=True)))
    return worst


def apart(model: AnyMethod) -> AnyMethod:
    """Weights and centres by formula: student, teacher, heads and experts differ, so that one cannot pass for another."""
    state = model.state_dict()
    # Running statistics of batch norms stay as they were: with others, nothing that an item says would come through.
    shapes = {name: list(value.shape) for name, value in state.items() if value.is_floating_point() and ".running_" not in name}
    for name, weights in official_weights(shapes).items():
        # Gains near one.
        state[name] = 1.0 + 0.3 * noise(*weights.shape, name=name) if name.endswith(".gain") else weights
    model.load_state_dict(state)
    return model


def unpatchify(patches: Tensor, *, patch_size: tuple[int, int], grid: tuple[int, int], num_channels: int) -> Tensor:
    """The inverse of `patchify`: Float[B N P] to Float[B C H W], where `grid` are the rows and columns of patches."""
    blocks = patches.unflatten(2, (*patch_size, num_channels)).unflatten(1, grid)  # [B rows columns p q C]
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
