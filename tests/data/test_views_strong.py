"""Strong augmentation: each operation against Pillow's, what is drawn how often, and that student views stand alone.

The judge is timm's `auto_augment` and `RandomErasing`. Mugs' own copy (sail-sg/mugs @ 10ab634, `src/RandAugment.py`) gives the same
arguments for every magnitude in [0, 10]; what timm added since are bounds that such magnitudes do not reach.
"""

import dataclasses
import inspect
import math
import random
from itertools import product

import pytest
import torch
from jsonargparse import ArgumentParser
from operations import made_of_fakes
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from view_parts import card_of, items_of, views_of

from glpretrain.core import keys as rng
from glpretrain.core.types import EncoderCard
from glpretrain.data import Scenes
from glpretrain.data.module import DataModule
from glpretrain.data.views import MultiCrop, Strong, ViewSpec
from glpretrain.data.views.changes import apply_changes
from glpretrain.data.views.erasing import AREA, ASPECT, draw_erasing, rectangles
from glpretrain.data.views.multicrop import OPERATIONS as OPERATIONS_OF_VIEWS
from glpretrain.data.views.randaugment import OPERATIONS, apply, draw, rand_augment

COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale_prob": 0.2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
H, W = 37, 53
MAGNITUDES = (0.0, 0.7, 3.3, 5.0, 8.2, 9.0, 9.6, 10.0)
NO_BITS = ("PosterizeIncreasing", 10.0)  # which today's Pillow refuses
GEOMETRIC = OPERATIONS[OPERATIONS.index("Rotate") :]
ERRORS = 4.5  # standard errors that a share may lie off: 7 in a million by chance
DRAWS = 20_000


def pictures() -> Tensor:
    """UInt8[5 3 H W]: texture, waves, a narrow range with its ends taken, two values, and a single one."""
    ramp = torch.arange(3 * H * W, dtype=torch.float64)
    texture = 127.5 + 127.5 * torch.sin(ramp**1.2)
    waves = 100.0 + 90.0 * torch.sin(ramp * 0.004)
    narrow = 60.0 + 47.0 * torch.sin(ramp * 0.05)
    two = torch.where(torch.sin(ramp * 0.7) > 0.4, 200.0, 30.0)
    return torch.stack((texture, waves, narrow, two, torch.full_like(ramp, 77.0))).round().to(torch.uint8).unflatten(1, (3, H, W))


def pillow(image: Tensor, name: str, *, magnitude: float, negative: bool, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """UInt8[3 H W]: timm's operation with bilinear positions."""
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda level: -level if negative else level)
    to_argument = auto_augment.LEVEL_TO_ARG[name]
    arguments = to_argument(magnitude, {}) if to_argument is not None else ()
    options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
    return pil_to_tensor(auto_augment.NAME_TO_OP[name](to_pil_image(image), *arguments, **options))


def ours(images: Tensor, name: str, *, magnitude: float, negative: bool = False, aspect: float = W / H) -> Tensor:
    count = len(images)
    return apply(
        images,
        operation=torch.full((count,), OPERATIONS.index(name)),
        magnitude=torch.full((count,), magnitude),
        negative=torch.full((count,), negative),
        aspect=torch.full((count,), aspect),
        fill=FILL,
    )


def keys(count: int) -> Tensor:
    return rng.item_keys(seed=3, epoch=2, index=torch.arange(count))


def assert_share(hits: Tensor, expected: float) -> None:
    share = hits.double().mean().item()
    error = math.sqrt(expected * (1 - expected) / hits.numel())
    assert abs(share - expected) <= ERRORS * error, f"{share} is not {expected} +- {error}"


def spec(size: int | tuple[int, int] = 24, **settings) -> ViewSpec:
    return ViewSpec(size, (0.25, 1.0), **settings)


def inputs(count: int = 11, *, channels: int = 3) -> dict:
    ramp = torch.arange(count * channels * 32 * 32, dtype=torch.float64)
    source = (127.5 + 127.5 * torch.sin(ramp**1.2)).round().to(torch.uint8).reshape(count, channels, 32, 32)
    return {"images": source, "keys": keys(count)}


def mugs(strong: Strong | None = Strong()) -> MultiCrop:  # noqa: B008
    weak = [spec(blur_prob=1.0, **COLOURS), spec(blur_prob=0.1, solarize_prob=0.2, **COLOURS)]
    own = [dataclasses.replace(view, strong=strong) for view in weak]
    return MultiCrop(weak, [ViewSpec(16, (0.05, 0.25), count=3, blur_prob=0.5, strong=strong, **COLOURS)], own)


# Operations


def test_the_operations_are_timms() -> None:
    assert sorted(OPERATIONS) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize(("name", "magnitude"), [case for case in product(OPERATIONS, MAGNITUDES) if case != NO_BITS])
def test_an_operation_is_pillows(name: str, magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures()
    for negative in (False, True):
        result = ours(images, name, magnitude=magnitude, negative=negative)
        expected = torch.stack([pillow(i, name, magnitude=magnitude, negative=negative, monkeypatch=monkeypatch) for i in images])
        off = (result.int() - expected.int()).abs()
        # Positions and blends are float32 here and there, in another order, and then truncated: a whole number that one of them
        # misses is one level off, and a picture of two values has few others.
        assert off.max() <= 1
        assert (off > 0).float().mean() <= 0.06


def test_posterizing_to_no_bits_is_black() -> None:
    assert (ours(pictures(), "PosterizeIncreasing", magnitude=10.0) == 0).all()


def test_every_item_of_a_batch_gets_its_own_operation() -> None:
    images = pictures()[:1].expand(16, -1, -1, -1)
    operation = torch.arange(-1, 15)
    magnitude, negative, aspect = torch.linspace(2.0, 10.0, 16), torch.arange(16) % 2 == 0, torch.full((16,), W / H)
    together = apply(images, operation=operation, magnitude=magnitude, negative=negative, aspect=aspect, fill=FILL)
    assert torch.equal(together[0], images[0])  # -1: nothing
    for i, name in enumerate(OPERATIONS, start=1):
        alone = ours(images[:1], name, magnitude=magnitude[i].item(), negative=bool(negative[i]))
        assert torch.equal(together[i : i + 1], alone), name


@pytest.mark.parametrize("name", GEOMETRIC)
def test_the_aspect_gives_a_stretched_item_its_true_proportions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A smooth item, twice as wide as high; the worker stretched it to a square of 64 x 64.
    y, x = torch.meshgrid(torch.arange(64) / 64, torch.arange(128) / 64, indexing="ij")
    wide = torch.stack([128 + 60 * torch.sin(3 * x + c) + 50 * torch.cos(4 * y - c) for c in range(3)])
    square = wide.unflatten(2, (64, 2)).mean(dim=3)
    moved = ours(square.round().to(torch.uint8).unsqueeze(0), name, magnitude=8.0, aspect=2.0)[0]
    expected = pillow(wide.round().to(torch.uint8), name, magnitude=8.0, negative=False, monkeypatch=monkeypatch)
    filled = (expected == torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).all(dim=0)
    expected = expected.float().unflatten(2, (64, 2)).mean(dim=3)
    near_fill = torch.nn.functional.max_pool2d(filled.float()[None], (3, 6), stride=(1, 2), padding=(1, 2))[0] > 0
    assert (~near_fill).float().mean() > 0.4
    assert ((moved - expected).abs()[:, ~near_fill]).max() <= 3.0  # levels; rounded thrice, and the pixels differ in width


# Draws


def test_operations_are_two_distinct_ones_of_fifteen() -> None:
    operations, magnitudes, negative = draw(keys(DRAWS), strong=Strong(op_prob=1.0))
    assert operations.shape == magnitudes.shape == negative.shape == (DRAWS, 2)
    assert (operations[:, 0] != operations[:, 1]).all()
    for slot in range(2):
        for number in range(15):
            assert_share(operations[:, slot] == number, 1 / 15)


def test_magnitudes_signs_and_application_have_their_distribution() -> None:
    operations, magnitudes, negative = draw(keys(DRAWS), strong=Strong())
    assert_share(operations >= 0, 0.5)
    assert_share((operations >= 0).all(dim=1), 0.25)  # independent
    assert_share(negative, 0.5)
    assert_share(magnitudes == 10.0, 0.5 * math.erfc(math.sqrt(2.0)))  # beyond two standard deviations
    assert_share(magnitudes < 9.0, 0.5)
    assert_share(magnitudes < 8.5, 0.5 * math.erfc(math.sqrt(0.5)))


def test_a_flipped_item_is_augmented_flipped_and_handed_back_as_it_came() -> None:
    drawn = zip(*draw(keys(5), strong=Strong(op_prob=1.0, num_ops=4)), strict=True)
    for image, (operations, magnitudes, negative) in zip(pictures(), drawn, strict=True):
        arguments = {"operations": operations, "magnitudes": magnitudes, "negative": negative, "mean": MEAN}
        flipped = rand_augment(image, flipped=True, **arguments)
        straight = rand_augment(image.flip(2), flipped=False, **arguments)
        assert torch.equal(flipped.flip(2), straight) and not torch.equal(flipped, image)


@pytest.mark.slow
def test_as_many_views_are_strong_as_asked_and_each_local_draws_for_itself() -> None:
    # Erasing everything that is strong marks it: noise outside [0, 1] in a view that is 8 x 8 to be quick.
    strong = Strong(prob=0.3, num_ops=0, erase_prob=1.0)
    batch = inputs(4000)
    batch["images"] = torch.full((4000, 3, 8, 8), 128, dtype=torch.uint8)
    crops = MultiCrop([spec(8)], [spec(8, strong=strong, count=2)], [spec(8, strong=strong), spec(8, strong=strong)])
    views = views_of(crops, **batch, mean=(0.0,) * 3, std=(1.0,) * 3)
    marked = (views.groups["local"].items.flatten(2) - 128 / 255).abs().amax(dim=2) > 1e-3  # [L B]
    for view in marked:
        assert_share(view, 0.3)
    assert_share(marked.all(dim=0), 0.09)
    students = (views.groups["student"].items.flatten(2) - 128 / 255).abs().amax(dim=2) > 1e-3  # [S B]
    assert torch.equal(students[0], students[1])
    strong = views.groups["student"].strong
    assert torch.equal(strong, students[0])
    assert_share(strong, 0.3)
    assert_share(students[0] & marked[0], 0.09)


# Erasing


def test_rectangles_have_timms_area_ratio_and_place() -> None:
    size = (60, 80)
    box = rectangles(keys(DRAWS), size=size, prob=0.25).double()
    erased = box[:, 2] > 0
    assert_share(erased, 0.25)
    top, left, bottom, right = box[erased].unbind(1)
    assert (box[~erased] == 0).all() and (top >= 0).all() and (left >= 0).all() and (bottom <= 60).all() and (right <= 80).all()
    height, width = bottom - top, right - left
    # Rounding to whole pixels moves each side by half a pixel.
    area = height * width / math.prod(size)
    assert area.min() > AREA[0] * 0.85 and area.max() < AREA[1] * 1.05
    assert (height - 0.5).div(width + 0.5).min() > 0 and (height + 0.5).div(width - 0.5).min() >= ASPECT[0]
    assert (height - 0.5).div(width + 0.5).max() <= ASPECT[1]
    placed = top / (60 - height)  # uniform from end to end
    error = 1 / math.sqrt(12 * len(placed))
    assert abs(placed.mean() - 0.5) <= ERRORS * error * 1.1  # of few places the deviation is a little larger
    assert top.min() == 0 and (bottom.max(), right.max()) == (60, 80)


def test_bounds_of_erasing_are_timms() -> None:
    parameters = inspect.signature(RandomErasing).parameters
    assert (parameters["min_area"].default, parameters["max_area"].default) == AREA
    assert (parameters["min_aspect"].default, 1 / parameters["min_aspect"].default) == ASPECT


def test_erased_area_and_ratio_are_distributed_as_timms() -> None:
    random.seed(7)
    size, count = (48, 48), 3000
    reference = RandomErasing(1.0, mode="const", device="cpu")
    boxes = []
    for _ in range(count):
        rows, columns = (reference(torch.ones(1, *size))[0] == 0).nonzero().unbind(1)
        boxes.append([rows.max() - rows.min() + 1, columns.max() - columns.min() + 1, rows.min(), columns.min()])
    theirs = torch.tensor(boxes).double()
    top, left, bottom, right = rectangles(keys(DRAWS), size=size, prob=1.0).double().unbind(1)
    mine = torch.stack((bottom - top, right - left, top, left), dim=1)
    for measure in (
        lambda b: b[:, 0] * b[:, 1],
        lambda b: (b[:, 0] / b[:, 1]).log(),
        lambda b: b[:, 0] ** 2,
        lambda b: b[:, 2],
        lambda b: b[:, 3],
    ):
        a, b = measure(mine), measure(theirs)
        error = math.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) <= ERRORS * error
        assert 0.9 < a.std() / b.std() < 1.1


def test_erased_pixels_are_standard_normal_and_the_rest_stays() -> None:
    images = torch.full((300, 3, 20, 24), 0.5)
    item_keys = keys(300)
    always = spec((20, 24), strong=Strong(erase_prob=1.0))
    changes = draw_erasing([always], keys=item_keys[None], selected=(torch.arange(300) != 7)[None])
    erased = apply_changes(images.clone(), changes, operations=OPERATIONS_OF_VIEWS)
    changed = erased != 0.5
    box = rectangles(item_keys, size=(20, 24), prob=1.0)
    sides = box[:, 2:] - box[:, :2]
    area = torch.where(torch.arange(300) == 7, 0, sides.prod(dim=1))
    assert torch.equal(changed.flatten(1).sum(dim=1), 3 * area)
    noise = erased[changed]
    assert abs(noise.mean()) <= ERRORS / math.sqrt(len(noise))
    assert abs(noise.var() - 1) <= ERRORS * math.sqrt(2 / len(noise))
    assert abs((noise**4).mean() - 3) <= ERRORS * math.sqrt(96 / len(noise))
    one = erased[0].flatten(1)[:, changed[0, 0].flatten()]  # [3 pixels]
    assert torch.corrcoef(one).triu(1).abs().max() < ERRORS / math.sqrt(one.shape[1])  # channels have noise of their own
    assert len(noise.unique()) > 0.98 * len(noise)


def test_noise_is_normalised_with_the_view() -> None:
    views = views_of(MultiCrop([spec(strong=Strong(prob=1.0, num_ops=0, erase_prob=1.0))]), **inputs(), mean=(0.0,) * 3, std=(1.0,) * 3)
    scaled = views_of(MultiCrop([spec(strong=Strong(prob=1.0, num_ops=0, erase_prob=1.0))]), **inputs(), mean=MEAN, std=STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(scaled.groups["global"].items, (views.groups["global"].items - mean) / std)
    assert views.groups["global"].items.max() > 1.5 and views.groups["global"].items.min() < -0.5


# The multi-crop


def test_student_views_change_no_other_view() -> None:
    batch = inputs()
    crops = mugs()
    with_own = views_of(crops, **batch, mean=MEAN, std=STD)
    without = views_of(MultiCrop(list(crops.global_views), list(crops.local_views)), **batch, mean=MEAN, std=STD)
    for name in ("global", "local"):
        assert torch.equal(with_own.groups[name].items, without.groups[name].items), name
        assert torch.equal(with_own.groups[name].frame, without.groups[name].frame), name
    assert "student" not in without.groups
    assert with_own.groups["student"].items.shape == (2, 11, 3, 24, 24) and crops.groups(3)["student"] == (2, (3, 24, 24))
    assert with_own.groups["student"].strong.shape == (11,) and with_own.groups["student"].strong.dtype == torch.bool
    assert not torch.equal(with_own.groups["student"].items, with_own.groups["global"].items)


def test_weak_views_are_those_without_strong_and_strong_ones_are_not() -> None:
    batch = inputs(40)
    views = views_of(mugs(), **batch, mean=MEAN, std=STD)
    plain = views_of(mugs(None), **batch, mean=MEAN, std=STD)
    views, plain = views.groups["student"], plain.groups["student"]
    weak = ~views.strong
    assert not plain.strong.any()
    assert 5 < weak.sum() < 35
    # A matrix product may add in another order for another batch size; divided by std that is 5e-7 of a level.
    torch.testing.assert_close(views.items[:, weak], plain.items[:, weak], rtol=0, atol=2e-5)
    off = (views.items - plain.items)[:, ~weak].abs().flatten(2).amax(dim=2)
    assert (off.amax(dim=0) > 1e-2).all()  # one view alone may be spared by all that is random
    assert torch.equal(views.frame, plain.frame)


def test_a_batch_in_two_halves_gives_the_same_views() -> None:
    batch = inputs(10)
    whole = views_of(mugs(), **batch, mean=MEAN, std=STD)
    halves = [
        views_of(mugs(), **{name: value[part] for name, value in batch.items()}, mean=MEAN, std=STD) for part in (slice(0, 4), slice(4, 10))
    ]
    for name in ("global", "local", "student"):
        joined = torch.cat([half.groups[name].items for half in halves], dim=1)
        torch.testing.assert_close(joined, whole.groups[name].items, rtol=0, atol=2e-5)
    assert torch.equal(torch.cat([half.groups["student"].strong for half in halves]), whole.groups["student"].strong)


def test_nothing_waits_for_the_device() -> None:
    # A fake tensor has no values: whatever asks for one, or for a shape that depends on one, raises. On a CPU asking is free.
    strong = spec(strong=Strong(), blur_prob=0.1, **COLOURS)
    crops, batch = MultiCrop([spec()], [ViewSpec(16, (0.05, 0.25), strong=Strong(), **COLOURS)], [strong]), inputs()
    parts = crops.prepare(items_of(batch["images"]), keys=batch["keys"], card=card_of(MEAN, STD))
    views, _ = made_of_fakes(crops, parts, keys=batch["keys"], card=card_of(MEAN, STD))
    assert views.groups["student"].items.shape == (1, 11, 3, 24, 24) and views.groups["local"].items.shape == (1, 11, 3, 16, 16)
    assert views.groups["student"].strong.device.type == "cuda"


def test_a_strong_view_is_the_crop_of_the_augmented_item() -> None:
    batch = inputs()
    strong = Strong(prob=1.0, op_prob=1.0, num_ops=3, erase_prob=0.0)
    views = views_of(MultiCrop([spec(32, strong=strong, flip=0.0)]), **batch, mean=(0.0,) * 3, std=(1.0,) * 3)
    items = {**batch, "images": rand_augment_of(batch, strong)}
    expected = views_of(MultiCrop([spec(32, flip=0.0)]), **items, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(views.groups["global"].frame, expected.groups["global"].frame)
    torch.testing.assert_close(views.groups["global"].items, expected.groups["global"].items, rtol=0, atol=2e-5)


def rand_augment_of(batch: dict, strong: Strong) -> Tensor:
    from glpretrain.data.views.multicrop import _RAND_AUGMENT

    view_keys = rng.fold_in(rng.fold_in(batch["keys"], 0), _RAND_AUGMENT)
    drawn = zip(batch["images"], *draw(view_keys, strong=strong), strict=True)
    names = ("operations", "magnitudes", "negative")
    made = [rand_augment(image, flipped=False, mean=(0.0,) * 3, **dict(zip(names, one, strict=True))) for image, *one in drawn]
    return torch.stack(made)


# Settings and the batch


@pytest.mark.parametrize(
    ("field", "value"),
    [("prob", 1.5), ("num_ops", 16), ("num_ops", -1), ("magnitude", 11.0), ("magnitude_std", -0.5), ("op_prob", -0.1), ("erase_prob", 2.0)],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Strong: {field} is {value}; expected"):
        dataclasses.replace(Strong(), **{field: value})


def test_student_views_must_agree() -> None:
    with pytest.raises(ValueError, match=r"student_views have strong .* give all of them the same"):
        MultiCrop([spec()], None, [spec(strong=Strong()), spec()])
    with pytest.raises(ValueError, match=r"global_views and student_views have sizes \[\(16, 16\), \(24, 24\)\]"):
        MultiCrop([spec()], None, [spec(16)])


def test_strong_views_need_rgb() -> None:
    with pytest.raises(ValueError, match="strong needs RGB items, but these have 5 channels; leave strong out"):
        views_of(MultiCrop([spec(strong=Strong())]), **inputs(channels=5), mean=(0.5,) * 5, std=(0.2,) * 5)


def test_a_recipe_can_say_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--views", type=MultiCrop)
    view = {"size": 24, "scale": [0.25, 1.0]}
    settings = {"global_views": [view], "student_views": [{**view, "count": 2, "strong": {"prob": 0.25, "erase_prob": 0.5}}]}
    views = parser.instantiate(
        parser.parse_object({"views": {"class_path": "glpretrain.data.views.MultiCrop", "init_args": settings}})
    ).views
    assert views.student_views[0].strong == Strong(prob=0.25, erase_prob=0.5)
    assert views.global_views[0].strong is None


class FakeEncoder:
    """As much of an encoder as the data needs to know."""

    card = EncoderCard("fake", {}, "image", (3, 24, 24), (8, 8), 5, MEAN, STD)

    def grid(self, item_shape: tuple[int, ...]) -> tuple[int, int]:
        return item_shape[1] // 8, item_shape[2] // 8


def test_a_batch_holds_student_views_and_which_are_weak() -> None:
    data = DataModule(Scenes(12, size=28), mugs(), batch_size=7)
    encoder = FakeEncoder()
    batch = data.make_batch(data.raw_batch(range(7), encoder=encoder, epoch=0), encoder=encoder)
    assert batch.views["student"].items.shape == (2, 7, 3, 24, 24)
    assert batch.views["student"].strong.shape == (7,)
    assert {name: made.parts for name, made in data.made().items()} == {"global": set(), "local": set(), "student": {"strong"}}
    plain = DataModule(Scenes(12, size=28), MultiCrop([spec()]), batch_size=7)
    batch = plain.make_batch(plain.raw_batch(range(7), encoder=encoder, epoch=0), encoder=encoder)
    assert set(batch.views) == set(plain.made()) == {"global"}
