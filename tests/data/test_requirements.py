"""Data and method must fit: what is missing, what is made for nothing and what is of another number is refused, each with its setting."""

import re

import pytest

from glpretrain.core.batch import Uses
from glpretrain.data import Scenes
from glpretrain.data.requirements import Made, check_same_items, check_uses

USES = {
    "global": Uses(num_views=2, needs=("mask",), takes=("corrupted", "corruption")),
    "local": Uses(required=False),
    "student": Uses(required=False, takes=("strong",)),
    "coarse_*": Uses(required=False, num_views=1),
}


def made(**groups: tuple[int, set[str]]) -> dict[str, Made]:
    """Groups by name, each with its number of views and its parts; `global` as it has to be unless it is given."""
    return {name: Made(count, frozenset(parts)) for name, (count, parts) in ({"global": (2, {"mask"})} | groups).items()}


@pytest.mark.parametrize(
    "data",
    [
        made(),
        made(local=(8, set())),
        made(student=(2, {"strong"}), coarse_128=(1, set()), coarse_64=(1, set())),
        made(**{"global": (2, {"mask", "corrupted", "corruption"})}),
        made(**{"global": (2, {"mask", "region_mask"})}),  # which the setting of the mask brings along
    ],
)
def test_what_is_used_or_may_be_used_is_accepted(data: dict[str, Made]) -> None:
    check_uses("Mine", USES, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (made(**{"global": (2, set())}), "Mine needs data.mask: set it"),
        (made(**{"global": (3, {"mask"})}), "Mine needs 2 global views, not 3: set count in data.views.global_views"),
        (made(coarse_128=(2, set())), "Mine needs 1 coarse_128 views, not 2: set count in data.views.coarse_views"),
        (made(other=(1, set())), "Mine does not use data.views: leave it out"),
        ({"local": Made(2, frozenset())}, "Mine needs data.views.global_views: set it"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_setting(data: dict[str, Made], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_uses("Mine", USES, data)


@pytest.mark.parametrize(
    ("name", "parts", "setting"),
    [
        ("global", {"mask"}, "data.mask"),
        ("global", {"corrupted", "corruption"}, "data.corruption"),
        ("local", set(), "data.views.local_views"),
        ("student", {"strong"}, "data.views.student_views"),
        ("coarse_64", set(), "data.views.coarse_views"),
    ],
)
def test_what_nobody_uses_is_refused(name: str, parts: set[str], setting: str) -> None:
    data = {"global": Made(2, frozenset())} | {name: Made(2, frozenset(parts))}
    with pytest.raises(ValueError, match=f"Mine does not use {setting}: leave it out"):
        check_uses("Mine", {"global": Uses()}, data)


class _Processes:
    """This process and the first one, which has listed something else."""

    def __init__(self, first: str) -> None:
        self.first = first

    def broadcast(self, obj: str, /) -> str:
        return self.first or obj

    def reduce_boolean_decision(self, decision: bool, /, all: bool) -> bool:
        return decision


def test_processes_that_have_listed_different_items_do_not_train() -> None:
    source = Scenes(5, size=16)
    check_same_items(source, _Processes(""))
    with pytest.raises(ValueError, match="scenes: the processes of this run have listed different items, this one 5; files were added"):
        check_same_items(source, _Processes("0" * 64))
