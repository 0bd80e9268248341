"""Views of clouds: keyed, distributed as they say, and the corruption that leaves centres where they are."""

import pytest
import torch
from golden import noise
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.clouds import in_unit_sphere, take
from glpretrain.core.frames import places
from glpretrain.data import Scenes, Solids
from glpretrain.data.module import DataModule
from glpretrain.data.views import MultiCrop, PointCrops, PointViewSpec, ViewSpec
from glpretrain.data.views.points import rotations, view_of
from glpretrain.encoders import PointTransformer
from glpretrain.masking import RandomMask

CLOUDS = in_unit_sphere(noise(5, 200, 3, name="views"))


def keys(count: int = 5, *, epoch: int = 0) -> Tensor:
    return rng.item_keys(seed=3, epoch=epoch, index=torch.arange(count))


def rows(cloud: Tensor) -> set[tuple]:
    return {tuple(row) for row in cloud.tolist()}


FULL = {"scale": (0.5, 1.5), "translation": 0.3, "jitter": 0.02, "rotation": "any", "dropout": 0.5}


def test_a_view_depends_on_its_items_key_only() -> None:
    crops = PointCrops([PointViewSpec(64, keep=(0.3, 0.8), count=2, **FULL)], [PointViewSpec(32, keep=(0.2, 0.4), count=3, **FULL)])
    whole = crops(CLOUDS, keys=keys())
    part = crops(CLOUDS[2:4], keys=keys()[2:4])
    assert whole.groups["global"].items.shape == (2, 5, 64, 3) and whole.groups["local"].items.shape == (3, 5, 32, 3)
    assert torch.equal(whole.groups["global"].items[:, 2:4], part.groups["global"].items) and torch.equal(
        whole.groups["local"].items[:, 2:4], part.groups["local"].items
    )
    assert not torch.equal(whole.groups["global"].items[0], whole.groups["global"].items[1])
    assert not torch.equal(whole.groups["global"].items, crops(CLOUDS, keys=keys(epoch=1)).groups["global"].items)


def test_one_more_view_leaves_the_others_as_they_were() -> None:
    local, coarse = [PointViewSpec(32, keep=(0.2, 0.4))], [PointViewSpec(16, sampling="farthest")]
    one = PointCrops([PointViewSpec(64)], local, coarse)(CLOUDS, keys=keys())
    two = PointCrops([PointViewSpec(64, count=2)], local, coarse)(CLOUDS, keys=keys())
    assert torch.equal(one.groups["global"].items, two.groups["global"].items[:1]) and torch.equal(
        one.groups["local"].items, two.groups["local"].items
    )
    assert torch.equal(one.groups["coarse_16"].items, two.groups["coarse_16"].items)


def test_all_views_of_an_epoch_are_made_from_one_part_of_the_points() -> None:
    specs = [PointViewSpec(30, count=2)], [PointViewSpec(20, keep=(0.5, 0.5))]
    crops, whole = PointCrops(*specs, num_points=40), PointCrops(*specs)
    parts = []
    for epoch in (0, 1):
        groups = crops(CLOUDS, keys=keys(epoch=epoch)).groups
        parts.append([rows(group[0]) | rows(group[1]) | rows(local) for group, local in zip(*_views(groups), strict=True)])
    assert all(25 < len(part) <= 40 and part < rows(cloud) for part, cloud in zip(parts[0], CLOUDS, strict=True))
    assert all(len(first & second) < 20 for first, second in zip(*parts, strict=True))  # 8 of 40 points in common on average
    chosen = take(CLOUDS, rng.permutation(rng.fold_in(keys(), 1 << 18), 200)[:, :40])
    assert torch.equal(crops(CLOUDS, keys=keys()).groups["local"].items, whole(chosen, keys=keys()).groups["local"].items)


def _views(groups: dict[str, ViewGroup]) -> tuple[Tensor, Tensor]:
    return groups["global"].items.transpose(0, 1), groups["local"].items[0]


def test_a_crop_is_the_neighbourhood_of_one_of_its_points() -> None:
    view = view_of(CLOUDS, spec=PointViewSpec(40, keep=(0.2, 0.2)), keys=keys())[0]  # all 40 of 200 points
    for cloud, crop in zip(CLOUDS, view, strict=True):
        assert rows(crop) <= rows(cloud) and len(rows(crop)) == 40
        spreads = [(cloud - point).norm(dim=1).argsort()[:40] for point in crop]
        assert any(rows(cloud[nearest]) == rows(crop) for nearest in spreads)


def test_a_view_without_crop_is_a_random_part_without_repeats() -> None:
    view = view_of(CLOUDS, spec=PointViewSpec(150), keys=keys())[0]
    for cloud, part in zip(CLOUDS, view, strict=True):
        assert rows(part) <= rows(cloud) and len(rows(part)) == 150


def test_a_crop_with_too_few_points_is_completed_by_means_of_four() -> None:
    view = view_of(CLOUDS, spec=PointViewSpec(60, keep=(0.2, 0.2)), keys=keys())[0]
    for cloud, part in zip(CLOUDS, view, strict=True):
        own = [tuple(row) in rows(cloud) for row in part.tolist()]
        assert all(own[:40]) and not any(own[40:])
        crop = part[:40]
        for row in part[40:]:
            means = torch.stack([crop[(crop - point).norm(dim=1).argsort()[:4]].mean(dim=0) for point in crop])
            assert (means - row).norm(dim=1).min() < 1e-5


def test_shares_of_crops_fill_their_range() -> None:
    clouds = CLOUDS[:1].expand(200, -1, -1)
    view = view_of(clouds, spec=PointViewSpec(200, keep=(0.3, 0.9)), keys=keys(200))[0]
    kept = torch.tensor([len(rows(part) & rows(CLOUDS[0])) for part in view]) / 200
    assert kept.min() >= 0.3 and kept.max() <= 0.91 and abs(kept.mean() - 0.6) < 0.05 and kept.std() > 0.1


def test_farthest_sampling_spreads_points() -> None:
    def closest(view: Tensor) -> Tensor:
        distance = torch.cdist(view, view) + 9.0 * torch.eye(view.shape[1])
        return distance.amin(dim=(1, 2))

    spread, random = (view_of(CLOUDS, spec=PointViewSpec(20, sampling=name), keys=keys())[0] for name in ("farthest", "random"))
    assert (closest(spread) > closest(random)).all()
    inside = view_of(CLOUDS, spec=PointViewSpec(20, keep=(0.2, 0.2), sampling="farthest"), keys=keys())[0]
    for cloud, part in zip(CLOUDS, inside, strict=True):
        assert len(rows(part)) == 20 and rows(part) <= rows(cloud)


@pytest.mark.parametrize("axis", ["x", "y", "z", "any"])
def test_rotations_are_rotations_and_leave_their_axis_alone(axis: str) -> None:
    turned = rotations(keys(500), axis=axis)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(3).expand(500, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(500), atol=1e-5, rtol=0)
    for number, name in enumerate("xyz"):
        direction = turned[:, :, number]
        if name == axis:
            torch.testing.assert_close(direction, torch.eye(3)[number].expand(500, -1), atol=1e-6, rtol=0)
        else:  # uniform: the mean of a unit vector is near zero (3 sigma of 500 draws: 0.1)
            assert direction.mean(dim=0).norm() < 0.12


def test_scale_translation_jitter_and_dropout_stay_in_their_ranges() -> None:
    ones = torch.ones(300, 50, 3)
    scaled = view_of(ones, spec=PointViewSpec(50, scale=(0.5, 2.0)), keys=keys(300))[0]
    assert scaled.min() >= 0.5 and scaled.max() <= 2.0 and (scaled == scaled[:, :1]).all() and scaled[:, 0].std(dim=0).min() > 0.3
    moved = view_of(ones, spec=PointViewSpec(50, translation=0.2), keys=keys(300))[0] - 1.0
    assert moved.abs().max() <= 0.2001 and (moved == moved[:, :1]).all() and moved[:, 0].std(dim=0).min() > 0.08
    noisy = view_of(ones, spec=PointViewSpec(50, jitter=0.03, jitter_limit=0.05), keys=keys(300))[0] - 1.0
    assert noisy.abs().max() <= 0.0501 and abs(noisy.std() - 0.0265) < 0.001  # of a normal cut at 5/3 sigma, piled up there
    dropped = view_of(CLOUDS[:1].expand(300, -1, -1), spec=PointViewSpec(200, dropout=0.8), keys=keys(300))[0]
    share = (dropped == dropped[:, :1]).all(dim=2).float().mean(dim=1)
    assert abs(share.mean() - 0.4) < 0.05 and share.max() < 0.95


def test_coarse_views_have_their_own_numbers_of_points() -> None:
    crops = PointCrops([PointViewSpec(64)], None, [PointViewSpec(32, count=2, sampling="farthest"), PointViewSpec(8)])
    views = crops(CLOUDS, keys=keys())
    shapes = {name: tuple(group.items.shape) for name, group in views.groups.items()}
    assert shapes == {"global": (1, 5, 64, 3), "coarse_32": (2, 5, 32, 3), "coarse_8": (1, 5, 8, 3)}
    assert crops.groups(3) == {"global": (1, (64, 3)), "coarse_32": (2, (32, 3)), "coarse_8": (1, (8, 3))}


def test_frames_take_points_of_a_view_back_to_the_cloud() -> None:
    settings = {name: value for name, value in FULL.items() if name not in ("jitter", "dropout")}
    view, frame = view_of(CLOUDS, spec=PointViewSpec(200, **settings), keys=keys())
    back = places(frame, view)
    for cloud, points in zip(CLOUDS, back, strict=True):  # all points, in another order
        assert (torch.cdist(points, cloud, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1) < 1e-5).all()


def test_a_data_module_makes_batches_of_clouds() -> None:
    specs = [PointViewSpec(48, keep=(0.5, 0.9), count=2)], [PointViewSpec(32, keep=(0.2, 0.5))], [PointViewSpec(16)]
    data = DataModule(Solids(12, num_points=80), PointCrops(*specs, item_points=64), batch_size=4, mask=RandomMask(0.5))
    encoder = PointTransformer("point_mae", num_points=48, group_size=8, embed_dim=12, depth=1, num_heads=2)
    batch = data.make_batch(data.raw_batch([3, 5], encoder=encoder, epoch=0), encoder=encoder)
    assert batch.views["global"].items.shape == (2, 2, 48, 3) and batch.views["local"].items.shape == (1, 2, 32, 3)
    assert batch.views["global"].mask.shape == (2, 2, encoder.grid((48, 3))[0])
    parts = {name: made.parts for name, made in data.made().items()}
    assert parts == {"global": {"mask"}, "local": set(), "coarse_16": set()}
    assert [source.name for source in data.labelled_sources()] == ["solids", "solids"] and data.masked_source().has_masks


def test_views_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="source 'scenes' has items of kind image, but PointCrops makes views of kind points"):
        DataModule(Scenes(4), PointCrops([PointViewSpec(32)]), batch_size=2)
    with pytest.raises(ValueError, match="source 'solids' has items of kind points, but MultiCrop makes views of kind image"):
        DataModule(Solids(4), MultiCrop([ViewSpec(32, scale=(0.5, 1.0))]), batch_size=2)
    with pytest.raises(ValueError, match=r"10 points of an item leave fewer than 4 where keep is 0\.2; raise one"):
        PointCrops([PointViewSpec(32, keep=(0.2, 0.5))], item_points=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 0}, "points and count are at least 1"),
        ({"keep": (0.0, 0.5)}, "keep is a"),
        ({"keep": (0.5, 1.5)}, "keep is a"),
        ({"scale": (2.0, 1.0)}, "scale is a"),
        ({"sampling": "grid"}, "sampling is"),
        ({"rotation": "w"}, "rotation is"),
        ({"jitter": -0.1}, "jitter is at least 0"),
        ({"dropout": 1.0}, "dropout is a share"),
    ],
)
def test_bad_specs_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointViewSpec(**{"points": 8, **arguments})


def test_bad_crops_are_named() -> None:
    with pytest.raises(ValueError, match="num_points is at least 1, or null for all, not 0"):
        PointCrops([PointViewSpec(64)], num_points=0)
    with pytest.raises(ValueError, match="num_points is 64, but an item has item_points = 63"):
        PointCrops([PointViewSpec(32)], num_points=64, item_points=63)
    with pytest.raises(ValueError, match="global_views is empty"):
        PointCrops([])
    with pytest.raises(ValueError, match=r"local_views have \[16, 32\] points"):
        PointCrops([PointViewSpec(64)], [PointViewSpec(16), PointViewSpec(32)])
