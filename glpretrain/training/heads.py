"""Modules behind an encoder that are used during pretraining and dropped afterwards. See also `prototypes` and `decoders`."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glpretrain.core import keys as rng
from glpretrain.core.distributed import SyncedBatchNorm

_HALLUCINATION = 0x4A11  # seed of the strengths, which no draw of the data uses


def truncated_linear(in_dim: int, out_dim: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with the initialisation of the ViT family: truncated normal of 0.02, zero bias."""
    layer = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _mlp(in_dim: int, *, hidden_dim: int, out_dim: int, num_layers: int, bias: bool = True) -> nn.Sequential:
    if num_layers < 1:
        raise ValueError(f"num_layers: {num_layers} given; a head needs at least 1 layer")
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.GELU()] * (i > 0) + [truncated_linear(a, b, bias=bias)]
    return nn.Sequential(*layers)


class ProjectionHead(nn.Module):
    """DINO's projection: an MLP with GELU onto the unit sphere (vision_transformer.py, DINOHead, without its last layer).

    Args:
        in_dim: width D of the features.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the result.
        num_layers: number of linear layers.
        bias: whether the layers have a bias (Mugs has none before its contrasts).

    Raises:
        ValueError: there is not a single layer.
    """

    def __init__(self, in_dim: int, *, hidden_dim: int = 2048, bottleneck_dim: int = 256, num_layers: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.mlp = _mlp(in_dim, hidden_dim=hidden_dim, out_dim=bottleneck_dim, num_layers=num_layers, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Float[... D] to Float[... bottleneck_dim], float32 rows of length one."""
        return F.normalize(self.mlp(features).float(), dim=-1)


class Predictor(nn.Module):
    """What the student has behind its projection and the teacher does not: Linear, GELU, Linear, no bias (Mugs src/model.py).

    Keeps torch's own initialisation, as the official code does (its truncated normal runs before the predictor exists).

    Args:
        dim: width of the projection, and of the result.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, dim: int, *, hidden_dim: int = 4096) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim, bias=False), nn.GELU(), nn.Linear(hidden_dim, dim, bias=False))

    def forward(self, projections: Tensor) -> Tensor:
        """Float[... D] to Float[... D], float32 rows of length one."""
        return F.normalize(self.mlp(projections).float(), dim=-1)


class Hallucinator(nn.Module):
    """More positives, made in feature space: a query pushed away from its key, then an MLP (Wu et al., "Hallucination Improves the
    Performance of Unsupervised Visual Representation Learning", arXiv 2307.12168; models/generator.py of the official code
    jingwu6/Hallucination-improves-the-performance-of-unsupervised-visual-representation-learning @ c50c6dd).

    e = (1 + s) q - s k; hallucinated = W3 relu(W2 relu(W1 [q; e] + b1) + b2) + b3. Its key is the query's own. The inner width is twice
    the query's, as in every official setting. Ours: queries and keys have length one (the official MoCo mixes a query of any length with
    a key of length one), and keys do not enter a queue twice.

    Args:
        dim: width D of queries and keys.
        largest: upper end of the uniform distribution from which the strengths s are drawn, U(0, `largest`).

    Raises:
        ValueError: `largest` is not above 0.
    """

    def __init__(self, dim: int, *, largest: float = 0.1) -> None:
        super().__init__()
        if largest <= 0.0:
            raise ValueError(f"hallucinate: largest strength {largest} given; it must be above 0")
        self.largest = largest
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, queries: Tensor, keys: Tensor, *, strengths: Tensor) -> Tensor:
        """Float[... B D], not normalised: one more query for every query.

        Args:
            queries: Float[... B D].
            keys: Float[... B D], broadcast against the queries.
            strengths: Float[B].
        """
        strengths = strengths.unsqueeze(-1)
        pushed = (1.0 + strengths) * queries - strengths * keys
        return self.mlp(torch.cat([queries.expand_as(pushed), pushed], dim=-1))

    def positives(self, queries: Tensor, keys: Tensor, *, index: Tensor, progress: float) -> Tensor:
        """Float[... B D]: `forward` between rows of length one in float32, with one strength per item and step.

        The official code draws one per batch, so that its result depends on how the items are distributed over processes.

        Args:
            queries: Float[... B D].
            keys: Float[... B D], broadcast against the queries.
            index: Int[B], dataset index of each item.
            progress: progress of the run, in [0, 1].
        """
        item_keys = rng.item_keys(seed=_HALLUCINATION, epoch=round(progress * 2**40), index=index)
        unit = F.normalize(queries.float(), dim=-1), F.normalize(keys.float(), dim=-1)
        return F.normalize(self(*unit, strengths=self.largest * rng.uniform(item_keys)).float(), dim=-1)


class ContrastHead(nn.Sequential):
    """SiT's projector: Linear, BN, ReLU, Linear, BN, GELU, Linear, BN without affine (SiT vision_transformer.py).

    The batch norms keep no running statistics: the head is not used after pretraining, and a momentum teacher normalises its own batch
    (in SiT, the teacher's batch norms run in training mode).
    """

    def __init__(self, in_dim: int, *, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__(
            truncated_linear(in_dim, hidden_dim),
            SyncedBatchNorm(hidden_dim, track_running_stats=False),
            nn.ReLU(),
            truncated_linear(hidden_dim, hidden_dim),
            SyncedBatchNorm(hidden_dim, track_running_stats=False),
            nn.GELU(),
            truncated_linear(hidden_dim, out_dim),
            SyncedBatchNorm(out_dim, affine=False, track_running_stats=False),
        )


class PixelHead(nn.Module):
    """The pixels of every token from that token alone (GMML, SiT, MC-SSL, ASiT): `num_layers` x (Linear, GELU), then a linear map.

    The official transposed convolution with kernel = stride = patch is this linear map; its outputs are in MAE's order (row, column,
    channel), see `core.patches`.

    Args:
        in_dim: width D of the tokens.
        patch_dim: number of values to predict per token.
        num_layers: number of layers before the last one.
        hidden_dim: width of these layers; None is `in_dim`.
        bottleneck_dim: width of the last of them; None is `hidden_dim`.
        num_channels: number of channels, each with one bias for all of its values, as the transposed convolution has it; None has a bias
            for every value of a patch.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_dim: int,
        *,
        patch_dim: int,
        num_layers: int = 3,
        hidden_dim: int | None = None,
        bottleneck_dim: int | None = None,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or in_dim
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim or hidden_dim]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [truncated_linear(a, b), nn.GELU()]
        self.layers = nn.Sequential(*layers, truncated_linear(widths[-1], patch_dim, bias=num_channels is None))
        self.register_parameter("bias", None if num_channels is None else nn.Parameter(torch.zeros(num_channels)))

    def forward(self, patches: Tensor) -> Tensor:
        """Float[B N D] to Float[B N patch_dim]."""
        values = self.layers(patches)
        return values if self.bias is None else values + self.bias.repeat(values.shape[-1] // len(self.bias))


class LayerNormHead(nn.Sequential):
    """BYOL's projector and predictor with layer norm in place of batch norm: Linear, LayerNorm, ReLU, Linear (FSFM models_fsfm.py).

    Xavier-uniform weights and zero biases, as the official model ends up with.
    """

    def __init__(self, in_dim: int, *, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__(nn.Linear(in_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
