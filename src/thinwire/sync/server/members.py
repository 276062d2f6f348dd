"""Who is there: names, and their lives.

    life        from HELLO to LEAVE, or until it is lost. Server 0 numbers the lives of each name, 1, 2, ...
    supersede   a life with a higher number ends those before it, on every server
    lost        its connection is closed, or it makes no progress for `timeout_s` by the clock of whoever watches

Progress is a step of its loop, the wait for a server's answer, or its own word that it pauses on purpose (`ServerClient.alive`).
There is no heart that beats beside the loop: a loop that hangs is lost like a process that has ended.
"""

from dataclasses import dataclass, field

from thinwire.sync.server.message import Hello


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One life of a named member."""

    name: str
    incarnation: int


@dataclass
class Roll:
    """The lives that one server has seen. numbers: it is server 0, which counts them. Used under the lock of whoever holds it."""

    numbers: bool
    _newest: dict[str, int] = field(default_factory=dict)

    def enter(self, hello: Hello) -> Member | None:
        """The life that says this; None if it cannot be: there is one of this number, or a later one, or it gives itself a
        number."""
        newest = self._newest.get(hello.name, 0)
        number = newest + 1 if self.numbers else hello.incarnation
        if number <= newest or (self.numbers and hello.incarnation):
            return None
        self._newest[hello.name] = number
        return Member(hello.name, number)
