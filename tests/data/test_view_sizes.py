"""Views whose sizes are drawn at every step: the shares, that all processes and workers draw the same, resumption, and refusals."""

import math
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from test_module import FakeEncoder, Ramp, Recorder, trainer
from view_parts import views_of

from glpretrain.core import keys as rng
from glpretrain.core.batch import Batch
from glpretrain.data.items import Asked, batches_of, step_key
from glpretrain.data.module import DataModule
from glpretrain.data.orders import EpochBatches, Shuffled
from glpretrain.data.views import MultiCrop, ViewSizes, ViewSpec
from glpretrain.masking import DINOv3Mask, RandomMask

SIZES = ((16, 8, 24), (24, 8, 32), (24, 12, 32), (24, 16, 40))  # of global views, local views and clean crops
SHARES = (0.3, 0.4, 0.25, 0.05)
COLOURS = {"brightness": 0.4, "hue": 0.1, "blur_prob": 0.5, "solarize_prob": 0.2}


def crops(number: int = 0, *, others: bool = True) -> MultiCrop:
    """Views whose own sizes are those of `number`, with the others beside them or without."""
    sizes = [ViewSizes(share, *size) for share, size in zip(SHARES[1:], SIZES[1:], strict=True)]
    (side, local, clean) = SIZES[number]
    return MultiCrop(
        [ViewSpec(side, (0.3, 1.0), count=2, **COLOURS)],
        [ViewSpec(local, (0.05, 0.3), count=3, **COLOURS)],
        clean_size=clean,
        other_sizes=sizes if others else None,
    )


def data(*, num_workers: int = 0, mask: bool = True, batch_size: int = 3, length: int = 23) -> DataModule:
    """Items, of which three batches of two accumulate or seven do not, in sizes that change from step to step."""
    hides = {"mask": DINOv3Mask(prob=0.5, ratio=(0.2, 0.5))} if mask else {}
    return DataModule(Ramp(length), crops(), batch_size=batch_size, cache=False, num_workers=num_workers, **hides)


class Sizes(Recorder):
    """Keeps the sizes of every batch too."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = {name: use._replace(required=False) for name, use in self.uses.items()} | {"clean": self.uses["local"]}
        self.sizes: list[tuple[int, ...]] = []
        self.masks: list[torch.Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.sizes.append(sizes_of(batch))
        self.masks.append(batch.views["global"].mask)
        return super().training_step(batch, batch_idx)


def sizes_of(batch: Batch) -> tuple[int, ...]:
    return tuple(batch.views[name].items.shape[-1] for name in ("global", "local", "clean"))


def test_each_size_has_its_share_of_the_steps() -> None:
    maker, counts, steps = crops(), torch.zeros(4), 4000
    for step in range(steps):
        counts[maker.drawn_size(step_key(seed=3, epoch=step // 100, step=step % 100))] += 1
    for count, share in zip(counts.tolist(), SHARES, strict=True):  # within four standard errors
        assert abs(count / steps - share) < 4.0 * math.sqrt(share * (1.0 - share) / steps)


def test_the_bounds_of_the_shares_are_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    maker, drawn = crops(), []
    for draw in (0.0, 0.2999, 0.3001, 0.6999, 0.7001, 0.9499, 0.9501, 1.0 - 2.0**-24):
        monkeypatch.setattr(rng, "uniform", lambda key, *shape, draw=draw: torch.full(shape, draw))
        drawn.append(maker.drawn_size(torch.tensor(0)))
    assert drawn == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_key_of_a_step_is_not_that_of_an_item() -> None:
    """Otherwise sizes would go together with the crops of the item that has the number of the step."""
    keys = [step_key(seed=1, epoch=2, step=step) for step in range(50)]
    items = rng.item_keys(seed=1, epoch=2, index=torch.arange(50))
    assert len({int(key) for key in (*keys, *items)}) == 100


@pytest.mark.parametrize("number", range(4))
def test_views_of_every_size_are_those_of_a_maker_of_that_size(number: int) -> None:
    """And lie at the same places, whatever the size."""
    pictures = torch.stack([Ramp(5)[index].values for index in range(5)])
    inputs = {"images": pictures, "keys": rng.item_keys(seed=3, epoch=1, index=torch.arange(5)), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    own, alone = (views_of(maker, **inputs).groups for maker in (crops().of_each_size()[number], crops(number, others=False)))
    first = views_of(crops(), **inputs).groups
    assert list(own) == ["global", "local", "clean"]
    for name, group in own.items():
        assert torch.equal(group.items, alone[name].items) and torch.equal(group.frame, first[name].frame)
    assert sizes_of(Batch(torch.arange(5), own, torch.ones(5))) == SIZES[number]


def test_pictures_are_kept_large_enough_for_the_largest_size() -> None:
    assert crops().ample_side() == crops(3, others=False).ample_side() > crops(others=False).ample_side()
    assert crops().groups(3) == crops(others=False).groups(3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_processes_and_workers_draw_the_same_sizes(num_workers: int) -> None:
    """Two processes see other items, and masks of other items, of the same sizes."""
    module, encoder, seen = data(), FakeEncoder(), []
    for rank in range(2):
        order = EpochBatches(Shuffled(), length=60, batch_size=3, rank=rank, world_size=2, seed=0)
        order.set_epoch(0)
        raw = list(batches_of(DataModule(Ramp(60), crops(), batch_size=3)._prepared(encoder), order, num_workers=num_workers))
        seen.append([sizes_of(module.make_batch(one, encoder=encoder)) for one in raw])
        assert [asked.step for asked in order] == list(range(10))
    assert seen[0] == seen[1] and len(set(seen[0])) >= 3
    assert seen[0] == [SIZES[crops().drawn_size(step_key(seed=0, epoch=0, step=step))] for step in range(10)]


def test_masks_and_tokens_follow_the_drawn_size() -> None:
    module, encoder = data(), FakeEncoder()
    shapes = set()
    for step in range(12):
        batch = module.make_batch(module.raw_batch(range(3), encoder=encoder, epoch=0, step=step), encoder=encoder)
        group, side = batch.views["global"], SIZES[crops().drawn_size(step_key(seed=0, epoch=0, step=step))][0]
        assert group.mask.shape == (2, 3, (side // 4) ** 2)
        assert torch.equal(group.hidden, group.mask.flatten().nonzero().squeeze(1)) and len(group.hidden) > 0
        shapes.add(group.mask.shape)
    assert len(shapes) == 2


def test_batches_that_are_not_asked_for_by_a_step_have_the_own_sizes() -> None:
    module, encoder = data(), FakeEncoder()
    for epoch in range(5):
        assert sizes_of(module.make_batch(module.raw_batch(range(3), encoder=encoder, epoch=epoch), encoder=encoder)) == SIZES[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_has_the_sizes_of_an_uninterrupted_one(tmp_path: Path, num_workers: int) -> None:
    """Cut in the second of three epochs of seven steps."""
    whole, first, second = Sizes(), Sizes(), Sizes()
    trainer(tmp_path, max_steps=17).fit(whole, datamodule=data(num_workers=num_workers))
    saver = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="nine", every_n_train_steps=9)
    trainer(tmp_path, max_steps=9, callbacks=[saver], enable_checkpointing=True).fit(first, datamodule=data(num_workers=num_workers))
    trainer(tmp_path, max_steps=17).fit(second, datamodule=data(num_workers=num_workers), ckpt_path=tmp_path / "nine.ckpt")
    assert len(whole.sizes) == 17 and len(set(whole.sizes)) >= 3
    assert first.sizes + second.sizes == whole.sizes and first.seen + second.seen == whole.seen
    assert whole.sizes[:7] != whole.sizes[7:14], "every epoch draws anew"


def test_accumulated_batches_of_a_step_have_one_size(tmp_path: Path) -> None:
    model = Sizes()
    trainer(tmp_path, max_steps=7, accumulate_grad_batches=3).fit(model, datamodule=data(batch_size=1))
    steps = [model.sizes[start : start + 3] for start in range(0, 21, 3)]
    assert all(len(set(step)) == 1 for step in steps) and len({step[0] for step in steps}) >= 2


def settings(**changed: object) -> list[ViewSizes]:
    return [ViewSizes(**{"share": 0.4, "global_size": 24, "local_size": 12, "clean_size": 32} | changed)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"share": 1.0}, "ViewSizes: share is 1.0; expected a share of the steps in (0, 1)"),
        ({"share": 0.0}, "ViewSizes: share is 0.0"),
        ({"local_size": None}, "other_sizes: local_size is None; give local_size, the recipe has local views"),
        ({"clean_size": None}, "other_sizes: clean_size is None; give clean_size, the recipe has clean views"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MultiCrop([ViewSpec(16, (0.3, 1.0))], [ViewSpec(8, (0.1, 0.3))], clean_size=24, other_sizes=settings(**sizes))


def test_sizes_of_views_that_are_not_there_and_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="local_size is 12; leave it out, the recipe has no local views"):
        MultiCrop([ViewSpec(16, (0.3, 1.0))], clean_size=24, other_sizes=settings())
    with pytest.raises(ValueError, match=r"other_sizes have shares of 1\.2 together; expected below 1"):
        MultiCrop([ViewSpec(16, (0.3, 1.0))], other_sizes=settings(local_size=None, clean_size=None) * 3)


def test_a_size_that_does_not_divide_by_the_patch_fails_before_the_first_step(tmp_path: Path) -> None:
    maker = MultiCrop([ViewSpec(16, (0.3, 1.0))], other_sizes=settings(global_size=18, local_size=None, clean_size=None))
    with pytest.raises(ValueError, match="view of 18 x 18 does not divide by patch 4"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), datamodule=DataModule(Ramp(23), maker, batch_size=3))


def test_a_method_that_keeps_something_for_every_place_refuses_several_sizes(tmp_path: Path) -> None:
    model = Recorder()
    model.uses = {"global": model.uses["global"]._replace(one_size=True)}
    maker = MultiCrop([ViewSpec(16, (0.3, 1.0))], other_sizes=settings(local_size=None, clean_size=None))
    for views, fits in ((MultiCrop([ViewSpec(16, (0.3, 1.0))]), True), (maker, False)):
        module = DataModule(Ramp(23), views, batch_size=3, mask=RandomMask(0.5))
        if fits:
            trainer(tmp_path, max_steps=1).fit(model, datamodule=module)
            continue
        with pytest.raises(ValueError, match=r"Recorder needs global views of one size, not of 2: leave data\.views\.other_sizes out"):
            trainer(tmp_path, max_steps=1).fit(model, datamodule=module)


def test_a_worker_is_asked_for_the_step_and_says_which_sizes_it_made() -> None:
    prepared = data()._prepared(FakeEncoder())
    for step in range(6):
        raw = prepared[Asked(0, [0, 1], step)]
        assert raw.size == crops().drawn_size(step_key(seed=0, epoch=0, step=step))
        assert raw.parts["crops_{0}x{0}".format(SIZES[raw.size][0])].shape[0] == 2
