"""What software spends on messages, in seconds of a processor: the o and gamma of LogGP.

    o_s, o_r   to post a send; to notice a message that is there, and hand it on      (Culler et al., LogP, 1993; Alexandrov 1995)
    gamma      to add one received byte
    call       once for each call of a collective, before its first message

The numbers are of gloo on two cores of a server, seen from Python (ours) and from inside gloo (native): two ranks on loopback,
one thread each, exchange a small message in 70 us each way; posting is 5 to 20 us of that. A native all-reduce of 4 bytes among
two ranks takes 47 us, two messages one after the other. An addition of float32 takes 0.14 to 0.28 ns a byte.
"""

from dataclasses import dataclass, replace

from thinwire.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """cores_shared: ranks for each core (a lab runs all its hosts on one machine); a rank then waits for a core where need be."""

    send_s: float = 20e-6
    receive_s: float = 50e-6
    reduce_s_per_byte: float = 0.2e-9
    call_s: float = 60e-6
    native_send_s: float = 5e-6
    native_receive_s: float = 18e-6
    native_call_s: float = 10e-6
    cores_shared: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 0:
                raise UserError(f"costs: {name} = {getattr(self, name)}; it must be 0 or more")

    @property
    def native(self) -> "Costs":
        """For what the backend's own code runs."""
        return replace(self, send_s=self.native_send_s, receive_s=self.native_receive_s, call_s=self.native_call_s)

    def scaled(self, ours: float = 1.0, native: float = 1.0) -> "Costs":
        """What software spends on messages times these factors."""
        return replace(
            self,
            **{name: getattr(self, name) * ours for name in ("send_s", "receive_s", "call_s")},
            **{name: getattr(self, name) * native for name in ("native_send_s", "native_receive_s", "native_call_s")},
        )

    def cores(self, p: int) -> int:
        """Cores for p ranks; 0: each has its own."""
        return max(1, round(p / self.cores_shared)) if self.cores_shared > 1 else 0


FREE = Costs(
    send_s=0, receive_s=0, reduce_s_per_byte=0, call_s=0, native_send_s=0, native_receive_s=0, native_call_s=0
)  # fmt: skip
"""The wires alone."""
