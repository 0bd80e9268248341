"""Single-object discovery with LOST: one box per image from the similarities of its patches, without any label.

Protocol: Simeoni et al., "Localizing objects with self-supervised transformers and no labels", BMVC 2021, and github.com/valeoai/LOST.
The seed is the patch that is positively similar to the fewest others (objects cover less than the ground); of the k patches of lowest
degree, those similar to the seed expand it; the object is the connected component, around the seed, of the patches that are similar to
these on balance. CorLoc is the share of images whose box has an IoU of at least 0.5 with a true one (as in the official code; the
paper says more than 0.5). Patches of equal degree are taken in their order, which the official code leaves to the sort. Images that
show no object are left out.

LOST reads the keys of the last attention of a ViT, as they are. For any encoder there are the patches after the final norm, less
their mean over the image, which is ours: all patches of an image share a large part, every similarity is then positive, and the box
would be the whole image. What that box scores is reported beside, since objects that fill the picture are met by it.
Several objects per image and detectors trained on the boxes are left out on purpose.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from scipy import ndimage
from torch import Tensor

from glpretrain.encoders.attention import attention_keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import evaluating, normalised
from glpretrain.evaluate.figures import boxes_figure, shown_positions
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import mean_score, rate_score
from glpretrain.evaluate.patches.segmentation import checked_patches, with_objects
from glpretrain.evaluate.reading import ItemBatch


class _Found(NamedTuple):
    """The box of one image, as left, top, right, bottom in pixels, the last two exclusive."""

    image: Tensor  # UInt8[C H W]
    box: Tensor  # Int[4]
    true: Tensor  # Int[M 4]
    iou: float  # with the true box that it covers best


@dataclass(frozen=True, kw_only=True)
class ObjectDiscovery(Evaluator):
    """`corloc`: share of the images of `masked` whose box meets a true one, in percent; `iou`: mean IoU with the best-met one.

    `corloc_whole`: what the box of the whole image would score, for comparison.

    Args:
        tokens: "patches" after the final norm, less their mean over the image, or "keys" of the layer's attention (LOST's own; a ViT
            is needed, nothing is cached).
        k_patches: how many patches of lowest degree may expand the seed; LOST's 100 is for grids of some 30 x 30.
    """

    headlines = ("corloc", "corloc_whole")
    scored = "masked"
    needs = ("masked",)
    truth = "masks"
    modality = "image"
    unused = ("bf16", "tokens", "crop")

    tokens: Literal["patches", "keys"] = "patches"
    k_patches: int = 100

    def validate(self) -> None:
        if self.tokens not in ("patches", "keys"):
            raise ValueError(f"tokens: {self.tokens!r}; accepted: 'patches', 'keys'")
        require_positive("k_patches", self.k_patches)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        items, (_, height, width) = sources["masked"], self.features.shape(encoder)
        best: list[tuple[float, float]] = []  # a number is kept of each image, not the image
        for found in self._discover(encoder, items, cache):
            best.append((found.iou, box_iou(torch.tensor([0, 0, width, height]), found.true).max().item()))
        if not best:
            raise ValueError(f"source {items.name!r}: no image shows an object; at least one is needed")
        iou, whole = torch.tensor(best, dtype=torch.float64).unbind(dim=1)
        hits, whole_hits = (rate_score((values >= 0.5).double()) for values in (iou, whole))
        return Result({"corloc": hits, "iou": mean_score(iou), "corloc_whole": whole_hits}, chosen={})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`boxes`: a few images with the box that was found and the true ones."""
        items = sources["masked"]
        options = {"resize": "stretch", "batch_size": self.features.batch_size}
        indices = with_objects(items.batches(self.features.shape(encoder), **options))
        shown = items.some([indices[position] for position in shown_positions(len(indices))])
        images, boxes, true, iou = zip(*self._discover(encoder, shown, cache), strict=True)
        return {"boxes": boxes_figure(images, found=boxes, true=true, titles=[f"IoU {100 * value:.0f} %" for value in iou])}

    def _discover(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> Iterator[_Found]:
        """The boxes of the images that show an object."""
        (_, height, width), grid = self.features.shape(encoder), self.features.image_grid(encoder)
        step = torch.tensor([width / grid[1], height / grid[0]] * 2)
        for batch, found in self._tokens(encoder, items, cache):
            patches = checked_patches(found, batch.index, count=grid[0] * grid[1], encoder=encoder, items=items)
            for image, instances, tokens in zip(batch.items, batch.instance_masks(), patches, strict=True):
                true = object_boxes(instances)
                if len(true):
                    box = (lost_box(tokens, grid=grid, k_patches=self.k_patches) * step).round().long()
                    yield _Found(image, box, true, box_iou(box, true).max().item())

    def _tokens(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> Iterator[tuple[ItemBatch, Tensor]]:
        """Each batch with Float[B N D]."""
        if self.tokens == "patches":
            for batch, output in self.features.encode(encoder, items, resize="stretch", cache=cache, is_looked_at=True):
                yield batch, output.patches - output.patches.mean(dim=1, keepdim=True)
            return
        for batch in self.features.batches(encoder, items, resize="stretch", description="keys on"):
            with evaluating(encoder):
                found = attention_keys(encoder, normalised(batch.items, encoder), block=self.features.layer).cpu()
            yield batch, found


def lost_box(patches: Tensor, *, grid: tuple[int, int], k_patches: int) -> Tensor:
    """Int[4]: the box of LOST in patches, as left, top, right, bottom, the last two exclusive.

    Args:
        patches: Float[N D], the patches of one image.
        grid: patches along height and width.
        k_patches: candidates for the expansion of the seed; all patches where there are fewer.
    """
    similarity = patches @ patches.T  # [N N]
    positive = similarity > 0
    degree = positive.sum(dim=1) - positive.diagonal().long()  # [N]
    lowest = degree.argsort(stable=True)[:k_patches]
    seed = int(lowest[0])
    expansion = lowest[positive[seed, lowest]]
    segment = similarity[expansion].sum(dim=0) > 0  # [N]
    segment[seed] = True  # it is, unless its features are all zero
    components, _ = ndimage.label(segment.unflatten(0, grid).numpy())  # pyright: ignore[reportGeneralTypeIssues] - a pair without `output`
    row, column = divmod(seed, grid[1])
    return _box_of(torch.from_numpy(components == components[row, column]))


def object_boxes(instances: Tensor) -> Tensor:
    """The box of each object of Int[H W], Int[M 4]."""
    boxes = [_box_of(instances == identity) for identity in instances[instances > 0].unique()]
    return torch.stack(boxes) if boxes else torch.empty(0, 4, dtype=torch.int64)


def box_iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of Int[4] with each of Int[M 4], Float64[M]."""
    overlap = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])  # [M 2]
    shared = overlap.clamp_min(0).prod(dim=1).double()
    return shared / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(dim=1) - shared)


def _box_of(mask: Tensor) -> Tensor:
    """Int[4] of Bool[H W], not empty."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
