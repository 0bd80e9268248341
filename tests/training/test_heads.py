"""Heads: shapes, norms, and what each must not depend on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from glpretrain.core.distributed import SyncedBatchNorm
from glpretrain.encoders.initial import sincos_position
from glpretrain.training.decoders import TokenDecoder
from glpretrain.training.heads import ContrastHead, PixelHead, ProjectionHead
from glpretrain.training.prototypes import Prototypes


def wave(*shape: int, step: float = 0.37) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.sin(step * torch.arange(count, dtype=torch.float32)).reshape(shape)


def test_projection_lies_on_the_sphere() -> None:
    out = ProjectionHead(5, hidden_dim=7, bottleneck_dim=3)(wave(2, 11, 5))
    assert out.shape == (2, 11, 3)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 11))


def test_prototypes_ignore_the_length_of_their_directions() -> None:
    head = Prototypes(3, num_prototypes=7)
    features = F.normalize(wave(5, 3), dim=-1)
    before = head(features).dense()
    with torch.no_grad():
        head.directions.mul_(3.0)
    torch.testing.assert_close(head(features).dense(), before)
    assert before.abs().max() <= 1.0 + 1e-6


def test_prototypes_stay_in_float32_under_autocast() -> None:
    head = Prototypes(3, num_prototypes=7)
    features = F.normalize(wave(5, 3), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(features).dense()
    assert inside.dtype == torch.float32 and torch.equal(inside, head(features).dense())


@pytest.mark.parametrize("train_gain", [False, True])
def test_prototypes_are_products_with_normalised_directions(train_gain: bool) -> None:
    def gradients(compute: Callable[[Prototypes, torch.Tensor], torch.Tensor]) -> list[torch.Tensor | None]:
        head, features = Prototypes(3, num_prototypes=7, train_gain=train_gain), wave(2, 5, 3).requires_grad_()
        with torch.no_grad():
            head.directions.copy_(wave(7, 3, step=0.71))
            head.gain.copy_(wave(7, 1, step=1.3) if train_gain else torch.full((7, 1), 2.0))  # one gain is 0
        products = compute(head, features)
        (products * wave(2, 5, 7, step=0.53)).sum().backward()
        return [products.detach(), features.grad, head.directions.grad, head.gain.grad]

    ours = gradients(lambda head, features: head(features).dense())
    plain = gradients(lambda head, features: F.linear(features, head.gain * F.normalize(head.directions, dim=1)))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_prototypes_without_gradient_for_their_input() -> None:
    head = Prototypes(3, num_prototypes=7).requires_grad_(False)
    features = wave(5, 3).requires_grad_()
    head(features).dense().sum().backward()
    assert features.grad is not None and head.directions.grad is None


def test_gain_learns_only_when_asked() -> None:
    assert not Prototypes(3, num_prototypes=2).gain.requires_grad
    assert Prototypes(3, num_prototypes=2, train_gain=True).gain.requires_grad


def test_synced_batch_norm_equals_torch_in_one_process() -> None:
    ours, theirs = SyncedBatchNorm(5, track_running_stats=False), torch.nn.BatchNorm1d(5)
    a, b = wave(11, 5).requires_grad_(), wave(11, 5).requires_grad_()
    weight = wave(11, 5, step=0.71)
    (ours(a) * weight).sum().backward()
    (theirs(b) * weight).sum().backward()
    torch.testing.assert_close(ours(a), theirs(b))
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)  # the order of float32 sums differs


def test_contrast_head_centres_its_batch() -> None:
    out = ContrastHead(5, hidden_dim=7, out_dim=3)(wave(11, 5))
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)


def test_pixel_head_treats_every_token_alone() -> None:
    head = PixelHead(5, patch_dim=12, num_layers=2)
    patches = wave(2, 7, 5)
    torch.testing.assert_close(head(patches)[:, 3:4], head(patches[:, 3:4]))


def test_sincos_position_has_the_published_first_cells() -> None:
    """Cell (0, 0) is sin 0 and cos 0; cell (0, 1) moves only the column half, which stands first."""
    position = sincos_position((3, 2), 8)
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0] * 2)
    torch.testing.assert_close(position[0], expected)
    one = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(position[1, :4], torch.cat([one.sin(), one.cos()]))
    torch.testing.assert_close(position[1, 4:], expected[4:])
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_position((3, 2), 6)


def test_decoder_puts_every_kept_token_where_it_belongs() -> None:
    """The order in which kept tokens arrive must not matter, their place must."""
    decoder = TokenDecoder(5, patch_dim=3, embed_dim=8, depth=1, num_heads=2).eval()
    cls, patches, keep = wave(2, 5), wave(2, 3, 5), torch.tensor([[0, 4, 5], [2, 1, 3]])
    order = torch.tensor([2, 0, 1])
    out = decoder(cls, patches, keep=keep, grid=(2, 3))
    assert out.shape == (2, 6, 3)
    torch.testing.assert_close(out, decoder(cls, patches[:, order], keep=keep[:, order], grid=(2, 3)))
    assert not torch.allclose(out, decoder(cls, patches[:, order], keep=keep, grid=(2, 3)))
