"""Finding the encoder in a published checkpoint: in which dictionary, behind which prefixes, and in which of two halves.

Frameworks, wrappers and training scripts put dictionaries around tensors and prefixes before their names, in any order and nesting. The
encoder is where the names that every encoder has begin, so any prefix is accepted; its words say whether it is a student or its averaged
copy. Left out: the format of the tensors (`formats`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glpretrain.weights.files import State, listed
from glpretrain.weights.report import Which

# Words in keys and prefixes that say which half of a checkpoint follows.
_WORDS: dict[Which, str] = {
    "teacher": "teacher ema emas momentum target tgt k key slow shadow polyak swa avg average averaged averaging",
    "student": "student online q query context current",
}
# One tensor of every kind of encoder, with what stands before the encoder's names as a group, and a pattern for another name behind it.
_ANCHORS = (
    (re.compile(r"(|.*\.)visual\.trunk\.patch_embed\.proj\.weight"), re.compile(r"visual\.attn_pool_contrast\.query")),
    (re.compile(r"(|.*\.)patch_embed\.proj\.weight"), re.compile(r"blocks\.\d+\.")),
    (re.compile(r"(|.*\.)encoder\.first_conv\.0\.weight"), re.compile(r"blocks\.")),
    (re.compile(r"(|.*\.)gather_local_0\.conv1\.weight"), re.compile(r"blocks\.|norm\.")),
)
# Wrappers that say nothing: around everything, and around any module, also inside the encoder (compiled or sharded blocks).
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\.")
# Keys of the losses whose checkpoints are those of one format.
_LOSSES = {"dino_loss": "dino", "ibot_loss": "ibot", "student_mem": "mugs", "CLS_PATCH_loss": "asit", "loss_data": "asit"}
_MOST_DICTIONARIES, _DEEPEST = 10_000, 8


@dataclass(frozen=True)
class Unwrapped:
    """The tensors of one encoder, taken out of a file.

    Args:
        state: tensors of the encoder under their published names.
        left_out: names of the other tensors in the same dictionary.
        hint: the format where the wrapping tells it; "model" where the file is wrapped like those of MAE and DeiT.
        side: teacher or student where the file holds both or names one; otherwise empty.
    """

    state: State
    left_out: tuple[str, ...] = ()
    hint: str | None = None
    side: Which | str = ""


@dataclass(frozen=True)
class _Place:
    """One encoder in a file: the keys of the dictionaries around it, what stands before its names, and the dictionary."""

    keys: tuple[str, ...]
    prefix: str
    tensors: State
    inner: tuple[str, ...]  # longer prefixes of other encoders in the same dictionary

    def __str__(self) -> str:
        return ".".join((*self.keys, self.prefix)) or "the tensors without a prefix"

    @property
    def sides(self) -> set[Which]:
        parts = [*self.keys, *self.prefix.split(".")]
        words = {word.lower() for part in parts for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}
        found: set[Which] = {side for side, said in _WORDS.items() if words & set(said.split())}
        if "base_encoder" in parts:  # MoCo v3
            found.add("student")
        return found

    def split(self) -> tuple[State, list[str]]:
        """The encoder's tensors without the prefix, and the names of the others."""
        own, others = {}, []
        for name, tensor in self.tensors.items():
            counter = name == f"{self.prefix}n_averaged"  # of torch's AveragedModel
            if name.startswith(self.prefix) and not name.startswith(self.inner) and not counter:
                own[name.removeprefix(self.prefix)] = tensor
            else:
                others.append(name)
        return own, others


def unwrap(content: object, *, which: Which, path: Path) -> Unwrapped:
    """Find the encoder in what a file holds.

    Raises:
        ValueError: the file holds no encoder, not the side that is asked for, or several of which it cannot be told which is asked for.
    """
    if not isinstance(content, dict):
        raise ValueError(f"load_backbone: {path} holds a {type(content).__name__}; accepted: a dictionary of tensors, also within one")
    places: list[_Place] = []
    largest: State = {}
    for keys, tensors in _dictionaries(content, path=path):
        if len(tensors) > len(largest):
            largest = tensors
        prefixes = _prefixes(tensors, path=path)
        places += [_Place(keys, prefix, tensors, tuple(p for p in prefixes if p != prefix and p.startswith(prefix))) for prefix in prefixes]
    if not places:
        advice = "; give the folder with its config.json" if any("embeddings.cls_token" in name for name in largest) else ""
        held = largest if largest and _only_wraps(content) else content
        raise ValueError(f"load_backbone: {path} is of no known format; it holds {_keys(held)}{advice}")
    place, side = _choose(places, which=which, content=content, path=path)
    state, others = place.split()
    own_keys = [key for key in (*place.keys, *place.prefix.split(".")) if key]
    hint = None
    if own_keys and own_keys[-1] in ("base_encoder", "momentum_encoder"):
        hint = "mocov3"
    elif side and not content.keys().isdisjoint(_LOSSES):
        hint = next(format for key, format in _LOSSES.items() if key in content)
    elif {"encoder", "target_encoder"} <= content.keys():
        hint = "msn"
    elif place.keys[-1:] in (("model",), ("model_ema",)) and "teacher" not in own_keys and "student" not in own_keys:
        hint = "model"
    return Unwrapped(state, tuple(sorted(others)), hint, side)


def _keys(content: dict) -> str:
    return listed(sorted(map(str, content)))


def _only_wraps(content: dict) -> bool:
    return all(isinstance(value, Tensor | dict) for value in content.values())


def _dictionaries(content: dict, *, path: Path) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every dictionary that holds tensors, with the keys that lead to it; wrappers are taken out of the tensors' names."""
    waiting: list[tuple[tuple[str, ...], dict]] = [((), content)]
    for count, (keys, values) in enumerate(waiting):  # the list grows while it is read
        if count > _MOST_DICTIONARIES:
            raise ValueError(f"load_backbone: {path} holds more than {_MOST_DICTIONARIES} dictionaries; give a file of the encoder alone")
        tensors: State = {}
        for name, value in values.items():
            if isinstance(name, str) and isinstance(value, Tensor):
                if (bare := _WRAPPERS.sub("", name)) in tensors:
                    raise ValueError(f"load_backbone: {path} holds {bare} twice, behind two wrappers; give a file that holds it once")
                tensors[bare] = value
            elif isinstance(name, str) and isinstance(value, dict) and len(keys) < _DEEPEST:
                waiting.append(((*keys, name), value))
        if tensors:
            yield keys, tensors


def _prefixes(tensors: State, *, path: Path) -> list[str]:
    """What stands before the names of each encoder among the tensors."""
    prefixes: list[str] = []
    for name in tensors:
        for anchor, beside in _ANCHORS:
            found = anchor.fullmatch(name)
            if found and any(other.startswith(found[1]) and beside.match(other, len(found[1])) for other in tensors):
                prefixes.append(found[1])
                break
    # mmcv's hook keeps the other half in buffers in whose names every dot is an underscore, and swaps the two while it trains.
    for name in (f"{prefix}patch_embed.proj.weight" for prefix in prefixes):
        if (flat := f"ema_{name.replace('.', '_')}") in tensors:
            raise ValueError(f"load_backbone: {path} holds {name} and {flat}; which is the teacher cannot be told; give a file with one")
    return prefixes


def _choose(places: list[_Place], *, which: Which, content: dict, path: Path) -> tuple[_Place, Which | str]:
    """The place of the side that is asked for, and its side."""
    sides = [place.sides for place in places]
    if "current_model_state" in content:  # Lightning's weight averaging then has the average under state_dict
        sides = [{"teacher"} if place.keys[:1] == ("state_dict",) else found for place, found in zip(places, sides, strict=True)]
    named: dict[Which, list[_Place]] = {
        side: [place for place, found in zip(places, sides, strict=True) if found == {side}] for side in ("teacher", "student")
    }
    unnamed = [place for place, found in zip(places, sides, strict=True) if len(found) != 1]
    if named["teacher"]:  # what lies beside an averaged copy is what was averaged
        candidates, side = (named["teacher"], which) if which == "teacher" else (named["student"] or unnamed, which)
    elif which == "student":
        candidates, side = (named["student"], which) if named["student"] else (unnamed, "")
    else:
        candidates, side = ([*unnamed, *named["student"]], "student" if not unnamed else "")
    if not candidates:
        raise ValueError(f"load_backbone: which={which!r} given; {path} holds {_keys(content)}")
    first = candidates[0]
    if other := next((place for place in candidates[1:] if not _same(first, place)), None):
        raise ValueError(
            f"load_backbone: {path} holds several encoders and it cannot be told which is the {which}: {first} and {other}; "
            "give a file that holds one of them"
        )
    return first, side


def _same(one: _Place, other: _Place) -> bool:
    """Whether two places hold the same numbers, as where a model lies in a file twice."""
    first, second = one.split()[0], other.split()[0]
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
