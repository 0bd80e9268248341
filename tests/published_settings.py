"""What the built objects of a paper recipe use, field by field, beside the official values of golden/published.yaml.

`python tests/published_settings.py` writes docs/published.md. Models are built on torch's meta device, where no weights are made, except
for the fields about initial weights, which are measured on a copy of one block. Left out: the data sets, and whether the code computes the
same (parity tests do that).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from shrinking import ROOT, without_files
from timm.layers import LayerScale
from torch import Tensor, nn

from glpretrain.cli.trust import Parser, enforce
from glpretrain.core.keys import item_keys
from glpretrain.data.views import MultiCrop, PointCrops, PointViewSpec, SoundCrops, SoundViewSpec, ViewMaker, ViewSpec
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.encoders.drop_path import KeyedDropPath
from glpretrain.encoders.rope import AugmentedRope, RopeAugmentation
from glpretrain.masking import Corruption, DINOv3Mask, Mask, RegionMask
from glpretrain.methods.base import Method
from glpretrain.objectives.regularization import KoLeoAmong
from glpretrain.training.prototypes import Prototypes

OFFICIAL = Path(__file__).parent / "golden" / "published.yaml"
TABLE = ROOT.parent / "docs" / "published.md"
PAPER = ROOT / "paper"
# Files of the recipes that have no official code to be compared with.
WITHOUT_CODE = {"mmc_vits16_in1k", "mmc_vits16_in1k_100ep"}


def official() -> tuple[dict[str, dict], dict[str, dict]]:
    """Repositories by short name, and rows by recipe: field to `value`, `at`, and `named` or `harmless` where ours differs."""
    read = yaml.safe_load(OFFICIAL.read_text())
    return read.pop("repositories"), read


def built(**arguments: tuple[type, object]) -> dict[str, Any]:
    """Objects of the given classes, made from the parts of a recipe as the command line makes them."""
    parser = Parser(exit_on_error=False)
    for name, (kind, _) in arguments.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    enforce()
    made = parser.instantiate(parser.parse_object({name: value for name, (_, value) in arguments.items()}))
    return {name: made[name] for name in arguments}


class Resolved:
    """A recipe, and what is built from it.

    Args:
        path: file of the recipe.
        device: where its method is built; `meta` makes no weights.
    """

    def __init__(self, path: Path, *, device: str = "meta") -> None:
        self.text = path.read_text()
        self.settings = yaml.safe_load(self.text)
        data = self.settings["data"]
        # The fingerprint of an expert needs its weights.
        with torch.device(device), patch("glpretrain.training.teacher.fingerprint", return_value=""):
            self.method: Method = built(model=(Method, without_files(self.settings["model"])))["model"]
        self.encoder = self.method.encoder
        self.views: MultiCrop | PointCrops | SoundCrops = built(views=(ViewMaker, data["views"]))["views"]
        self.mask = built(mask=(Mask | RegionMask, data["mask"]))["mask"] if "mask" in data else None
        self.corruption = built(corruption=(Corruption, data["corruption"]))["corruption"] if "corruption" in data else None
        trainer = self.settings["trainer"]
        processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
        self.batch = data["batch_size"] * processes * trainer.get("accumulate_grad_batches", 1)
        self.length, self.unit = (trainer["max_epochs"], "epochs") if "max_epochs" in trainer else (trainer["max_steps"], "steps")
        self.method.optimization = self.optimization = self.method.optimization.for_batch(self.batch)
        self.optimizer = self.method.configure_optimizers()

    @property
    def decoder(self) -> nn.Module:
        """The student's decoder of pixels."""
        return self.method.student.heads["decoder"]

    def during(self, share: float) -> str:
        """A share of the run in its unit."""
        value = round(share * self.length, 2)
        return f"{value:g} {self.unit}" if value < 1e6 else f"{value:.0f} {self.unit}"

    def groups(self, progress: float) -> dict[str, tuple[float, float]]:
        """Rate and decay of every parameter that learns, as the optimizer has them at this time."""
        self.optimization.set_step(self.optimizer, progress)
        of = {id(p): (group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: of[id(p)] for name, p in self.method.named_parameters() if id(p) in of}

    def factor(self, *ending: str) -> float:
        """Rate of the one parameter of the encoder whose name ends so, divided by that of a head."""
        rates = self.groups(self.optimization.lr.warmup if self.optimization.lr.base > 0.0 else 1.0)
        (name,) = (name for name in rates if name.startswith("student.encoder.") and name.endswith(ending))
        return rates[name][0] / max(rate for rate, _ in rates.values())

    def decay(self, progress: float) -> float:
        """Weight decay of what decays."""
        return max(decay for _, decay in self.groups(progress).values())

    def decays(self, ending: str) -> bool:
        """Whether the one learning parameter whose name ends so decays."""
        (found,) = {decay > 0.0 for name, (_, decay) in self.groups(0.5).items() if name.endswith(ending)}
        return found

    @cached_property
    def one_block(self) -> nn.Module:
        """The method with one block per part and few prototypes, with weights."""
        model = without_files(self.settings["model"])
        assert isinstance(model, dict)
        small = {"num_prototypes": 8, "num_patch_prototypes": 8, "queue_size": 16, "memory_size": 16}
        arguments = model["init_args"] | {name: value for name, value in small.items() if name in model["init_args"]}
        arguments["encoder"] = {**model["init_args"]["encoder"]}
        arguments["encoder"]["init_args"] = {**arguments["encoder"]["init_args"], "depth": 1, "drop_path_rate": 0.0}
        arguments["encoder"]["init_args"].pop("drop_path_uniform", None)
        torch.manual_seed(0)
        return built(model=(Method, {**model, "init_args": arguments}))["model"]


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The transformer's blocks."""
    assert isinstance(encoder, ViT | PointTransformer)
    return list(encoder.model.blocks.children())


def layer_scale(run: Resolved) -> object:
    """Its start in the first block, or none."""
    block = blocks_of(run.one_block.encoder)[0]
    found = [module.gamma for module in block.modules() if isinstance(module, LayerScale)]
    found += [parameter for name, parameter in block.named_parameters() if name == "gamma_1"]  # timm's models of DINOv3
    return found[0].detach()[0].item() if found else "none"


def qkv_bias(run: Resolved) -> str:
    """Which parts of queries, keys and values have a bias that learns."""
    names = {name for name, _ in blocks_of(run.encoder)[0].get_submodule("attn").named_parameters()}
    if "qkv.bias" in names:
        return "all"
    return "queries and values" if {"q_bias", "v_bias"} <= names else "none"


def rope_augmentation(run: Resolved) -> RopeAugmentation | None:
    """How rotary positions are moved in training."""
    found = [module.augmentation for module in run.encoder.modules() if isinstance(module, AugmentedRope)]
    return found[0] if found else None


def rope_periods(encoder: nn.Module) -> list[float]:
    """The shortest and the longest."""
    (periods,) = (buffer for name, buffer in encoder.named_buffers() if name.endswith("periods"))
    return [periods[0].item(), periods[-1].item()]


def gram(name: str) -> Callable[[Resolved], object]:
    """A setting of Gram anchoring."""
    return lambda run: plain(getattr(run.method.anchor.settings, name)) if run.method.anchor else "none"  # type: ignore[union-attr]


def drop_paths(run: Resolved) -> list[float]:
    """Rate of the first and of the last block."""
    rates = [max((p.drop_prob for p in block.modules() if isinstance(p, KeyedDropPath)), default=0.0) for block in blocks_of(run.encoder)]
    return [rates[0], rates[-1]]


def shape(run: Resolved) -> dict[str, object]:
    """Depth, width, heads and so on of the encoder."""
    block = blocks_of(run.encoder)[0]
    linear = [layer for name, layer in block.named_modules() if "mlp" in name and isinstance(layer, nn.Linear)]
    attention = block.get_submodule("attn")
    hidden = linear[-1].in_features
    return {
        "width": run.encoder.embed_dim,
        "depth": len(blocks_of(run.encoder)),
        "heads": attention.num_heads,
        "hidden": hidden,
        "gated": linear[0].out_features != hidden or len(linear) == 3,
    }


def prototypes(run: Resolved) -> list[Prototypes]:
    """Those of the student's heads, in order."""
    return [module for module in run.method.student.modules() if isinstance(module, Prototypes)]


def views(specs: object) -> list[dict[str, object]]:
    """What differs between views: size, number, scale, blur and so on."""
    names = {
        ViewSpec: ("size", "count", "scale", "blur_prob", "solarize_prob"),
        SoundViewSpec: ("frames", "mix_prob", "time_mask", "frequency_mask"),
        PointViewSpec: ("points", "count", "keep", "scale", "translation", "jitter", "jitter_limit", "sampling"),
    }
    return [{name: getattr(spec, name) for name in names[type(spec)]} for spec in specs]  # type: ignore[union-attr]


def drawn_sizes(run: Resolved) -> list[dict[str, object]]:
    """The sizes that views may have in a step, with their shares of the steps."""
    assert isinstance(run.views, MultiCrop)
    rest = 1.0 - sum(sizes.share for sizes in run.views.other_sizes)
    shares = [rest, *(sizes.share for sizes in run.views.other_sizes)]
    sides = [{name: shape[-1] for name, (_, shape) in maker.groups(3).items()} for maker in run.views.of_each_size()]
    return [{"share": share, **one} for share, one in zip(shares, sides, strict=True)]


def shared(values: Iterable[object]) -> object:
    """The one value that all of these are."""
    (found,) = set(values)
    return found


def colours(run: Resolved) -> dict[str, object]:
    """The settings that all views share."""
    assert isinstance(run.views, MultiCrop)
    names = ("brightness", "contrast", "saturation", "hue", "jitter_prob", "grayscale_prob", "flip", "ratio", "blur_sigma", "interpolation")
    every = [{name: plain(getattr(spec, name)) for name in names} for spec in (*run.views.global_views, *run.views.local_views)]
    assert all(one == every[0] for one in every)
    return every[0]


def neighbours(among: KoLeoAmong) -> str:
    """Where KoLeo looks for the nearest item."""
    return f"groups of {among}" if isinstance(among, int) else {"process": "a process", "joint": "the joint batch"}[among]


def hidden(run: Resolved, num_tokens: int) -> list[int]:
    """Smallest and largest number of hidden tokens in 64 items."""
    keys = item_keys(seed=0, epoch=0, index=torch.arange(64))
    side = math.isqrt(num_tokens)
    grid = (num_tokens,) if isinstance(run.encoder, PointTransformer) else (side, side)
    if isinstance(run.mask, RegionMask):
        mask = run.mask(keys, grid, regions=torch.arange(224 * 224).view(1, 224, 224).expand(64, -1, -1) * 11 // (224 * 224)).mask
    else:
        assert run.mask is not None
        mask = run.mask(keys, grid)
    counts = mask.sum(dim=1)
    return [int(counts.min()), int(counts.max())]


def start_of(weight: Tensor) -> str:
    """The distribution that initial weights look like."""
    spread, bound = float(weight.std()), float(weight.abs().max())
    if weight.ndim == 3 and torch.allclose(weight[0, -1].square().sum(), torch.tensor(weight.shape[2] / 2.0)):
        return "sine and cosine"  # as many squared sines as cosines of the same angles
    matrix = weight.flatten(1) if weight.ndim > 1 else weight.unsqueeze(0)
    xavier = math.sqrt(6.0 / sum(matrix.shape)) if weight.ndim in (2, 4) else math.nan
    for name, limit, expected in (
        ("zero", 0.0, 0.0),
        ("normal, 0.02", math.inf, 0.02),
        ("normal, 1e-6", math.inf, 1e-6),
        ("Xavier", xavier, xavier / math.sqrt(3.0)),
        ("torch's for linear layers", (uniform := 1.0 / math.sqrt(matrix.shape[1])), uniform / math.sqrt(3.0)),
    ):
        # 384 numbers of a token have a standard deviation within 12 % of the true one (three standard errors).
        if bound <= limit * 1.0001 and abs(spread - expected) <= expected * (0.12 if weight.numel() < 10_000 else 0.02):
            return name
    return f"standard deviation {spread:.2g}"


def initial(*ending: str) -> Callable[[Resolved], object]:
    """How the one parameter of the encoder whose name ends so starts."""

    def read(run: Resolved) -> object:
        encoder = run.one_block.encoder  # type: ignore[union-attr]
        (found,) = {start_of(p.detach()) for name, p in encoder.named_parameters() if name.endswith(ending)}
        return found

    return read


def start_of_mask_token(run: Resolved) -> str:
    """The encoder's, or else that of the decoder, which may be the only one."""
    (token,) = (p for name, p in run.one_block.student.named_parameters() if name.endswith("mask_token"))  # type: ignore[union-attr]
    return start_of(token.detach())


def start_of_decoder(run: Resolved) -> str:
    """That of all its matrices, which must be one."""
    (decoder,) = (m for m in run.one_block.student.heads.values())  # type: ignore[union-attr]
    (found,) = {start_of(p.detach()) for name, p in decoder.named_parameters() if p.ndim == 2}
    return found


def plain(value: object) -> object:
    """Numbers to six digits, tuples as lists: what yaml holds."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return value


def clipping(run: Resolved) -> str:
    """Mode, and norms at the beginning and at the end."""
    clip = run.optimization.clip
    if clip is None:
        return "none"
    norms = [clip.max_norm(at) if callable(clip.max_norm) else clip.max_norm for at in (0.0, 1.0)]
    return f"{clip.mode}, {norms[0]:g}" + (f" to {norms[1]:g}" if norms[0] != norms[1] else "")


def temperatures(name: str) -> Callable[[Resolved], object]:
    """A schedule of the method at its start, at the end of its warm-up, and at the end."""

    def read(run: Resolved) -> object:
        schedule = getattr(run.method, name)
        return [schedule(at) for at in (0.0, schedule.warmup, 1.0)]

    return read


def attribute(path: str) -> Callable[[Resolved], object]:
    """What lies at a dotted path below the method."""

    def read(run: Resolved) -> object:
        value: object = run.method
        for name in path.split("."):
            value = getattr(value, name)
        return value

    return read


def widths(name: str) -> Callable[[Resolved], object]:
    """Widths of the projection of one head of the student, from the input on."""

    def read(run: Resolved) -> object:
        linear = [layer for layer in run.method.student.heads[name].modules() if isinstance(layer, nn.Linear)]
        return [linear[0].in_features, *(layer.out_features for layer in linear)]

    return read


def arguments(*names: str) -> Callable[[Resolved], object]:
    """What the recipe gives the method."""
    return lambda run: {name: run.settings["model"]["init_args"][name] for name in names}


STRONG = ("num_ops", "magnitude", "magnitude_std", "op_prob", "erase_prob")

# Field by field: how the value is read from what was built. A row of published.yaml names one of these.
FIELDS: dict[str, Callable[[Resolved], object]] = {
    # length and batch
    "length": lambda run: run.during(1.0),
    "items in a step": lambda run: run.batch,
    "precision": lambda run: run.settings["trainer"]["precision"],
    # rates and decay
    "learning rate after its warm-up": lambda run: max(rate for rate, _ in run.groups(run.optimization.lr.warmup).values()),
    "learning rate at the start": lambda run: max(rate for rate, _ in run.groups(0.0).values()),
    "learning rate at the end": lambda run: max(rate for rate, _ in run.groups(1.0).values()),
    "rise of the learning rate": lambda run: run.during(run.optimization.lr.length or 0.0),
    "warm-up of the learning rate": lambda run: run.during(run.optimization.lr.warmup),
    "weight decay, start and end": lambda run: [run.decay(0.0), run.decay(1.0)],
    "momenta of AdamW": lambda run: list(run.optimizer.param_groups[0]["betas"]),
    "epsilon of AdamW": lambda run: run.optimizer.param_groups[0]["eps"],
    "rate of the patch embedding": lambda run: run.factor("patch_embed.proj.weight"),
    "rate of the first block": lambda run: run.factor("blocks.0.norm1.weight"),
    "rate of the last block": lambda run: run.factor(f"blocks.{len(blocks_of(run.encoder)) - 1}.norm1.weight"),
    "rate of the class token": lambda run: run.factor("cls_token"),
    "rate of the positions": lambda run: run.factor("pos_embed"),
    "rate of the mask token": lambda run: run.factor("mask_token"),
    "rate of the final norm": lambda run: run.factor("model.norm.weight"),
    "biases decay": lambda run: run.decays("norm1.bias"),
    "norms decay": lambda run: run.decays("norm1.weight"),
    "class token decays": lambda run: run.decays("cls_token"),
    "positions decay": lambda run: run.decays("pos_embed"),
    "mask token decays": lambda run: run.decays("mask_token"),
    "clipping": clipping,
    "prototypes are frozen by": lambda run: {"rate": "a rate of 0", "gradient": "no gradient"}[run.optimization.freeze_by],
    "modules that are not clipped": lambda run: list(run.optimization.clip.skip),  # type: ignore[union-attr]
    "prototypes are frozen": lambda run: run.during(run.optimization.freeze_prototypes),
    # teacher and targets
    "momentum of the teacher, start and end": lambda run: [run.method.momentum(0.0), run.method.momentum(1.0)],  # type: ignore[misc]
    "teacher temperature, start, after its warm-up, end": temperatures("teacher_temp"),
    "teacher temperature of cls, start, after its warm-up, end": temperatures("cls_teacher_temp"),
    "teacher temperature of patches, start, after its warm-up, end": temperatures("patch_teacher_temp"),
    "warm-up of the teacher temperature": lambda run: run.during(run.method.teacher_temp.warmup),  # type: ignore[union-attr, operator]
    "warm-up of the teacher temperature of cls": lambda run: run.during(run.method.cls_teacher_temp.warmup),  # type: ignore[union-attr, operator]
    "warm-up of the teacher temperature of patches": lambda run: run.during(run.method.patch_teacher_temp.warmup),  # type: ignore[union-attr, operator]
    "student temperature": attribute("cls_objective.student_temp"),
    "student temperature of the group": attribute("group_objective.student_temp"),
    "temperature of the contrasts": attribute("instance_objective.temp"),
    "momentum of the centre": attribute("cls_objective.centre_state.momentum"),
    "momentum of the centre of patches": attribute("patch_objective.centre_state.momentum"),
    "momentum of the centre of the group": attribute("group_objective.centre_state.momentum"),
    "iterations of Sinkhorn-Knopp": attribute("cls_objective.sinkhorn_iterations"),
    "weights of the terms": attribute("weights"),
    # heads
    "prototypes": lambda run: [len(module.directions) for module in prototypes(run)],
    "last layers of heads": lambda run: shared("linear" if module.gain is None else "weight norm" for module in prototypes(run)),
    "gain of prototypes learns": lambda run: prototypes(run)[0].gain.requires_grad,
    "widths of the head": widths("cls"),
    "widths of the projection": widths("projection"),
    "widths of the shared head": widths("shared"),
    "widths of the patch head": widths("patch"),
    "widths of the instance head": widths("instance"),
    "widths of the group head": widths("group"),
    "rows of the queues": lambda run: len(run.method.instance_objective.queue.rows),  # type: ignore[union-attr, operator]
    "rows of the memories": lambda run: len(run.method.student_memory.rows),  # type: ignore[union-attr, operator]
    "neighbours": attribute("num_neighbours"),
    # Gram anchoring
    "Gram anchoring starts": lambda run: run.during(run.method.anchor.settings.start) if run.method.anchor else "never",
    "ramp of the Gram weight": lambda run: run.during(run.method.anchor.settings.ramp),  # type: ignore[union-attr]
    "Gram weight after its ramp": lambda run: run.method.weights_at(1.0)["gram"],
    "Gram anchor is renewed": lambda run: [run.during(share) for share in run.method.anchor.settings.refresh_at],  # type: ignore[union-attr]
    "level of the Gram matrices": gram("level"),
    "tokens of the Gram matrices": gram("tokens"),
    "negatives of the Gram matrices": gram("negatives"),
    "Gram matrices are of cosines": gram("normalise"),
    "antialias of the anchor's tokens": gram("antialias"),
    "size of the anchor's crops": lambda run: shared(spec.size for spec in run.views.clean_views),  # type: ignore[union-attr]
    "weight of local views, start and end": lambda run: [run.method.local_weight(0.0), run.method.local_weight(1.0)],  # type: ignore[misc, operator]
    "fall of the weight of local views": lambda run: [
        run.during(run.method.local_weight.warmup),  # type: ignore[union-attr, operator]
        run.during(run.method.local_weight.length or 0.0),  # type: ignore[union-attr, operator]
    ],
    # encoder
    "encoder": shape,
    "patch size": lambda run: list(run.encoder.card.patch_size),
    "epsilon of norms": lambda run: blocks_of(run.encoder)[0].get_submodule("norm1").eps,
    "layer scale": layer_scale,
    "register tokens": lambda run: run.encoder.num_prefix_tokens - 1,  # type: ignore[union-attr, operator]
    "bias of queries, keys and values": qkv_bias,
    "norm of local class tokens": lambda run: "common" if run.encoder.local_norm is None else "its own",  # type: ignore[union-attr,operator]
    "rescaling of rotary positions": lambda run: rope_augmentation(run).rescale if rope_augmentation(run) else "none",
    "shift and jitter of rotary positions": lambda run: (
        [rope_augmentation(run).shift, rope_augmentation(run).jitter] if rope_augmentation(run) else [None, None]
    ),
    "periods of rotary positions, first and last": lambda run: rope_periods(run.one_block.encoder),  # type: ignore[union-attr]
    "drop path of the first and the last block": drop_paths,
    "positions are resized as": attribute("encoder.position_resize"),
    "positions learn": lambda run: any(name.endswith("pos_embed") for name in run.groups(0.5)),
    "mean and standard deviation": lambda run: [run.encoder.card.mean, run.encoder.card.std],
    "start of attention": initial("attn.qkv.weight"),
    "start of the hidden layer": initial("mlp.fc1.weight", "mlp.w12.weight", "mlp.fc1_g.weight"),
    "start of the class token": initial("cls_token"),
    "start of the positions": initial("pos_embed"),
    "start of the patch embedding": initial("patch_embed.proj.weight"),
    "start of the mask token": start_of_mask_token,
    "start of the decoder": start_of_decoder,
    "epsilon of norms of the decoder": lambda run: next(m.eps for m in run.decoder.modules() if isinstance(m, nn.LayerNorm)),
    "positions of the decoder of representations": lambda run: run.settings["model"]["init_args"].get("rep_positions", "none"),
    # decoders
    "decoder": arguments("decoder_dim", "decoder_depth", "decoder_heads"),
    "decoder of points": arguments("decoder_depth", "decoder_heads", "decoder_drop_path_rate"),
    "decoder of representations": arguments("rep_depth", "rep_heads", "hidden_dim", "projection_dim"),
    "targets are normalised": attribute("objective.normalise"),
    "group size": attribute("encoder.group_size"),
    "groups": lambda run: run.encoder.grid(run.encoder.card.item_shape)[0],
    # views
    "sizes that are drawn for a step": drawn_sizes,
    "global views": lambda run: views(run.views.global_views),
    "local views": lambda run: views(run.views.local_views),
    "student views": lambda run: views(run.views.student_views),  # type: ignore[union-attr]
    "coarse views": lambda run: views(run.views.coarse_views),  # type: ignore[union-attr]
    "flips": lambda run: run.views.global_views[0].flip,  # type: ignore[union-attr]
    "share of strong views": lambda run: next(spec.strong.prob for spec in run.views.student_views),  # type: ignore[union-attr]
    "strong augmentation": lambda run: {name: getattr(run.views.local_views[0].strong, name) for name in STRONG},  # type: ignore[union-attr]
    "points of an item": lambda run: run.views.num_points,
    "taps of the blur": lambda run: shared(
        spec.blur_taps for spec in run.views.global_views + run.views.local_views if spec.blur_prob > 0.0
    ),  # type: ignore[union-attr,operator]
    "colours and crops": colours,
    "bins of the filterbank": lambda run: run.views.num_bins,  # type: ignore[union-attr]
    # groups of inputs that are replaced
    "share that is replaced by zeros": lambda run: run.corruption.ratio,  # type: ignore[union-attr]
    "share that is replaced by another item": lambda run: run.corruption.replace_ratio,  # type: ignore[union-attr]
    "items that show another item": lambda run: run.corruption.replace_prob,  # type: ignore[union-attr]
    "largest side of a block": lambda run: run.corruption.max_side,  # type: ignore[union-attr]
    "blocks are aligned to": lambda run: run.corruption.align,  # type: ignore[union-attr]
    # masks, and terms that compare items
    "neighbours of KoLeo are in": lambda run: neighbours(run.method.koleo_objective.among),  # type: ignore[union-attr,arg-type]
    "items that share a covered region": lambda run: run.mask.region_per,  # type: ignore[union-attr]
    "hidden of 196 tokens": lambda run: hidden(run, 196),
    "hidden of 64 groups": lambda run: hidden(run, 64),
    "ratios of blocks": lambda run: run.mask.ratios,  # type: ignore[union-attr]
    "share of masked views": lambda run: run.mask.prob,  # type: ignore[union-attr]
    "ratio of blocks": lambda run: run.mask.ratio,  # type: ignore[union-attr]
    "which views are masked": lambda run: "an exact share of a batch" if isinstance(run.mask, DINOv3Mask) else "drawn view by view",
}


def differs(text: str) -> str:
    """What a recipe's header says behind `Differs:`, in one line."""
    header = "\n".join(line.removeprefix("# ").rstrip() for line in text.splitlines() if line.startswith("#"))
    found = re.search(r"^Differs: +(.*?)(?=^\w[\w ]*: |\Z)", header, re.MULTILINE | re.DOTALL)
    return "" if found is None else " ".join(found[1].split())


def compared(name: str, rows: Mapping[str, Mapping]) -> list[tuple[str, object, object, Mapping]]:
    """Field, official value, ours, and the row of published.yaml, for one recipe."""
    run = Resolved(PAPER / f"{name}.yaml")
    return [(field, plain(row["value"]), plain(FIELDS[field](run)), row) for field, row in rows.items()]


def shown(value: object) -> str:
    """A value in one line, as yaml writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items())
    if isinstance(value, list):
        inner = [shown(one) for one in value]
        return "; ".join(inner) if value and isinstance(value[0], Mapping) else f"[{', '.join(inner)}]"
    return {True: "yes", False: "no", None: "none"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


_HEADER = """# Published settings: official and ours

`tests/published_settings.py` writes this table: what is built from each recipe of `recipes/paper/`, beside the value in the authors' code.
Ours is in bold where it differs; the recipe's header names the difference behind `Differs:`, or the last column says why it changes no
result.
`tests/test_published_settings.py` compares the values again and checks that this page is up to date. The official values are in
`tests/golden/published.yaml`.

"""


def table() -> str:
    """The content of docs/published.md."""
    repositories, recipes = official()
    lines = [_HEADER]
    for name, recipe in recipes.items():
        source = repositories[recipe["repository"]]
        rows = compared(name, recipe["fields"])
        same = sum(value == ours for _, value, ours, _ in rows)
        lines.append(f"## {name}\n\n{source['url']} at {source['commit'][:7]}; {same} of {len(rows)} values are equal. ")
        lines.append(f"Differs: {differs((PAPER / f'{name}.yaml').read_text())}\n\n")
        lines.append("| field | official | ours | where |\n|---|---|---|---|\n")
        for field, value, ours, row in rows:
            own = shown(ours) if ours == value else f"**{shown(ours)}**"
            note = f"; {row['harmless']}" if "harmless" in row else ""
            lines.append(f"| {field} | {shown(value)} | {own} | {row['at']}{note} |\n")
        lines.append("\n")
    return "".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
    print(f"{TABLE}: {len(official()[1])} recipes")
