"""MAE: encode a quarter of the patches, predict the pixels of the rest.

Idea: the encoder never sees hidden patches nor mask tokens, so it is cheap; a small decoder fills in.
Paper: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022.
Reference code: facebookresearch/mae at efb2a80 (models_mae.py, util/pos_embed.py, util/lr_sched.py).
Known differences: several views of an item count as several items. What is official only when it is asked for: fixed positions and
fresh weights of the encoder (`positions: sincos` and `initial: mae` of `ViT`), fresh weights of the decoder (`decoder_initial: mae`),
decay of the mask token (`optimization.mask_token: embedding`), and gradients that are not clipped (`optimization.clip: null`).
"""

from typing import ClassVar, Literal

from torch import Tensor

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.patches import patchify
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.reconstruction import PatchPixels
from glpretrain.training.branch import Branch
from glpretrain.training.decoders import TokenDecoder


class MAE(Method):
    """A masked autoencoder.

    Args:
        encoder: the trunk; it must be able to drop tokens.
        decoder_dim: width of the decoder.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: attention heads per block of the decoder.
        decoder_initial: the rule for the decoder's fresh weights, see `TokenDecoder`; `mae` is the official one.
        normalise_pixels: give every target patch mean 0 and variance 1.
        **kwargs: arguments of `Method`.
    """

    terms = ("pixels",)
    uses: ClassVar = {"global": Uses(needs=("mask",))}

    def __init__(
        self,
        encoder: Encoder,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_initial: Literal["torch", "mae"] = "torch",
        normalise_pixels: bool = True,
        **kwargs,  # noqa: ANN003
    ) -> None:
        encoder.require_keep()
        if encoder.card.modality != "image":
            raise ValueError(f"MAE: predicts pixels, the encoder is for {encoder.card.modality}; give one of images, or use PointMAE")
        channels, *_ = encoder.card.item_shape
        rows, columns = encoder.card.patch_size
        self.patch_size = (rows, columns)
        decoder = TokenDecoder(
            encoder.embed_dim,
            patch_dim=rows * columns * channels,
            embed_dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            initial=decoder_initial,
        )
        super().__init__(Branch(encoder, {"decoder": decoder}), **kwargs)
        self.objective = PatchPixels(normalise=normalise_pixels)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`pixels`: error on the hidden patches."""
        group = batch.views["global"]
        assert group.mask is not None
        num_global = len(group.items)
        views, mask = group.items.flatten(0, 1), group.mask.flatten(0, 1)  # [(G B) C H W], [(G B) N]
        keep = group.visible_tokens()  # [(G B) M]
        output = self.student.encode(views, keep=keep, keys=group.keys)
        grid = self.encoder.grid(views.shape[1:])
        predictions = self.student.heads["decoder"](output.cls, output.patches, keep=keep, grid=grid)
        targets = patchify(views, patch_size=self.patch_size)
        error = self.objective(predictions=predictions, targets=targets, mask=mask)  # [(G B)]
        return {"pixels": error.unflatten(0, (num_global, -1)).mean(dim=0)}
