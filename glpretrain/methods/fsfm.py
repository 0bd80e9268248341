"""FSFM: reconstruct a face with one region hidden completely, and match the features of the whole face from the visible part.

Idea: the mask (`masking.CRFRPMask`) covers one region of the face completely and hides the same share of each other region, so that
reconstruction needs relations within and between regions. Two terms reconstruct pixels (of all hidden patches, and again of those in
the covered region); one makes the student's feature of the visible part similar to the momentum target's feature of the whole face.
Paper: Wang et al., "FSFM: a generalizable face security foundation model via self-supervised facial representation learning", CVPR 2025.
Reference code: wolo-wolo/FSFM-CVPR25 at 986aaab (fsfm-3c/models_fsfm.py, util/loss_contrastive.py, pretrain/engine_pretrain.py).
Known differences: the target moves once per optimizer step, officially once per micro-batch (`momentum` to the power of the
micro-batches is the same pace); without a covered region in the batch its term is 0, officially NaN, and the batch is skipped;
several views of an item count as several items; the exported encoder is the target's, as everywhere here, while the official code
publishes both and fine-tunes the online one (`export --which student`). What is official only when it is asked for: fixed positions and
fresh weights of the encoder (`positions: sincos` and `initial: mae` of `ViT`), one covered region for each 256 faces (`region_per: 256`
of the mask), a joint norm for clipping and a mask token that decays (`optimization: {clip: {mode: joint}, mask_token: embedding}`).
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.patches import patchify
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.contrastive import InfoNCE, NegativeCosine
from glpretrain.objectives.reconstruction import PatchPixels
from glpretrain.training.branch import Branch
from glpretrain.training.decoders import RepresentationDecoder, RestoredDecoder, with_mask_tokens
from glpretrain.training.heads import LayerNormHead


class FSFM(Method):
    """A masked autoencoder of faces with a momentum target.

    Args:
        encoder: the trunk; it must be able to drop tokens.
        decoder_dim: width of the pixel decoder.
        decoder_depth: number of blocks of the pixel decoder.
        decoder_heads: attention heads in each block of the pixel decoder.
        rep_depth: number of blocks of the representation decoder, in front of the projector.
        rep_heads: attention heads in each block of the representation decoder.
        rep_positions: its position embedding, see `RepresentationDecoder`.
        hidden_dim: hidden width of the projector and the predictor.
        projection_dim: output width of the projector and the predictor.
        normalise_pixels: give every target patch mean 0 and variance 1.
        similarity: objective between student and target; None is `NegativeCosine`, the published choice. The official code also offers
            `InfoNCE` (temp 0.1), which contrasts items.
        weights: weights of the terms.
        momentum: momentum of the target's moving average, over progress.
        **kwargs: arguments of `Method`.
    """

    terms = ("pixels", "region", "similarity")
    uses: ClassVar = {"global": Uses(needs=("mask", "region_mask"))}

    def __init__(
        self,
        encoder: Encoder,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        rep_depth: int = 2,
        rep_heads: int = 16,
        rep_positions: Literal["none", "sincos"] = "none",
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        normalise_pixels: bool = True,
        similarity: NegativeCosine | InfoNCE | None = None,
        weights: dict[str, float] | None = None,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        encoder.require_keep()
        width = encoder.embed_dim
        channels, *_ = encoder.card.item_shape
        rows, columns = encoder.card.patch_size
        self.patch_size = (rows, columns)
        heads = {
            "rep": RepresentationDecoder(width, depth=rep_depth, num_heads=rep_heads, positions=rep_positions),
            "projector": LayerNormHead(width, hidden_dim=hidden_dim, out_dim=projection_dim),
        }
        weights = {"pixels": 1.0, "region": 0.007, "similarity": 0.1} if weights is None else weights
        super().__init__(Branch(encoder, heads), weights=weights, momentum=momentum, **kwargs)
        self.decoder = RestoredDecoder(
            width, patch_dim=rows * columns * channels, embed_dim=decoder_dim, depth=decoder_depth, num_heads=decoder_heads
        )
        self.predictor = LayerNormHead(projection_dim, hidden_dim=hidden_dim, out_dim=projection_dim)
        self.pixel_objective = PatchPixels(normalise=normalise_pixels)
        self.similarity_objective = NegativeCosine() if similarity is None else similarity
        # The number of patches in covered regions, which differs from item to item, divides their error.
        self.in_batch = ("region", "similarity") if isinstance(similarity, InfoNCE) else ("region",)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`pixels` of hidden patches, `region` of those in the covered region, `similarity` to the target that sees everything."""
        group = batch.views["global"]
        assert group.mask is not None and group.region_mask is not None
        num_global = len(group.items)
        views = group.items.flatten(0, 1)  # [(G B) C H W]
        mask, region_mask = group.mask.flatten(0, 1), group.region_mask.flatten(0, 1)  # [(G B) N]
        grid = self.encoder.grid(views.shape[1:])
        with torch.no_grad():
            seen = self.teacher_branch.encode(views)
            heads = self.teacher_branch.heads
            keys = heads["projector"](heads["rep"](seen.cls, seen.patches, grid=grid))  # [(G B) projection_dim]
        keep = group.visible_tokens()  # [(G B) M]
        output = self.student.encode(views, keep=keep, keys=group.keys)
        heads, rep = self.student.heads, self.student.heads["rep"]
        assert isinstance(rep, RepresentationDecoder)
        queries = self.predictor(heads["projector"](rep(output.cls, output.patches, grid=grid, keep=keep)))
        tokens = torch.cat([output.cls.unsqueeze(1), output.patches], dim=1)  # [(G B) 1+M D]
        tokens = with_mask_tokens(tokens, mask_token=rep.mask_token, keep=keep, num_tokens=mask.shape[1])  # [(G B) 1+N D]
        predictions = self.decoder(tokens, grid=grid)
        targets = patchify(views, patch_size=self.patch_size)
        terms = {
            "pixels": self.pixel_objective(predictions=predictions, targets=targets, mask=mask),
            "region": self.pixel_objective(predictions=predictions, targets=targets, mask=region_mask),
            "similarity": self.similarity_objective(queries=queries, keys=keys),
        }
        return {name: value.unflatten(0, (num_global, -1)).mean(dim=0) for name, value in terms.items()}
