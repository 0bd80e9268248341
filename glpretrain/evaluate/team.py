"""Processes that encode together: the first one runs the evaluators, and the others encode what it asks them for.

Batches are dealt in turn and come back in order, so features are those of one process to the last bit. Only features, labels and digests
travel; who looks at pixels or masks reads them again. A process that fails says why, and the first one raises it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from safetensors.torch import load, save

from glpretrain.core import mailbox
from glpretrain.core.distributed import rank, world_size
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.layers import Tokens
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.reading import Decoded, Patches, nothing

_AHEAD = 4  # batches that a process may be ahead of the first one
_DONE = b"done"


class Request(NamedTuple):
    """What the first process asks the others for."""

    role: str
    indices: list[int] | None  # dataset indices of the items; None for all of the role
    count: int  # number of items, for comparison
    shape: list[int]
    resize: str
    batch_size: int
    layers: dict[str, Patches]  # number of each block, and how much of its patches is needed
    bf16: bool
    tokens: Tokens
    numbers: list[int]  # batches that features are missing of, the own ones of the first process included

    @property
    def own(self) -> list[int]:
        """Those batches that this process encodes."""
        return self.numbers[rank() :: world_size()]


class Answer(NamedTuple):
    """What a process has made of a batch."""

    seen: Decoded  # without values and masks
    outputs: dict[int, EncoderOutput]  # by layer; none where no item can be read

    def packed(self) -> bytes:
        """In bytes."""
        tensors = {"labels": self.seen.labels, "index": self.seen.index, "digests": self.seen.digests}
        for layer, output in self.outputs.items():
            tensors |= {f"cls {layer}": output.cls, f"patches {layer}": output.patches}
        notes = json.dumps([dict(self.seen.unreadable), self.seen.refusal, list(self.outputs)])
        tensors["notes"] = torch.frombuffer(bytearray(notes, "utf-8"), dtype=torch.uint8)
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def unpacked(cls, content: bytes) -> "Answer":
        """What `packed` has made bytes of."""
        tensors = load(content)
        unreadable, refusal, layers = json.loads(tensors["notes"].numpy().tobytes())
        reasons = {int(index): reason for index, reason in unreadable.items()}
        seen = Decoded(None, tensors["labels"], None, None, tensors["index"], tensors["digests"], reasons, refusal)
        return cls(seen, {layer: EncoderOutput(tensors[f"cls {layer}"], tensors[f"patches {layer}"]) for layer in layers})


class Team:
    """What the first process sees of the others.

    Args:
        name: name of this evaluation, which no other one of the run has.
        sources: what the evaluators run on; all processes have the same ones.
    """

    def __init__(self, name: str, sources: Sources) -> None:
        self._name, self._sources, self._count = name, sources, 0

    def role_of(self, items: DecodedItems) -> str | None:
        """The role whose items these are, or some of them; None where the other processes do not have them."""
        for role in self._sources:
            found = self._sources.measured(role)
            if isinstance(found, DecodedItems) and found.known is items.known:
                return role
        return None

    def ask(self, request: Request) -> "Asked":
        """Let the others begin."""
        self._count += 1
        name = f"{self._name}/{self._count}"
        mailbox.post(name, json.dumps(request._asdict()).encode())
        return Asked(name, request)

    def dismiss(self) -> None:
        """Let the others go on with what comes after this evaluation."""
        mailbox.post(f"{self._name}/{self._count + 1}", _DONE)


class Asked:
    """A request that the others work on."""

    def __init__(self, name: str, request: Request) -> None:
        self._name = name
        self._turn = {number: turn % world_size() for turn, number in enumerate(request.numbers)}

    def is_others(self, number: int) -> bool:
        """Whether another process encodes this batch."""
        return self._turn.get(number, 0) > 0

    def answer(self, number: int) -> Answer:
        """What it has made of it. Batches are asked for in order.

        Raises:
            ValueError: it could not.
        """
        content = mailbox.fetch(f"{self._name}/{number}")
        assert content is not None
        answer = Answer.unpacked(content)
        if answer.seen.refusal:
            raise ValueError(answer.seen.refusal)
        return answer

    def end(self) -> None:
        """No further answer is asked for."""
        mailbox.post(f"{self._name}/end", b"")


def requests(name: str) -> Iterator[tuple[str, Request]]:
    """What the first process asks for during an evaluation, with a name for the answers, until it dismisses the team."""
    count = 0
    while True:
        count += 1
        content = mailbox.read(f"{name}/{count}")
        if content == _DONE:
            return
        yield f"{name}/{count}", Request(**json.loads(content))


def give(name: str, request: Request, answers: Callable[[Sequence[int]], Iterator[tuple[int, Answer]]]) -> None:
    """Answer a request, a few batches ahead of the first process at most.

    Args:
        name: name of the answers.
        request: what was asked for.
        answers: function that makes the answers to some batches, in order.
    """
    given: list[str] = []

    def is_over() -> bool:
        return mailbox.is_there(f"{name}/end")

    def has_room() -> bool:
        return len(given) < _AHEAD or not mailbox.is_there(given[-_AHEAD])

    try:
        for number, answer in answers(request.own):
            if is_over() or not mailbox.wait(has_room, until=is_over):
                break
            given.append(f"{name}/{number}")
            mailbox.post(given[-1], answer.packed())
    except (ValueError, RuntimeError) as error:  # of torch as well, such as a lack of memory on the device
        given.append(f"{name}/{request.own[len(given)]}")
        mailbox.post(given[-1], _refused(f"process {rank()}: {error}").packed())
    mailbox.wait(is_over)
    for own in given[-_AHEAD:]:
        mailbox.forget(own)


def _refused(reason: str) -> Answer:
    """The answer of a process that cannot give one."""
    return Answer(nothing({}, refusal=reason), {})
