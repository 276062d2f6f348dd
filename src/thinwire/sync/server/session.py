"""One life of a worker at one server: what may come next over its connection, and what it means."""

from torch import Tensor

from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import Mirror, coded_bytes, decode, make_flat
from thinwire.sync.server.connection import Connection
from thinwire.sync.server.extent import Extent
from thinwire.sync.server.merger import Member, Push, Standing
from thinwire.sync.server.message import SPAN_BYTES, BadMessage, Head, Hello, Kind
from thinwire.sync.server.weights import Weights


class Refused(UserError):
    """What the worker asked cannot be done: the line that its user is to read."""


class Session:
    """Life `member` at server `index`."""

    def __init__(self, member: Member, connection: Connection, hello: Hello, service: Service, index: int) -> None:
        self.member, self.connection, self.hello, self._index = member, connection, hello, index
        self.extent = Extent(hello.numel, hello.wide)
        self._mirror = Mirror(service.pull)
        self._push_codec = make_flat(service.push)

    def sizes(self, head: Head) -> range | int:
        """How many bytes may come behind this head: of a push exactly what was agreed on. BadMessage if it may not come at
        all."""
        match head.kind:
            case Kind.PULL | Kind.PROGRESS | Kind.LEAVE:
                return 0
            case Kind.BEGIN if self._index == 0:
                return 0
            case Kind.PUSH:
                return coded_bytes(self._push_codec, self.extent)
            case Kind.INIT if 1 <= head.local_steps <= self.extent.numel:
                size = SPAN_BYTES * head.local_steps + self.extent.exact_bytes
                return range(size, size + 1)
        raise BadMessage(f"{head.kind.name} from a worker")

    def must_fit(self, weights: Weights | None) -> None:
        """Refused if the worker's model has not as many values, of the same precision, as the server."""
        if weights is not None and weights.extent != self.extent:
            raise Refused(f"a server holds {weights.extent} where this model has {self.extent}; all need one model")

    def push_of(self, head: Head, payload: Tensor) -> Push:
        """What was pushed, decoded. Refused if it is no code."""
        try:
            values = decode(self._push_codec, payload, self.extent)
        except Exception as error:  # whatever a codec says of bytes that are no code
            raise Refused(f"a push that is no code of {self.extent.numel} values ({type(error).__name__})") from None
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
        self.connection.send(answer, self._mirror.encode(standing.values, self.extent), label="weights")
