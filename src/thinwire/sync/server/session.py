"""One life of a worker at one server: what may come next over its connection, and what it means."""

from torch import Tensor

from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import Mirror, coded_bytes, decode, make_flat
from thinwire.sync.server.connection import Connection
from thinwire.sync.server.merger import Member, Push, Standing
from thinwire.sync.server.message import SPAN_BYTES, BadMessage, Head, Hello, Kind
from thinwire.sync.server.weights import Weights


class Refused(UserError):
    """What the worker asked cannot be done: the line that its user is to read."""


class Session:
    """Life `member` at server `index`."""

    def __init__(self, member: Member, connection: Connection, hello: Hello, service: Service, index: int) -> None:
        self.member, self.connection, self.hello, self._index = member, connection, hello, index
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
        """What was pushed, decoded. Refused if it is no code."""
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

    def answer(self, standing: Standing) -> None:
        """The weights, and how to go on."""
        answer = Head(
            kind=Kind.WEIGHTS,
            step=standing.step,
            version=standing.version,
            local_steps=standing.local_steps,
            merged=standing.merged,
        )
        self.connection.send(answer, self._mirror.encode(standing.values), label="weights")
