"""Feature-map encoders of timm (ResNet, ConvNeXt, Swin and their like): cls is the pooled map, patches are its cells.

Cells of such a map have seen their neighbours, so tokens can be neither hidden nor dropped; a method that needs that is refused.
Plain ViTs belong to `vit.ViT`.
"""

from collections.abc import Sequence

import timm
from timm.models import group_parameters, is_model_in_modules
from torch import Tensor

from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder, encode_list, load_strictly, register
from glpretrain.encoders.timm_model import image_card, pair, timm_config

# Windows are laid out for a size when the model is built.
_WINDOWED_MODULES = ("swin_transformer", "swin_transformer_v2")
FEATURE_MAP_MODULES = ("resnet", "resnetv2", "regnet", "convnext", *_WINDOWED_MODULES)


@register
class FeatureMap(Encoder):
    """A timm model that ends in one feature map, with fresh weights.

    Args:
        name: of a timm model, such as `resnet18`.
        img_size: height and width that it is trained on; windowed models are laid out for it, all take other sizes too.
        in_chans: channels.
        drop_path_rate: stochastic depth.
        mean: per channel, of items scaled to [0, 1]; None is ImageNet's for three channels and 0.5 otherwise.
        std: likewise.
        licence: of the weights.
        source: of the weights.

    Raises:
        ValueError: `name` is no such model, or a size does not fit another.
    """

    def __init__(
        self,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        licence: str = "",
        source: str = "",
    ) -> None:
        super().__init__()
        if not timm.is_model(name) or not is_model_in_modules(name, FEATURE_MAP_MODULES):
            raise ValueError(
                f"FeatureMap: name={name!r} given; accepted: models of timm's {', '.join(FEATURE_MAP_MODULES)} (see timm.list_models)"
            )
        height, width = pair(img_size)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"FeatureMap: drop_path_rate={drop_path_rate} given; accepted: [0, 1)")
        timm_args: dict[str, str | int | float | bool | list[int]] = {
            "in_chans": in_chans,
            "num_classes": 0,
            "drop_path_rate": drop_path_rate,
        }
        if is_model_in_modules(name, _WINDOWED_MODULES):
            timm_args |= {"img_size": [height, width], "strict_img_size": False}
        self.model = timm.create_model(name, pretrained=False, **timm_args)
        if self.model.head_hidden_size != self.model.num_features:
            raise ValueError(
                f"FeatureMap: {name} widens its pooled features from {self.model.num_features} to {self.model.head_hidden_size}; "
                "accepted: models that pool their last map as it is, such as resnet18, convnext_tiny, swin_tiny_patch4_window7_224"
            )
        self._timm_args = timm_args
        self._layer_ids = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        reduction = self.model.feature_info[-1]["reduction"]
        arguments = {
            "name": name,
            "img_size": [height, width],
            "in_chans": in_chans,
            "drop_path_rate": drop_path_rate,
            "licence": licence,
            "source": source,
        }
        self._card = image_card(
            "FeatureMap", arguments, mean=mean, std=std, patch_size=(reduction, reduction), embed_dim=self.model.num_features
        )
        self.grid((in_chans, height, width))

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        last_stage = self.model.feature_info[-1]["module"] + "."
        return max(layer for name, layer in self._layer_ids.items() if name.startswith(last_stage))

    def grid(self, item_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of cells for an item of shape C H W.

        Raises:
            ValueError: the shape does not divide into cells.
        """
        channels, *size = item_shape
        name, cell = self._card.arguments["name"], self._card.patch_size[0]
        if channels != self._card.item_shape[0] or len(size) != 2:
            raise ValueError(f"{name}: item shape {tuple(item_shape)} given; accepted: ({self._card.item_shape[0]}, height, width)")
        for length in size:
            if length % cell or length == 0:
                nearest = sorted({max(length // cell, 1) * cell, (length // cell + 1) * cell})
                raise ValueError(
                    f"{name}: size {tuple(size)} does not divide by its cells of {cell} pixels; nearest accepted to {length}: {nearest}"
                )
        return size[0] // cell, size[1] // cell

    def forward(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """See `Encoder.forward`; items are Float[B C H W]. In training, batch norm sees all views of one size together."""
        if keep is not None:
            self.require_keep()
        if not isinstance(items, Tensor):
            return encode_list(self._encode, items, mask=mask)
        return self._encode(items, mask=mask)

    def _encode(self, items: Tensor, *, mask: Tensor | None) -> EncoderOutput:
        if mask is not None:
            self.add_mask_token()
        rows, columns = self.grid(items.shape[1:])
        features = self.model.forward_features(items)
        # timm's Swin keeps channels last; the others have them first.
        if features.shape[1:] == (rows, columns, self.embed_dim):
            cells = features.flatten(1, 2)  # [B N D]
        else:
            cells = features.flatten(2).transpose(1, 2)  # [B N D]
        return EncoderOutput(cls=self.model.forward_head(features, pre_logits=True), patches=cells)

    def add_mask_token(self) -> None:
        """Always refused."""
        raise ValueError(f"{self._card.arguments['name']} cannot hide tokens; choose a ViT such as vit_small_patch16_224")

    def require_keep(self) -> None:
        """Always refused."""
        raise ValueError(f"{self._card.arguments['name']} cannot drop tokens; choose a ViT such as vit_small_patch16_224")

    def layer_of(self, name: str) -> int:
        """0 for the stem, i + 1 for stage i."""
        return self._layer_ids[name.removeprefix("model.")]

    def backbone_state(self) -> dict[str, Tensor]:
        """timm's state dict."""
        return self.model.state_dict()

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `backbone_state`, strict."""
        load_strictly(self.model, state)

    def library_config(self, card: EncoderCard) -> dict:
        """What timm needs to open an exported folder."""
        return timm_config(card, model_args=self._timm_args)
