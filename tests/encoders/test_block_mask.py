"""One call of attention with a block mask for all items of a packed sequence: features and gradients of a call per size of views."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from eager_flex import gradients_on_a_cpu
from golden import noise
from test_blocks import ENCODERS, VIEWS, assert_same_gradients, encoder_of, outputs_and_gradients, packing
from torch import Tensor

from glpretrain.encoders import FeatureMap, ViT, blocks
from glpretrain.encoders.blocks import Packing
from glpretrain.encoders.documents import block_mask
from glpretrain.training.branch import Branch
from glpretrain.training.checks import require_device
from glpretrain.training.optim import Optimization

CPU = torch.device("cpu")
GIVEN = "^optimization: packed_attention='flex' given, but"
# Items inside a block, across several, with edges on those of blocks, and groups without items.
SIZES = [((3, 17), (5, 5)), ((2, 197), (3, 37)), ((2, 128), (1, 256)), ((0, 7), (2, 300), (0, 3), (7, 1))]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _with_gradients() -> Iterator[None]:
    with gradients_on_a_cpu():
        yield


def number_of_item(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Int[S]: of each token, by counting one item after the other."""
    lengths = [length for items, length in sizes for _ in range(items)]
    return torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])


@pytest.mark.parametrize("sizes", SIZES)
def test_the_blocks_are_those_with_two_tokens_of_one_item(sizes: tuple[tuple[int, int], ...]) -> None:
    item = number_of_item(sizes)
    mask = block_mask(sizes, device=CPU)
    assert mask.shape == (1, 1, len(item), len(item))
    same = F.pad(item[:, None] == item, (0, -len(item) % 128, 0, -len(item) % 128))
    wanted = same.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(dim=3).any(dim=1)  # [blocks blocks]
    assert torch.equal(mask.to_dense()[0, 0].bool(), wanted)


@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_that_of_a_call_per_size(sizes: tuple[tuple[int, int], ...]) -> None:
    count = sum(items * length for items, length in sizes)
    inputs = [noise(1, 2, count, 16, name=name).requires_grad_() for name in ("query", "key", "value")]
    results = []
    for attention in ("grouped", "flex"):
        found = F.scaled_dot_product_attention(*inputs, attn_mask=Packing(sizes, attention=attention))
        results.append([found, *torch.autograd.grad((found * noise(*found.shape, name="weights")).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls_only", [False, [False, True]], ids=["all tokens", "local class tokens"])
@pytest.mark.parametrize("name", ENCODERS)
def test_features_and_gradients_are_those_of_a_call_per_size(
    name: str, cls_only: bool | list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(name)
    packing(monkeypatch, pays=True)
    grouped, gradients = outputs_and_gradients(encoder, cls_only=cls_only)
    encoder.packed_attention = "flex"
    flex, own = outputs_and_gradients(encoder, cls_only=cls_only)
    for first, second in zip(grouped, flex, strict=True):
        for one, other in zip(first, second, strict=True):
            if one is not None:
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert_same_gradients(own, gradients)


def test_every_block_that_sees_one_sequence_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = encoder_of("plain"), []
    packing(monkeypatch, pays=True)
    attend = blocks.attend_in_documents
    monkeypatch.setattr(blocks, "attend_in_documents", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    made = [block_mask(((3, 17), (5, 5)), device=CPU)]
    monkeypatch.setattr(blocks, "block_mask", lambda *args, **kwargs: made.pop())  # one for all blocks
    encoder.packed_attention = "flex"
    encoder.eval()
    with torch.no_grad():
        encoder(VIEWS)
        assert len(calls) == 3 and not made
        calls.clear()
        encoder.packed_attention = "grouped"
        encoder(VIEWS)
    assert not calls


def test_checkpointed_blocks_give_the_same_features_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("kept paths only")
    packing(monkeypatch, pays=True)
    encoder.packed_attention = "flex"
    kept, gradients = outputs_and_gradients(encoder, cls_only=False)
    encoder.activation_checkpointing = True
    again, own = outputs_and_gradients(encoder, cls_only=False)
    assert all(torch.equal(one.patches, other.patches) for one, other in zip(kept, again, strict=True))
    assert_same_gradients(own, gradients)


@pytest.mark.parametrize("name", ["plain", "norms of queries", "rotary"])
def test_half_precision_gives_features_that_differ_by_its_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(name)
    packing(monkeypatch, pays=True)
    grouped, _ = outputs_and_gradients(encoder, cls_only=False, half=True)
    encoder.packed_attention = "flex"
    flex, _ = outputs_and_gradients(encoder, cls_only=False, half=True)
    for one, other in zip(grouped, flex, strict=True):
        torch.testing.assert_close(one.patches, other.patches, rtol=0.02, atol=0.02)


def test_an_encoder_that_makes_no_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{GIVEN} FeatureMap resnet18 does not encode views of several sizes in one sequence; leave"):
        Branch(FeatureMap("resnet18"), {}).set_packed_attention("flex")
    branch = Branch(ViT("vit_tiny_patch16_224", img_size=16, depth=1), {})
    branch.set_chunk_size(4)
    with pytest.raises(ValueError, match=f"{GIVEN} with chunk_size=4 there is no such sequence; leave one of them out"):
        branch.set_packed_attention("flex")
    branch.set_chunk_size(None)
    branch.set_packed_attention("flex")
    assert branch.encoder.packed_attention == "flex"


def test_what_a_run_cannot_do_is_one_line() -> None:
    flex = Optimization(packed_attention="flex")
    with pytest.raises(ValueError, match=f"{GIVEN} this run is on cpu; it needs a CUDA GPU; leave it out$"):
        require_device(flex, CPU)
    require_device(flex, torch.device("cuda"))
    with pytest.raises(ValueError, match="compile=True compiles whole blocks, which nobody has tried with it; leave one of them out"):
        require_device(Optimization(packed_attention="flex", compile=True), torch.device("cuda"))
    with pytest.raises(ValueError, match="optimization: packed_attention='dense' given; accepted: grouped, flex"):
        Optimization(packed_attention="dense")  # type: ignore[arg-type]
