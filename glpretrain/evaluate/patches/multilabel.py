"""Which classes appear in a patch: a linear layer, and a small transformer over all patches, tell it from frozen features.

The protocol is that of locality alignment (Covert et al. 2024; iancovert/patch-seg at fc14f36: patchseg/model.py, patchseg/loss.py and
scripts/train.py, labels `union`): every class that a pixel of a patch shows is a label of this patch, the loss is a binary
cross-entropy, and the score is the macro recall at a probability of 0.5. The linear layer tells what is in the embedding of a patch itself;
the transformer may look for it in all the others. A high recall can be had by saying yes to everything, so F1 stands beside it.

Ours: features are standardised by the training patches, and those of the class token and of registers are left out; pixels without a class
count for nothing, and neither do patches that show no other; the heads after the last step are scored, where the official code takes
the best of its epochs by the score itself; the number of steps is set, not that of epochs. Labels of whole images are left out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.plain_blocks import BlockShape, block_shape, plain_blocks
from glpretrain.evaluate.base import Evaluator, Result, Score, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import bootstrap_interval, interval_score
from glpretrain.evaluate.patches.segmentation import class_shares, image_patches
from glpretrain.evaluate.probes import standardiser
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import Rows

_SAMPLE_SEED, _BATCH_SEED, _WEIGHT_SEED = 73, 74, 75
_LAYER_SCALE = 0.01


class PatchTransformer(nn.Module):
    """Two (or `depth`) blocks over the patches of an image, and a logit of every class for each patch.

    Args:
        dim: width D of the patches.
        num_patches: number of patches N.
        num_classes: number of classes C.
        num_heads: attention heads of a block.
        depth: number of blocks.
    """

    def __init__(self, dim: int, *, num_patches: int, num_classes: int, num_heads: int, depth: int = 2) -> None:
        super().__init__()
        shape = BlockShape(num_heads, qkv_bias=False)
        self.position = nn.Parameter(torch.randn(num_patches, dim) * 0.02)
        self.norm_pre = nn.LayerNorm(dim)
        self.blocks = plain_blocks(dim, shape=shape, depth=depth, layer_scale=_LAYER_SCALE)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Float[B N C] of Float[B N D]."""
        return self.head(self.norm(self.blocks(self.norm_pre(patches + self.position))))


@dataclass(frozen=True, kw_only=True)
class PatchMultilabel(Evaluator):
    """Which classes of `masked` appear in a patch: `recall_linear` and `recall_transformer`, means over the classes of the share of their
    patches in which they are found; and `f1_linear` and `f1_transformer`, in which wrong findings count too.

    The heads are fitted on `masked_train`.

    Args:
        num_steps: number of AdamW's steps.
        images_per_step: number of images that are drawn for a step.
        learning_rate: learning rate after the warm-up, which falls to `end_learning_rate` along a cosine.
        end_learning_rate: learning rate at the end.
        warmup: share of the steps in which the learning rate rises from 0.
        weight_decay: weight decay of AdamW, of all parameters.
        depth: number of blocks of the transformer.
        threshold: probability from which a class counts as found.
        max_patches: number of patches, of whole images, that the heads are fitted on at most; the images are drawn pseudo-randomly and are
            always the same.
    """

    headlines = ("recall_linear", "recall_transformer")
    scored = "masked"
    needs = ("masked_train", "masked")
    truth = "mask_classes"
    modality = "image"
    unused = ("crop",)

    num_steps: int = 1000
    images_per_step: int = 32
    learning_rate: float = 1e-3
    end_learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    depth: int = 2
    threshold: float = 0.5
    max_patches: int = 250_000

    def validate(self) -> None:
        for name in ("num_steps", "images_per_step", "learning_rate", "end_learning_rate", "depth", "max_patches"):
            require_positive(name, vars(self)[name])
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup: {self.warmup}; accepted: a share of the steps in [0, 1)")
        if self.weight_decay < 0.0:
            raise ValueError(f"weight_decay: {self.weight_decay}; accepted: numbers from 0")
        require_share("threshold", self.threshold)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        tokens, labels, known = self._taught(encoder, sources["masked_train"], cache)
        standardised = standardiser(tokens)
        tokens, num_classes = standardised(tokens), labels.shape[2]
        num_patches, dim = tokens.shape[1:]
        sizes = {"num_patches": num_patches, "num_classes": num_classes, "num_heads": block_shape(encoder).num_heads}
        made: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(dim, num_classes),
            "transformer": lambda: PatchTransformer(dim, depth=self.depth, **sizes),
        }
        device = device_of(encoder)
        heads = {name: self._fitted(make, tokens, labels, known, device=device) for name, make in made.items()}
        items = sources["masked"]
        found = {name: Rows(len(items)) for name in heads}
        for batch, patches in image_patches(encoder, items, features=self.features, cache=cache):
            truth, counts = self._labels(batch.class_masks(), encoder=encoder, num_classes=num_classes)
            queries = standardised(patches).to(device)
            for name, head in heads.items():
                with torch.no_grad():
                    predicted = (head(queries).sigmoid() > self.threshold).cpu()
                found[name].add(outcomes(predicted, truth, known=counts))
        scores: dict[str, Score] = {}
        for name, rows in found.items():
            scores |= multilabel_scores(*rows.tensors(1), head=name)
        return Result(scores, {})

    def num_bytes(self, dim: int, counts: Mapping[str, int]) -> int:
        """See `Evaluator`; of patches as they are and standardised."""
        return 2 * 4 * dim * self.max_patches

    def _labels(self, masks: Tensor, *, encoder: Encoder, num_classes: int) -> tuple[Tensor, Tensor]:
        """Bool[B N C], which classes each patch shows, and Bool[B N], whether it shows any, of Int[B H W]."""
        labels = class_shares(masks, grid=self.features.image_grid(encoder), num_classes=num_classes) > 0
        return labels, labels.any(dim=2)

    def _taught(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Float[B N D], Bool[B N C] and Bool[B N]: patches of training images, their labels, and which of them have one."""
        rows, columns = self.features.image_grid(encoder)
        at_most = max(1, self.max_patches // (rows * columns))
        if at_most < len(items):
            order = keys.permutation(torch.tensor(_SAMPLE_SEED), len(items))[:at_most]
            items = items.some([items.indices[position] for position in order.tolist()])
        seen, num_classes = Rows(len(items)), len(items.source.mask_classes)
        for batch, patches in image_patches(encoder, items, features=self.features, cache=cache):
            seen.add(batch.index, patches, *self._labels(batch.class_masks(), encoder=encoder, num_classes=num_classes))
        index, tokens, labels, known = seen.tensors(4)
        if len(index) == 0 or not known.any():
            raise ValueError("masked_train: no pixel has a class; at least one is needed")
        order = index.argsort()  # whatever the order in which they were read
        return tokens[order], labels[order], known[order]

    def _fitted(self, make: Callable[[], nn.Module], tokens: Tensor, labels: Tensor, known: Tensor, *, device: torch.device) -> nn.Module:
        """A head after its last step; arguments as `_taught` gives them. The random numbers of the caller do not move."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(_WEIGHT_SEED)
            head = make().to(device)
            optimizer = torch.optim.AdamW(head.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
            for step in tracked(range(self.num_steps), total=self.num_steps, description="fitting heads on patches"):
                key = keys.item_keys(seed=_BATCH_SEED, epoch=0, index=torch.tensor(step))
                drawn = keys.integers(key, 0, len(tokens), min(self.images_per_step, len(tokens)))
                counts = known[drawn].to(device)
                logits, targets = head(tokens[drawn].to(device)), labels[drawn].to(device, tokens.dtype)
                errors = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=2)  # [M N]
                loss = (errors * counts).sum() / counts.sum().clamp(min=1)
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return head.eval().requires_grad_(False)

    def _rate(self, step: int) -> float:
        warmup = self.warmup * self.num_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / (self.num_steps - warmup)
        return self.end_learning_rate + (self.learning_rate - self.end_learning_rate) * (1 + math.cos(math.pi * done)) / 2


def outcomes(predicted: Tensor, truth: Tensor, *, known: Tensor) -> Tensor:
    """Float64[B 3 C]: for each image the patches in which a class is found and there, is there, and is found.

    Args:
        predicted: Bool[B N C].
        truth: Bool[B N C].
        known: Bool[B N], patches that count.
    """
    counted = known.unsqueeze(2)
    parts = (predicted & truth & counted, truth & counted, predicted & counted)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1).double()


def macro_recall(summed: Tensor) -> Tensor:
    """Float64[*S] of sums of `outcomes`, Float64[*S 3 C]: the mean over the classes that are there of the share of their patches found."""
    right, there, _ = summed.unbind(dim=-2)
    return torch.where(there > 0, right / there, torch.nan).nanmean(dim=-1)


def macro_f1(summed: Tensor) -> Tensor:
    """Float64[*S] of Float64[*S 3 C]: the mean over the classes that are there of the harmonic mean of recall and precision."""
    right, there, predicted = summed.unbind(dim=-2)
    return torch.where(there > 0, 2 * right / (there + predicted), torch.nan).nanmean(dim=-1)


def multilabel_scores(per_image: Tensor, *, head: str) -> dict[str, Score]:
    """`recall_<head>` and `f1_<head>` in percent; intervals by bootstrap over images, since patches of one image are not independent.

    Args:
        per_image: Float64[B 3 C], `outcomes` of each image.
        head: name of the head.

    Raises:
        ValueError: no image has a patch that counts.
    """
    per_image = per_image[per_image[:, 1].sum(dim=-1) > 0]
    if len(per_image) == 0:
        raise ValueError("masked: no image has a pixel with a class; at least one is needed")
    summed, count = per_image.sum(dim=0), len(per_image)
    return {
        f"{name}_{head}": interval_score(100 * statistic(summed).item(), 100 * bootstrap_interval(statistic, per_image), count=count)
        for name, statistic in (("recall", macro_recall), ("f1", macro_f1))
    }
