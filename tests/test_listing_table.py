"""A million images in a simulated folder: bounds of what `python tests/listing_table.py` measures."""

import pytest
from listing_table import table

from glpretrain.data.orders import EpochBatches, Position, Shuffled


@pytest.mark.slow
def test_a_million_files_take_seconds_and_few_bytes_each() -> None:
    found = table(classes=20_000, per_class=50)
    for what in ("first", "second", "first list", "second list"):
        assert (found[what]["items"], found[what]["classes"]) == (1_000_000, 20_000)
        assert found[what]["own"] * 2**20 < 100 * 1_000_000 and found[what]["worker"] < 40
    # CPU seconds; measured are 0.8, 1.7, 0.2 and 0.1.
    assert found["first"]["cpu"] - found["walk"]["cpu"] < 4 and found["first list"]["cpu"] < 6
    assert max(found["second"]["cpu"], found["second list"]["cpu"]) < 1.5
    assert max(found["first"]["peak"], found["first list"]["peak"]) < 250  # MB; lists of Python strings would take more
    assert max(found["second"]["own"], found["second list"]["own"]) < 20  # MB: the listing is mapped,
    assert found["second"]["sent"] < 2 and found["second list"]["sent"] < 10  # and a worker is sent its name
    order = EpochBatches(Shuffled(), length=1_000_000, batch_size=64, rank=0, world_size=1, seed=0)
    for what, position in (("begin", Position(0, 0)), ("resume", Position(2, 7812))):
        order.resume(position)
        assert (found[what]["batch"], found[what]["item"]) == (position.batches_done, next(iter(order)).indices[0])
        assert found[what]["seconds"] < 10  # measured is 0.6
        assert found[what]["own"] < 60 and found[what]["worker"] < 150  # MB; the order of the epoch is 8
