"""Items of another source under the class numbers of a first one, such as a test set that lists its classes in another order."""

from collections.abc import Sequence

from glpretrain.core.types import Item
from glpretrain.data.label_sets import LabelSets
from glpretrain.data.sources.base import Source, Stored, Subset


class Relabelled(Subset):
    """The items of a source whose class numbers are those in a list of names.

    Args:
        source: source of the items, with classes.
        classes: names, those of the source among them.
    """

    def __init__(self, source: Source, *, classes: Sequence[str]) -> None:
        super().__init__(source, indices=range(len(source)))
        places = {name: number for number, name in enumerate(classes)}
        self._number = [places[name] for name in source.classes]
        self.classes = list(classes)

    def __getitem__(self, index: int) -> Item:
        item = super().__getitem__(index)
        return item._replace(label=self._of(item.label))

    def reduced(self, index: int, *, side: int) -> Item:
        item = super().reduced(index, side=side)
        return item._replace(label=self._of(item.label))

    def stored(self, index: int) -> Stored | None:
        found = super().stored(index)
        return None if found is None else found._replace(label=self._of(found.label))

    def label_of(self, index: int) -> int:
        return self._of(super().label_of(index))

    def _of(self, label: int) -> int:
        return label if label < 0 else self._number[label]

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), list(self.classes)


def under_classes_of(source: Source, test: Source, *, separator: str | None = None) -> Source:
    """`test` with the class numbers of `source`; its classes are those of both, those that only it has come last.

    With a `separator`, the names of classes hold labels, which are compared in their place.

    Raises:
        ValueError: they are no items of one kind, have no class in common, or their masks have other classes.
    """
    for name, own, other in (
        ("items", source.modality, test.modality),
        ("classes of masks", list(source.mask_classes), list(test.mask_classes)),
    ):
        if own != other:
            raise ValueError(f"data.test: {test.name} has the {name} {other}; accepted: those of {source.name}, {own}")
    if list(source.classes) == list(test.classes):
        return test
    own, other = (set(one.classes if separator is None else LabelSets(one.classes, separator=separator).names) for one in (source, test))
    if not own & other:
        raise ValueError(f"data.test: {test.name} has the classes {', '.join(sorted(other)[:5])}; accepted: those of {source.name}")
    return Relabelled(test, classes=list(dict.fromkeys([*source.classes, *test.classes])))
