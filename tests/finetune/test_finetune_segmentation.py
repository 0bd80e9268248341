"""Segmentation: image and mask stay together, ignored pixels count nowhere, and scores are those of whole masks at their own size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import assert_matches, load, noise, official_weights, wave
from PIL import Image
from torch import Tensor

from glpretrain.cli.predict_masks import palette_image
from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.types import EncoderOutput, Item
from glpretrain.data import MaskedFolder, Scenes
from glpretrain.encoders import ViT
from glpretrain.finetune import FineTuned, LinearHead, MaskTransformer, Segmentation, SegmentationViews
from glpretrain.finetune.segmentation_heads import Kind
from glpretrain.finetune.transforms import Transform
from glpretrain.finetune.windows import classes_at, starts, whole_logits

GOLDEN = load("segmenter_decoder")
CLASSES = ("ground", "wall", "sky")
SHADE = 50  # a pixel of class k has this times k + 1 in each channel


def encoder() -> ViT:
    plain = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}  # the value of a pixel tells its class
    return ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, mean=plain["mean"], std=plain["std"])


def coded(classes: Tensor) -> Item:
    """An image whose values encode the class of each pixel, as `SegmentationViews.read` gives it."""
    values = (SHADE * (classes + 1)).byte().expand(3, -1, -1)
    return Item(values, -1, None, classes.to(torch.int16))


def decoded(image: Tensor) -> Tensor:
    """The class that each pixel of Float[3 H W] encodes, -1 where it is black."""
    return (255 * image[0] / SHADE).round().long() - 1


def checks(height: int, width: int, *, side: int) -> Tensor:
    """Int[height width]: squares of classes."""
    rows, columns = (torch.arange(length) // side for length in (height, width))
    return (rows[:, None] + 2 * columns) % len(CLASSES)


def augmented(views: SegmentationViews, item: Item, count: int) -> list[tuple[Tensor, Tensor]]:
    parts = views.prepare([item] * count, keys=torch.arange(count), card=encoder().card)
    return list(zip(parts["items"], parts["targets"], strict=True))


def test_a_mask_is_cut_and_flipped_with_its_image_pixel_by_pixel() -> None:
    classes = (torch.arange(16)[:, None] * 5 + torch.arange(23) ** 2 // 3) % len(CLASSES)  # no symmetry
    drawn = augmented(SegmentationViews(16, scale=(1.0, 1.0)), coded(classes), 20)
    assert all(torch.equal(decoded(image), mask) for image, mask in drawn)
    masks = [mask for _, mask in drawn]
    assert len({mask.numpy().tobytes() for mask in masks}) > 5, "crops differ"
    crops = [classes[:, left : left + 16] for left in range(8)]
    assert all(any(torch.equal(mask, crop) or torch.equal(mask, crop.flip(1)) for crop in crops) for mask in masks)
    assert any(any(torch.equal(mask, crop.flip(1)) for crop in crops) for mask in masks)


def test_a_mask_is_scaled_with_its_image_and_what_lies_beyond_is_ignored() -> None:
    item = coded(checks(30, 40, side=10))
    beyond = 0
    for image, mask in augmented(SegmentationViews(16, scale=(0.5, 2.0)), item, 40):
        # Within a square of one class, both agree; at its rim the image is interpolated, the mask is not.
        same = torch.stack([mask.roll(shift, axis) == mask for axis in (0, 1) for shift in (-2, -1, 1, 2)]).all(dim=0)
        inner = same[2:-2, 2:-2]
        assert torch.equal(decoded(image)[2:-2, 2:-2][inner], mask[2:-2, 2:-2][inner])
        beyond += int((mask == -1).sum())
        assert bool((image[:, mask == -1] == 0).all()), "the mean colour, which is 0 here"
    assert beyond > 0


def test_colours_change_and_masks_do_not() -> None:
    item = coded(checks(16, 16, side=8))
    plain = augmented(SegmentationViews(16, scale=(1.0, 1.0), hflip=0.0), item, 1)[0]
    changed = augmented(SegmentationViews(16, scale=(1.0, 1.0), hflip=0.0, color_jitter=0.8), item, 1)[0]
    assert torch.equal(plain[1], changed[1]) and not torch.equal(plain[0], changed[0])


def test_an_evaluation_keeps_the_whole_picture_and_the_size_of_the_mask() -> None:
    image, mask = SegmentationViews(16).plain(coded(checks(30, 60, side=10)), card=encoder().card)
    assert image.shape == (3, 16, 32) and torch.equal(mask, checks(30, 60, side=10))


def batch(targets: Tensor) -> Batch:
    count = len(targets)
    items = noise(count, 3, 16, 16, name="items")
    views = {"global": ViewGroup(items[None], keys=torch.zeros(1, count, dtype=torch.int64))}
    return Batch(torch.arange(count), views, torch.ones(count), targets)


@pytest.mark.parametrize("head", ["linear", "transformer"])
def test_the_loss_is_a_plain_loop_over_pixels_that_are_not_ignored(head: Kind) -> None:
    torch.manual_seed(0)
    model = Segmentation(encoder(), CLASSES, head=head)
    targets = checks(16, 16, side=5).repeat(2, 1, 1)
    targets[0, :, 8:] = -1
    given = batch(targets)
    (found,) = model.losses(given, 0.0).values()
    model.zero_grad()
    logits = torch.nn.functional.interpolate(model.logits(given), size=(16, 16), mode="bilinear")
    for number in range(2):
        total = 0.0
        for row in range(16):
            for column in range(16):
                if (true := int(targets[number, row, column])) >= 0:
                    total -= logits[number, :, row, column].log_softmax(dim=0)[true].item()
        assert found[number].item() == pytest.approx(total / 256, rel=1e-5)


def test_ignored_pixels_send_no_gradient() -> None:
    torch.manual_seed(0)
    model = Segmentation(encoder(), CLASSES)
    targets = torch.full((2, 16, 16), -1)
    (found,) = model.losses(batch(targets), 0.0).values()
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def truth_and_logits() -> tuple[list[Tensor], list[Tensor]]:
    """Masks of two sizes, the second without the last class, and logits of them on a grid."""
    truths = [checks(10, 14, side=3), checks(7, 9, side=2) % 2]
    truths[0][:4] = -1
    return truths, [wave(1, len(CLASSES), 3, 4, phase=phase) for phase in (0.3, 0.9)]


def test_scores_are_those_of_a_plain_loop_over_pixels_at_the_size_of_the_masks() -> None:
    model = Segmentation(encoder(), CLASSES)
    truths, logits = truth_and_logits()
    rows = [model.outcomes(one, truth[None]) for one, truth in zip(logits, truths, strict=True)]
    found = model.scores(torch.cat(rows), None)
    right, true, predicted = [0, 0, 0], [0, 0, 0], [0, 0, 0]
    for one, truth in zip(logits, truths, strict=True):
        large = torch.nn.functional.interpolate(one, size=truth.shape, mode="bilinear")[0]
        for row in range(truth.shape[0]):
            for column in range(truth.shape[1]):
                if (wanted := int(truth[row, column])) >= 0:
                    said = int(large[:, row, column].argmax())
                    right[wanted] += said == wanted
                    true[wanted] += 1
                    predicted[said] += 1
    ious = [right[k] / (true[k] + predicted[k] - right[k]) for k in range(3)]
    assert found["miou"].value == pytest.approx(100 * sum(ious) / 3)
    assert found["pixel_accuracy"].value == pytest.approx(100 * sum(right) / sum(true))
    assert [found[f"iou_{name}"].value for name in CLASSES] == pytest.approx([100 * iou for iou in ious])
    assert (found["miou"].n, found["iou_sky"].n) == (2, 1)
    assert found["miou"].low is not None and found["miou"].low < found["miou"].value


def test_a_class_that_no_test_pixel_shows_is_left_out_of_the_mean() -> None:
    model = Segmentation(encoder(), CLASSES)
    truths, logits = truth_and_logits()
    found = model.scores(model.outcomes(logits[1], truths[1][None]), None)
    assert "iou_sky" not in found
    assert found["miou"].value == pytest.approx((found["iou_ground"].value + found["iou_wall"].value) / 2)


def test_images_of_one_group_are_drawn_together() -> None:
    model = Segmentation(encoder(), CLASSES)
    truths, logits = truth_and_logits()
    rows = torch.cat([model.outcomes(one, truth[None]) for one, truth in zip(logits, truths, strict=True)])
    alone, together = model.scores(rows, None), model.scores(torch.cat([rows, rows]), torch.tensor([2, 4, 2, 4]))
    assert together["miou"].value == pytest.approx(alone["miou"].value)
    assert together["miou"].n == 2 and together["miou"].low == pytest.approx(alone["miou"].low)


def test_windows_cover_a_picture_and_are_averaged_where_they_overlap() -> None:
    assert starts(16, 16) == [0] and starts(40, 16) == [0, 10, 20, 24] and starts(17, 16) == [0, 1]
    seen: list[Tensor] = []

    def logits(windows: Tensor) -> Tensor:
        """The mean of each window, for every patch of it."""
        seen.extend(windows)
        return windows.mean(dim=(1, 2, 3), keepdim=True).expand(-1, 1, 2, 2)

    picture = noise(3, 16, 40, name="picture")
    found = whole_logits(picture, logits, batch_size=3)
    assert len(seen) == 4 and torch.equal(seen[3], picture[:, :, 24:])
    means = [picture[:, :, left : left + 16].mean() for left in (0, 10, 20, 24)]
    torch.testing.assert_close(found[0, :, 5], means[0].expand(16))
    torch.testing.assert_close(found[0, :, 12], ((means[0] + means[1]) / 2).expand(16))
    torch.testing.assert_close(found[0, :, 25], ((means[1] + means[2] + means[3]) / 3).expand(16))


def test_the_class_of_a_pixel_is_found_among_more_classes_than_are_upsampled_at_once() -> None:
    logits = wave(19, 3, 4, phase=0.1)
    expected = torch.nn.functional.interpolate(logits[None], size=(11, 13), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(classes_at(logits, (11, 13)), expected)
    assert len(expected.unique()) > 8


def saved(folder: Path, head: Kind = "transformer") -> FineTuned:
    torch.manual_seed(3)
    trained = Segmentation(encoder(), CLASSES, head=head)
    card = trained.backbone().card
    transform = SegmentationViews(16).transform(card)
    model = FineTuned.of(trained, transform=transform, scores={})
    model.save(folder)
    return model


@pytest.mark.parametrize("head", ["linear", "transformer"])
def test_a_saved_model_predicts_the_same(head: Kind, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", head)
    again = FineTuned.load(tmp_path / "model")
    picture = (255 * noise(3, 20, 31, name="picture").abs()).byte()
    classes = model.segment(picture)
    assert torch.equal(again.segment(picture), classes) and classes.shape == (20, 31)
    windows = noise(2, 3, 16, 16, name="windows")
    assert torch.equal(again(windows), model(windows)) and again(windows).shape == (2, 3, 2, 2)
    assert again.card == model.card and again.transform.crop_pct is None
    # The whole way by hand: short side 16, three windows, upsampled to the size of the picture.
    whole = whole_logits(model.transform(picture), model)
    assert whole.shape == (3, 16, 24)
    assert torch.equal(classes, torch.nn.functional.interpolate(whole[None], size=(20, 31), mode="bilinear")[0].argmax(dim=0))


def test_a_model_says_which_call_it_takes(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    with pytest.raises(ValueError, match="pictures given to a model for segmentation"):
        model.predict([Image.new("RGB", (20, 20))])
    centre = Transform((16, 16), 0.875, (0.5,) * 3, (0.5,) * 3)
    other = FineTuned.of(Segmentation(encoder(), CLASSES), transform=centre, scores={})
    with pytest.raises(ValueError, match="accepted: one for segmentation"):
        other.segment(Image.new("RGB", (20, 20)))


OURS = {
    "cls_emb": "class_token",
    "proj_dec": "embed",
    "proj_patch": "project_patches.weight",
    "proj_classes": "project_classes.weight",
    "decoder_norm": "norm",
    "mask_norm": "class_norm",
}


def place_of(name: str) -> str:
    first = name.split(".")[0]
    return OURS.get(first, first) + name.removeprefix(first)


def of_theirs(name: str, value: Tensor) -> Tensor:
    """Their two projections are factors on the right."""
    return value.T if name.startswith(("proj_patch", "proj_classes")) else value


def test_the_decoder_with_official_weights_is_segmenters() -> None:
    head = MaskTransformer(12, 5, num_heads=3).double()
    weights = {name: of_theirs(name, value.double()) for name, value in official_weights(GOLDEN["shapes"]).items()}
    head.load_state_dict({place_of(name): value for name, value in weights.items()})
    patches = noise(2, 6, 12, name="patches").double().requires_grad_()
    logits = head(EncoderOutput(patches.mean(dim=1), patches), grid=(2, 3))
    (logits * noise(*logits.shape, name="gradient").double()).sum().backward()
    assert_matches(logits.detach(), GOLDEN["output"])
    assert patches.grad is not None
    assert_matches(patches.grad, GOLDEN["input_gradient"])
    gradients = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.grad is not None}
    for name, expected in GOLDEN["gradients"].items():
        assert_matches(of_theirs(name, gradients[place_of(name)]), expected)


def test_logits_of_two_classes_are_more_than_their_order() -> None:
    torch.manual_seed(0)
    head = MaskTransformer(12, 2)
    patches = noise(2, 6, 12, name="patches").requires_grad_()
    logits = head(EncoderOutput(patches.mean(dim=1), patches), grid=(2, 3))
    assert len(logits.detach().abs().unique()) == logits.numel()
    logits[:, 0].sum().backward()
    assert patches.grad is not None and patches.grad.abs().max() > 1e-3


def test_the_linear_head_is_a_norm_over_all_patches_and_one_layer() -> None:
    torch.manual_seed(0)
    head = LinearHead(5, 3)
    patches = wave(2, 6, 5, phase=0.4)
    normed = (patches - patches.mean(dim=(0, 1))) / (patches.var(dim=(0, 1), correction=0) + 1e-5).sqrt()
    expected = torch.einsum("bnd,kd->bkn", normed, head.linear.weight).unflatten(2, (2, 3))
    torch.testing.assert_close(head(EncoderOutput(patches[:, 0], patches), grid=(2, 3)), expected, rtol=1e-4, atol=1e-6)


def test_a_batch_norm_in_the_head_is_said_to_see_micro_batches() -> None:
    assert Segmentation(encoder(), CLASSES, head="linear").micro_batch_terms == ("pixels",)
    assert Segmentation(encoder(), CLASSES, head="transformer").micro_batch_terms == ()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="head='upernet' given; accepted: linear, transformer"):
        Segmentation(encoder(), CLASSES, head="upernet")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="7 heads of a width of 12"):
        MaskTransformer(12, 3, num_heads=7)
    with pytest.raises(ValueError, match=r"scale=\[2.0, 1.0\] given"):
        SegmentationViews(16, scale=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"color_jitter=0\.0 given"):
        SegmentationViews(16, color_jitter=0.0)
    with pytest.raises(ValueError, match=r"drop_path=1\.0 given"):
        Segmentation(encoder(), CLASSES, drop_path=1.0)


def masked_folder(root: Path, *, names: bool = True) -> Path:
    """train/ and val/ of images with masks of three classes and of an ignored value, 9."""
    for part, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for number in range(count):
            classes = checks(20 + number, 28, side=5 + number)
            Image.fromarray(coded(classes).values.permute(1, 2, 0).numpy()).save(root / part / "images" / f"{number}.png")
            mask = classes.byte().numpy().copy()
            mask[0, 0] = 9
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")
    if names:
        rows = [f"{number},{name}" for number, name in enumerate((*CLASSES,))]
        (root / "classes.csv").write_text("\n".join(["index,name", *rows, "9,unlabelled", ""]))
    return root


def test_the_parts_of_a_divided_folder_are_its_split(tmp_path: Path) -> None:
    source = MaskedFolder(masked_folder(tmp_path))
    split = source.train_test_split()
    assert split is not None
    train, test = split
    assert (len(train), len(test), train.mask_classes, test.mask_classes) == (4, 2, CLASSES, CLASSES)
    assert MaskedFolder(tmp_path, split="train").train_test_split() is None
    item = SegmentationViews(16).read(test, 0)
    assert item.regions is not None and item.regions[0, 0] == -1 and int(item.regions.max()) == 2
    (tmp_path / "val" / "classes.csv").write_text("index,name\n0,a\n1,b\n2,c\n9,void\n")
    with pytest.raises(ValueError, match=r"train has classes ground, wall, sky, .*val has a, b, c; accepted"):
        MaskedFolder(tmp_path).train_test_split()


def test_sources_without_named_classes_are_refused(tmp_path: Path) -> None:
    views = SegmentationViews(16)
    assert views.classes_of(Scenes(4, size=32))[0] == "ground"
    with pytest.raises(ValueError, match=r"masks whose values have no names; accepted: images/ beside masks/ with a classes\.csv"):
        views.classes_of(MaskedFolder(masked_folder(tmp_path, names=False)))


def test_masks_have_the_values_of_the_classes(tmp_path: Path) -> None:
    classes = checks(7, 9, side=2)
    palette_image(classes, torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and torch.equal(torch.from_numpy(np.array(image)).long(), classes)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
