"""Feature-map encoders of timm (ResNet, ConvNeXt, Swin and others like them): `cls` is the pooled map, patches are its cells.

A cell of such a map has already seen its neighbours, so tokens can be neither hidden nor dropped, and methods that need this are refused.
Plain ViTs belong to `vit.ViT`.
"""

from collections.abc import Sequence

from timm.layers.norm_act import BatchNormAct2d
from timm.models import group_parameters, is_model_in_modules
from timm.models.convnext import ConvNeXt
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from glpretrain.core.distributed import over_processes, world_size
from glpretrain.core.patches import image_grid
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder, register
from glpretrain.encoders.drop_path import use_keyed_paths
from glpretrain.encoders.limits import check_numbers
from glpretrain.encoders.timm_model import TimmArguments, check_model, create_model, image_card, pair, timm_config

# Their windows are laid out for one size when the model is built.
_WINDOWED_MODULES = ("swin_transformer", "swin_transformer_v2")
_NUM_STAGES = 4  # of residual blocks, in all of these
FEATURE_MAP_MODULES = ("resnet", "resnetv2", "regnet", "convnext", *_WINDOWED_MODULES)


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm of timm, with its activation where it has one, over all processes; one process runs torch's own kernel."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.load_state_dict(norm.state_dict())
        self.after = nn.Sequential(*norm.children()) if isinstance(norm, BatchNormAct2d) else nn.Identity()  # drop, act

    def forward(self, input: Tensor) -> Tensor:
        """Float[B C H W] to Float[B C H W]."""
        if not self.training or world_size() == 1:
            normed = super().forward(input)
        else:
            rows = input.movedim(1, -1)  # [B H W C]
            normed = over_processes(rows.flatten(0, -2), norm=self).reshape(rows.shape).movedim(-1, 1)  # [B C H W]
        return self.after(normed)


def _use_synced_norms(model: nn.Module) -> None:
    """Replace every batch norm inside a model of timm."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                module.add_module(name, _SyncedBatchNorm2d(child))


@register
class FeatureMap(Encoder):
    """A timm model that ends in one feature map, with fresh weights.

    Args:
        name: name of a timm model, such as `resnet18`.
        img_size: height and width of the images that it is trained on. Windowed models are laid out for this size; all accept others too.
        in_chans: number of channels.
        drop_path_rate: rate of stochastic depth in the last block; it grows with depth.
        mean: mean of each channel, of images scaled to [0, 1]; None stands for ImageNet's (three channels) or 0.5.
        std: standard deviation of each channel; None as for `mean`.
        licence: licence of the weights.
        source: source of the weights.

    Raises:
        ValueError: `name` is no such model, or a size does not fit another one.
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
        check_model(name, FEATURE_MAP_MODULES, encoder="FeatureMap")
        check_numbers("FeatureMap", in_chans=in_chans, drop_path_rate=drop_path_rate)
        height, width = pair(img_size)
        self._timm_args: TimmArguments = {"in_chans": in_chans, "num_classes": 0, "drop_path_rate": drop_path_rate}
        if is_model_in_modules(name, _WINDOWED_MODULES):
            self._timm_args |= {"img_size": [height, width], "strict_img_size": False}
        model = create_model(name, pretrained=False, **self._timm_args)
        assert isinstance(model, ResNet | ResNetV2 | RegNet | ConvNeXt | SwinTransformer | SwinTransformerV2)
        if model.head_hidden_size != model.num_features:
            raise ValueError(
                f"FeatureMap: {name} widens its pooled features from {model.num_features} to {model.head_hidden_size}; "
                "accepted: models that pool their last map as it is, such as resnet18, convnext_tiny, swin_tiny_patch4_window7_224"
            )
        use_keyed_paths(model)
        _use_synced_norms(model)
        self.model = model
        layer_ids = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        self._layer_ids = {name: layer for name, layer in layer_ids.items() if isinstance(layer, int)}
        last, dim = model.feature_info[-1], model.num_features
        cell, stage = last["reduction"], last["module"]
        assert isinstance(cell, int) and isinstance(stage, str) and isinstance(dim, int)
        self._num_stages = max(layer for name, layer in self._layer_ids.items() if name.startswith(f"{stage}."))
        self._card = image_card(
            "FeatureMap",
            {"name": name, "drop_path_rate": drop_path_rate, "licence": licence, "source": source},
            item_shape=(in_chans, height, width),
            mean=mean,
            std=std,
            patch_size=(cell, cell),
            embed_dim=dim,
        )
        self.grid((in_chans, height, width))

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return self._num_stages

    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks of all stages."""
        names = [info["module"] for info in self.model.feature_info[-_NUM_STAGES:]]
        stages = [self.model.get_submodule(name) for name in names if isinstance(name, str)]
        return [block for stage in stages for block in dict(stage.named_children()).get("blocks", stage).children()]

    def grid(self, item_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of cells for an image of shape C H W; see `core.patches.image_grid`."""
        return image_grid(self._card, item_shape)

    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
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

    def library_config(self, card: EncoderCard) -> dict[str, object]:
        """What timm needs to open an exported folder."""
        return timm_config(self.model, card, model_args=self._timm_args)
