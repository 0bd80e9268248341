"""A million images in a simulated folder: bounds of what `python tests/listing_table.py` measures."""

import pytest
from listing_table import table


@pytest.mark.slow
def test_a_million_files_take_seconds_and_few_bytes_each() -> None:
    found = table(classes=20_000, per_class=50)
    for what in ("first", "second", "list"):
        assert (found[what]["items"], found[what]["classes"]) == (1_000_000, 20_000)
        assert found[what]["own"] * 2**20 < 100 * 1_000_000 and found[what]["worker"] < 40
    # CPU seconds; measured are 0.9, 0.2 and 1.4.
    assert found["first"]["cpu"] - found["walk"]["cpu"] < 4 and found["second"]["cpu"] < 1.5 and found["list"]["cpu"] < 6
    assert found["second"]["own"] < 20 and found["second"]["sent"] < 2  # MB: the listing is mapped, and only its name is sent
    assert max(found["first"]["peak"], found["list"]["peak"]) < 250  # MB; lists of Python strings would take more
