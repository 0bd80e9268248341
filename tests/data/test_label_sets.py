"""Several labels in the name of one class: told apart, counted, listed by the embedded sounds and by columns of label lists."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glpretrain.data import HuggingFaceSounds, SoundList, Sounds
from glpretrain.data.label_sets import LabelSets, joined


def test_names_of_classes_are_told_apart_into_labels() -> None:
    sets = LabelSets(["rain; dog", "dog", ";", "cat;rain;cat"])
    assert sets.names == ["cat", "dog", "rain"] and len(sets) == 3
    expected = [[0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert sets.targets(torch.tensor([0, 1, 2, 3])).tolist() == expected
    assert sets.targets(torch.tensor([3, 0])).tolist() == [expected[3], expected[0]]
    assert LabelSets(["a|b;c"], separator="|").names == ["a", "b;c"]
    with pytest.raises(ValueError, match="separator: ''"):
        LabelSets(["a"], separator="")


@pytest.mark.parametrize("labels", [("rain", "dog"), ("dog",), ()])
def test_what_is_joined_is_told_apart_again(labels: tuple[str, ...]) -> None:
    sets = LabelSets([joined(labels), "dog;rain"])
    chosen = sets.targets(torch.tensor([0]))[0].bool().tolist()
    assert [name for name, is_there in zip(sets.names, chosen, strict=True) if is_there] == sorted(labels)


def test_embedded_sounds_name_all_their_sources_where_they_are_asked_to() -> None:
    loudest, every = Sounds(40, frames=32), Sounds(40, frames=32, labels="all")
    sets = LabelSets(every.classes)
    assert sets.names == sorted(loudest.classes) and len(every.classes) == 10 + 45 + 120
    sizes = set()
    for index in range(20):
        one, other = loudest[index], every[index]
        assert torch.equal(one.values, other.values) and one.semantic is not None
        named = {name for name, there in zip(sets.names, sets.targets(torch.tensor([other.label]))[0].tolist(), strict=True) if there}
        shown = {loudest.mask_classes[value] for value in one.semantic.unique().tolist() if value > 0}
        assert loudest.classes[one.label] in named and shown <= named
        sizes.add(len(named))
    assert sizes == {1, 2, 3}
    assert every.train_test_split()[1].classes == every.classes and every.fingerprint() != loudest.fingerprint()
    with pytest.raises(ValueError, match="Sounds: labels is 'some'"):
        Sounds(4, labels="some")  # type: ignore[arg-type]


def test_a_list_holds_sets_of_labels(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("a.wav\tdog;rain\nb.wav\t;\nc.wav\train\n")
    source = SoundList(tmp_path / "list.tsv")
    sets = LabelSets(source.classes)
    found = sets.targets(torch.tensor([source.label_of(index) for index in range(3)]))
    assert sets.names == ["dog", "rain"] and found.tolist() == [[1, 1], [0, 0], [0, 1]]


class _Labels:
    """A column of classes."""

    names = ("dog", "rain", "wind")


class _Rows:
    """A dataset with a column of lists of classes."""

    def __init__(self, audio: type) -> None:
        self.features = {"audio": audio(), "tags": SimpleNamespace(feature=_Labels()), "odd": SimpleNamespace(feature="text")}
        self.column_names = list(self.features)
        self.tags = [[1, 0], [], [2]]

    def cast_column(self, name: str, feature: object) -> "_Rows":
        return self

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: int | str) -> object:
        return self.tags if key == "tags" else {"audio": {"bytes": b"", "path": None}, "tags": self.tags[int(key)]}


def test_a_column_of_lists_of_classes_holds_sets_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Audio:
        def __init__(self, decode: bool = True) -> None: ...

    class Value: ...

    package = SimpleNamespace(Audio=Audio, Image=Audio, Value=Value, ClassLabel=_Labels, DatasetDict=dict)
    package.load_dataset = lambda path: {"train": _Rows(Audio)}
    monkeypatch.setitem(sys.modules, "datasets", package)
    source = HuggingFaceSounds("name/of-it", label="tags")
    sets = LabelSets(source.classes)
    labels = torch.tensor([source._column.row(index)[1] for index in range(3)])
    assert sets.names == ["dog", "rain", "wind"] and sets.targets(labels).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="expected a ClassLabel, or a list of them"):
        HuggingFaceSounds("name/of-it", label="odd")
