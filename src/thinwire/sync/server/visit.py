"""One worker's connection to one server: what may come next, and what it means."""

from typing import Any

import torch
from torch import Tensor

from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import Mirror, coded_bytes, decode, make_flat
from thinwire.sync.server.link import Link
from thinwire.sync.server.members import Member
from thinwire.sync.server.merger import Push, Standing
from thinwire.sync.server.message import BadMessage, Head, Hello, Kind
from thinwire.sync.server.ranges import Span
from thinwire.sync.server.weights import Weights

SPAN_BYTES = 3 * 8


class Refused(UserError):
    """What the worker asked cannot be done: the line that its user is to read."""


class Visit:
    """Life `member` at server `index`."""

    def __init__(self, member: Member, link: Link, hello: Hello, service: Service, index: int) -> None:
        self.member, self.link, self.hello, self._index = member, link, hello, index
        self._mirror = Mirror(service.pull)
        self._push_codec = make_flat(service.push)

    def sizes(self, head: Head) -> range | int:
        """How many bytes may come behind this head: of a push exactly what was agreed on. BadMessage if it may not come at
        all."""
        numel = self.hello.numel
        match head.kind:
            case Kind.PULL | Kind.PROGRESS | Kind.LEAVE:
                return 0
            case Kind.BEGIN if self._index == 0:
                return 0
            case Kind.PUSH:
                return coded_bytes(self._push_codec, numel)
            case Kind.INIT if 1 <= head.local_steps <= numel:
                size = SPAN_BYTES * head.local_steps + 4 * numel
                return range(size, size + 1)
        raise BadMessage(f"{head.kind.name} from a worker")

    def must_fit(self, weights: Weights | None) -> None:
        """Refused if the worker's model has not as many values as the server."""
        if weights is not None and weights.values.numel() != self.hello.numel:
            held = weights.values.numel()
            raise Refused(f"a server holds {held} weights where this model has {self.hello.numel}; all need one model")

    def push_of(self, head: Head, payload: Tensor) -> Push:
        """What was pushed, decoded. Refused if no coder has made it."""
        try:
            values = decode(self._push_codec, payload, self.hello.numel)
        except Exception as error:  # whatever a codec says of bytes that are no code
            raise Refused(f"a push that is no code of {self.hello.numel} values ({type(error).__name__})") from None
        return Push(
            member=self.member,
            values=values,
            version=head.version,
            weight=head.weight,
            local_steps=head.local_steps,
            learning_rate=head.learning_rate,
        )

    def start_of(self, head: Head, payload: Tensor) -> tuple[Tensor, list[Span]]:
        """The first weights."""
        return unpack_start(payload, head.local_steps)

    def answer(self, standing: Standing) -> None:
        """The weights, and how to go on."""
        answer = Head(
            kind=Kind.WEIGHTS,
            step=standing.step,
            version=standing.version,
            local_steps=standing.local_steps,
            merged=standing.merged,
        )
        self.link.send(answer, self._mirror.encode(standing.values), label="weights")


def pack_start(values: Tensor, spans: list[Span]) -> Tensor:
    """Spans and weights as one payload."""
    table = torch.tensor([(span.first, span.end, span.decays) for span in spans], dtype=torch.int64)
    return torch.cat([table.view(torch.uint8).reshape(-1), values.contiguous().view(torch.uint8)])


def unpack_start(payload: Tensor, num_spans: int) -> tuple[Tensor, list[Span]]:
    """The inverse of `pack_start`."""
    size = num_spans * SPAN_BYTES
    table: Any = payload[:size].clone().view(torch.int64).view(num_spans, 3)
    return payload[size:].clone().view(torch.float32), [Span(int(a), int(b), bool(c)) for a, b, c in table]
