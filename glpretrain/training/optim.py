"""Settings of the optimization (learning rates, weight decay, clipping, frozen parameters) and the functions that apply them.

Left out: the training loop (Lightning) and the momentum of the teacher (`Method`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from glpretrain.core.schedule import Schedule
from glpretrain.core.shards import local
from glpretrain.core.shards import norms as norms_of
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.documents import PackedAttention
from glpretrain.training.branch import Branch
from glpretrain.training.prototypes import CrossEntropyForm, Prototypes

# For runs that start from trained weights and set none; the default of MAE's fine-tuning (main_finetune.py).
_LAYER_DECAY_FROM_WEIGHTS = 0.75
_TOKENS = ("token", "pos_embed", "cls_pos")  # endings of the names of class tokens, registers and learned positions


@dataclass(frozen=True)
class Clip:
    """Bounds on gradients.

    Args:
        mode: what one L2 norm is taken over: every single `parameter` (DINO utils.py, clip_gradients), every `module` of the method, which
            is the encoder and each head (DINOv2 train.py), or all gradients `joint` (MAE, FSFM).
        max_norm: largest norm, a number or a schedule over progress.
        skip: names of modules of the method whose gradients are left alone, such as `expert_heads` (GPFM clips the student only).

    Raises:
        ValueError: `max_norm` is 0 or below.
    """

    mode: Literal["parameter", "module", "joint"] = "parameter"
    max_norm: float | Schedule = 3.0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_norm, Schedule):
            self.max_norm.require("clip: max_norm", positive=True)
        elif not self.max_norm > 0.0:
            raise ValueError(f"clip: max_norm is {self.max_norm}; accepted are values above 0, or a clip of null for none")


@dataclass(frozen=True)
class TrunkRelease:
    """When the trunk of a run that starts from trained weights begins to learn.

    Random heads send random gradients into the trunk. So the trunk can stay frozen for a share of the run; then its rate rises.

    Args:
        frozen: share of the run in which only the heads learn; 0 lets the trunk learn from the first step on.
        ramp: share of the run in which the rate of the trunk rises to its full value.
        tolerance: releases the trunk before the end of `frozen`, as soon as the mean losses of two successive windows differ by at most
            this share; None waits for the end of `frozen`.
        window: share of the run over which the loss is averaged for `tolerance`.

    Raises:
        ValueError: a value out of range.
    """

    frozen: float = 0.0
    ramp: float = 0.05
    tolerance: float | None = None
    window: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("frozen", self.frozen), ("ramp", self.ramp), ("window", self.window)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"trunk: {name} is a share of the run in [0, 1), not {value}")
        if self.tolerance is not None and (not self.tolerance > 0.0 or self.window == 0.0):
            raise ValueError(f"trunk: tolerance {self.tolerance} and window {self.window}; both are shares above 0")


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW, of clipping, and of parameters that are frozen at first.

    Args:
        lr: learning rate as it is used; with `per`, that of a batch of so many items, which is scaled to the batch of the run.
        weight_decay: weight decay of parameters with more than one axis, except biases (DINO utils.py, get_params_groups).
        betas: AdamW's two momenta.
        layer_decay: factor on the rate from one layer of the encoder to the one below; None is 1, and 0.75 in a run that starts from
            trained weights.
        patch_lr: one more factor on the rate of the patch embedding (0.2 in Mugs and DINOv2).
        clip: bounds on gradients; None leaves gradients alone.
        freeze_prototypes: share of the run in which prototypes do not learn (DINO: the first epoch).
        freeze_by: how they are kept from learning: without a `gradient`, so that their momenta and their count of steps stay as they are
            (DINO and iBOT, main_dino.py), or with a `rate` of 0, so that AdamW's momenta follow the gradients, which also count in the
            norm of their module (DINOv2 and GPFM, train.py).
        mask_token: whether the mask token of the encoder or a decoder learns like a `head`, at full rate and without decay, or like an
            `embedding`: with decay, as in the official codes of DINOv2, iBOT, MAE and FSFM, and in an encoder at the rate of the layer
            below all blocks (DINOv2 and GPFM, param_groups.py).
        tokens_decay: whether class tokens, registers and position embeddings decay, as in pretraining (DINO, MAE); they do not in MAE's
            fine-tuning (main_finetune.py, no_weight_decay).
        trunk: when the trunk learns in a run that starts from trained weights, where None is the default release; a run from random
            weights accepts None only.
        max_refused: number of steps in a row whose loss or gradients may be not finite; these steps move nothing. One more stops the run.
        chunk_size: number of views that the encoder sees at a time; None stands for all views of a batch. The activations inside the
            encoder are kept for one chunk only, and are computed a second time for the gradients (Gao et al. 2021, GradCache). Heads and
            losses see the whole batch, so the gradients are those of the whole batch, which accumulated micro-batches do not give where
            a loss compares items.
        compile: whether torch compiles the blocks of student and teacher at the first steps, which takes a minute and a C++ compiler on a
            CPU; later steps are faster, and but for rounding the same.
        activation_checkpointing: whether the encoder keeps only the inputs of its blocks, and computes each block a second time for the
            gradients. They are the same to the last bit, for a third more products in a step and a fraction of its memory.
        cross_entropy: how losses over prototypes are computed: logits of some prototypes at a time, `chunked`, or kernels that hold none,
            `fused`, on a GPU with Triton. But for rounding the two are the same; no GPU has measured the second one yet.
        packed_attention: how views of several sizes attend in one sequence: a call per size, `grouped`, or one call with a block mask,
            `flex`, which torch compiles on a GPU at the first step. But for rounding the two are the same; no GPU has measured the second.

    Raises:
        ValueError: a value out of range.
    """

    lr: Schedule = Schedule(5e-4, 1e-6, warmup=0.1)  # noqa: RUF009  frozen
    weight_decay: Schedule = Schedule(0.04, 0.4)  # noqa: RUF009
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float | None = None
    patch_lr: float = 1.0
    clip: Clip | None = Clip()
    freeze_prototypes: float = 0.0
    freeze_by: Literal["gradient", "rate"] = "gradient"
    mask_token: Literal["head", "embedding"] = "head"
    tokens_decay: bool = True
    trunk: TrunkRelease | None = None
    max_refused: int = 10
    chunk_size: int | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    cross_entropy: CrossEntropyForm = "chunked"
    packed_attention: PackedAttention = "grouped"

    def __post_init__(self) -> None:
        self.lr.require("optimization: lr", scales=True)
        self.weight_decay.require("optimization: weight_decay")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optimization: betas are in [0, 1), not {self.betas}")
        for name, value in (("layer_decay", self.layer_decay), ("patch_lr", self.patch_lr)):
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"optimization: {name} is in (0, 1], not {value}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"optimization: chunk_size is at least 1 view, or null for all, not {self.chunk_size}")
        if self.compile and self.activation_checkpointing:
            raise ValueError("optimization: compile=True and activation_checkpointing=True were both given; leave one of them out")
        if not 0.0 <= self.freeze_prototypes <= 1.0:
            raise ValueError(f"optimization: freeze_prototypes is a share of the run in [0, 1], not {self.freeze_prototypes}")
        words = {"freeze_by": ("gradient", "rate"), "mask_token": ("head", "embedding")}
        words |= {"cross_entropy": get_args(CrossEntropyForm), "packed_attention": get_args(PackedAttention)}
        for name, accepted in words.items():
            if (value := vars(self)[name]) not in accepted:
                raise ValueError(f"optimization: {name}={value!r} given; accepted: {', '.join(accepted)}")
        if self.freeze_by == "rate" and self.freeze_prototypes == 0.0:
            raise ValueError("optimization: freeze_by='rate' would be ignored: freeze_prototypes is 0; leave it out, or set that above 0")
        if self.max_refused < 0:
            raise ValueError(f"optimization: max_refused is a number of steps from 0 on, not {self.max_refused}")

    def for_batch(self, num_items: int) -> "Optimization":
        """The settings for steps of `num_items` (all processes and accumulated micro-batches together): `lr` without a rule."""
        return replace(self, lr=self.lr.for_batch(num_items))

    def describe_rate(self, num_items: int) -> str:
        """A line that says what rate the rule of `lr` gives for steps of `num_items`; empty where there is no rule."""
        if self.lr.per is None:
            return ""
        how = "the square root of " if self.lr.scaling == "sqrt" else ""
        used = self.lr.for_batch(num_items).base
        return f"lr: {self.lr.base:g} x {how}({num_items} items a step / {self.lr.per}) = {used:g}\n"

    def optimizer(
        self, encoder: Encoder, others: Iterable[tuple[str, nn.Parameter]], *, prototypes: Collection[nn.Parameter] = (), from_weights: bool
    ) -> torch.optim.AdamW:
        """AdamW over groups of parameters; `set_step` gives each its rate and decay before every step.

        Args:
            encoder: the trunk, whose layers learn at rates of their own.
            others: (name, parameter) of heads and decoders, at full rate.
            prototypes: those of `others` that `freeze_prototypes` is about.
            from_weights: whether the run starts from trained weights.
        """
        layer_decay = self.layer_decay if self.layer_decay is not None else _LAYER_DECAY_FROM_WEIGHTS if from_weights else 1.0
        groups = parameter_groups(
            encoder,
            others,
            layer_decay=layer_decay,
            patch_lr=self.patch_lr,
            mask_token=self.mask_token,
            tokens_decay=self.tokens_decay,
            prototypes=prototypes if self.freeze_by == "rate" else (),
        )
        return torch.optim.AdamW(groups, lr=self.lr(0.0), betas=self.betas, weight_decay=0.0, fused=True)

    def require_modules(self, method: nn.Module) -> None:
        """Check that `clip` and `freeze_by` name or need nothing that the method lacks.

        Raises:
            ValueError: a name in `clip.skip` is no module with parameters, or there are no prototypes to freeze by their rate.
        """
        modules = {name.rsplit(".", depth)[0] for name, _ in method.named_parameters() for depth in range(1, name.count(".") + 1)}
        if unknown := sorted(set(self.clip.skip if self.clip is not None else ()) - modules):
            accepted = ", ".join(sorted(name for name in modules if "." not in name))
            raise ValueError(f"clip: skip names {', '.join(unknown)}; accepted: modules with parameters, such as {accepted}")
        if self.freeze_by == "rate" and not any(isinstance(module, Prototypes) for module in method.modules()):
            raise ValueError(f"optimization: freeze_by='rate' would be ignored: {type(method).__name__} has no prototypes; leave it out")

    def set_step(self, optimizer: torch.optim.Optimizer, progress: float, *, trunk_rate: float = 1.0) -> dict[str, float]:
        """Set rates and decays of one step, those of the trunk times `trunk_rate`.

        Returns:
            Rate and decay before the factors of groups, by name.
        """
        values = {"lr": self.lr(progress), "weight_decay": self.weight_decay(progress)}
        frozen = self.freeze_by == "rate" and progress < self.freeze_prototypes
        for group in optimizer.param_groups:
            group["lr"] = values["lr"] * group["lr_scale"] * (trunk_rate if group["is_trunk"] else 1.0)
            group["weight_decay"] = values["weight_decay"] * group["decays"]
            if frozen and group["are_prototypes"]:
                group["lr"] = 0.0
        return values

    def drop_frozen(self, method: nn.Module, progress: float) -> None:
        """Drop the gradients of prototypes that do not learn yet, where they are frozen in this way."""
        if self.freeze_by == "gradient" and progress < self.freeze_prototypes:
            for module in method.modules():
                if isinstance(module, Prototypes):
                    for parameter in module.parameters():
                        parameter.grad = None

    def clip_gradients(self, method: nn.Module, norms: dict[str, Tensor], progress: float) -> None:
        """Clip; called once gradients are unscaled and complete.

        Args:
            method: module that holds the gradients.
            norms: what `gradient_norms` gives for it.
            progress: share of the run that is done.
        """
        if self.clip is not None:
            max_norm = self.clip.max_norm(progress) if isinstance(self.clip.max_norm, Schedule) else self.clip.max_norm
            clip_gradients(method, norms, mode=self.clip.mode, max_norm=max_norm, skip=self.clip.skip)


def parameter_groups(
    encoder: Encoder,
    others: Iterable[tuple[str, nn.Parameter]],
    *,
    layer_decay: float = 1.0,
    patch_lr: float = 1.0,
    mask_token: Literal["head", "embedding"] = "head",
    tokens_decay: bool = True,
    prototypes: Collection[nn.Parameter] = (),
) -> list[dict]:
    """Groups for an optimizer; each carries `lr_scale` and `decays`, which the schedules are multiplied with, `is_trunk` and
    `are_prototypes`.

    `encoder`, `others` and `prototypes` are those of `Optimization.optimizer`, the rest are settings of `Optimization`. A layer of the
    encoder learns at `layer_decay` ** (number of layers above it).

    Raises:
        ValueError: `patch_lr` is given for an encoder without a patch embedding, or `mask_token` is given where there is none.
    """
    trunk = list(encoder.named_parameters())
    if patch_lr != 1.0 and not any(encoder.embeds_patches(name) for name, _ in trunk):
        raise ValueError(f"patch_lr={patch_lr} would be ignored: {encoder.card.encoder} has no patch embedding; leave it out")
    others = list(others)
    if mask_token == "embedding" and not any(name.endswith("mask_token") for name, _ in [*trunk, *others]):
        raise ValueError("optimization: mask_token='embedding' would be ignored: nothing here has a mask token; leave it out")
    top = encoder.num_layers + 1
    as_embedding, own_groups = mask_token == "embedding", {id(parameter) for parameter in prototypes}

    def scale(name: str) -> float:
        layer = 0 if as_embedding and name == "mask_token" else encoder.layer_of(name)
        return layer_decay ** (top - layer) * (patch_lr if encoder.embeds_patches(name) else 1.0)

    scaled = [(name, parameter, scale(name), True) for name, parameter in trunk]
    scaled += [(name, parameter, 1.0, False) for name, parameter in others]
    groups: dict[tuple[float, bool, bool, bool], list[Tensor]] = {}
    for name, parameter, lr_scale, is_trunk in scaled:
        if parameter.requires_grad:
            has_axes = parameter.ndim > 1 or (as_embedding and name.endswith("mask_token"))  # of the official ones, all but the last are 1
            decays = has_axes and not name.endswith(".bias") and (tokens_decay or not name.endswith(_TOKENS))
            groups.setdefault((lr_scale, decays, is_trunk, id(parameter) in own_groups), []).append(parameter)
    keys = ("lr_scale", "decays", "is_trunk", "are_prototypes")
    return [{"params": params, **dict(zip(keys, values, strict=True))} for values, params in groups.items()]


@torch.no_grad()
def gradient_norms(method: nn.Module) -> dict[str, Tensor]:
    """L2 norm of every gradient, Float[] each, by the name of its parameter; parameters without gradient are left out."""
    gradients = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.grad is not None}
    return dict(zip(gradients, norms_of(list(gradients.values())), strict=True))


@torch.no_grad()
def clip_gradients(
    method: nn.Module,
    norms: dict[str, Tensor],
    *,
    mode: Literal["parameter", "module", "joint"],
    max_norm: float,
    skip: Collection[str] = (),
) -> None:
    """Scale down gradients whose L2 norm exceeds `max_norm`; see `Clip` for what a norm is taken over.

    Args:
        method: module that holds the gradients.
        norms: what `gradient_norms` gives for it.
        mode: what one norm is taken over.
        max_norm: largest norm.
        skip: names of modules that are left alone, see `Clip`.
    """
    left_alone = tuple(f"{name}." for name in skip)
    norms = {name: norm for name, norm in norms.items() if not name.startswith(left_alone)}
    if not norms:
        return
    parameters = {name: parameter for name, parameter in method.named_parameters() if name in norms}
    if mode == "parameter":
        factors = ((torch.stack(list(norms.values())) + 1e-6).reciprocal() * max_norm).clamp_max(1.0)
        gradients = [local(parameter.grad) for parameter in parameters.values() if parameter.grad is not None]
        torch._foreach_mul_(gradients, list(factors.unbind()))  # pyright: ignore[reportPrivateImportUsage]
        return
    by_identity = {id(parameter): norms[name] for name, parameter in parameters.items()}
    for group in _by_module(method) if mode == "module" else [list(parameters.values())]:
        found = [parameter for parameter in group if id(parameter) in by_identity]
        if found:
            total = torch.linalg.vector_norm(torch.stack([by_identity[id(parameter)] for parameter in found]))
            factor = (max_norm / (total + 1e-6)).clamp_max(1.0)  # torch.nn.utils.clip_grads_with_norm_
            gradients = [local(parameter.grad) for parameter in found if parameter.grad is not None]
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]


def _by_module(method: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of the encoder and of every head, decoder and predictor: the children of the method, branches and containers opened."""
    found: list[list[nn.Parameter]] = []
    waiting = list(method.children())
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, nn.ModuleDict | Branch):
            waiting += list(module.children())
        elif parameters := list(module.parameters()):
            found.append(parameters)
    return found
