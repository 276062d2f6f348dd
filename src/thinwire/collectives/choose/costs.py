"""What software spends on messages, in seconds of a processor: the o and gamma of LogGP, and the time to wake up.

    send, receive   to post a send; to take a message that is there and hand it on    (Culler et al., LogP, 1993; Alexandrov 1995)
    wake            until a rank that waits for a message goes on once it is there
    reduce          to add a received byte
    call            once for each call of a collective, before its first message (ours: 35 us with one rank and nothing to send)
    frame           to carry a frame that a bucket lets pass at once, if the network has the same cores

The numbers are least times on loopback, two ranks with a core each, gloo in torch 2.13. Ours, over send and recv: an all-reduce
of one number takes 88 us (one in each direction), one of 4 KiB round the ring 158 us (two in turn), 64 messages that need not be
waited for 12 us each. Inside gloo (native): an all-reduce of one number takes 47 to 58 us (two messages in turn). An addition of
float32 takes 0.14 to 0.28 ns a byte. A frame through a lab, two cards and a bridge, takes 15 us of a core (all-to-all of 4 MiB
among 8 hosts on 2 cores, /proc/stat); the sender's, or whatever is idle while the wire is waited for.
"""

from dataclasses import dataclass, replace

from thinwire.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """acknowledged: bytes on the route back for each byte of data; TCP sends a frame of 66 bytes for two of 1514.
    cores_shared: ranks for each core (a lab runs all its hosts on one machine); a rank then waits for a core where need be."""

    send_s: float = 15e-6
    receive_s: float = 15e-6
    wake_s: float = 40e-6
    reduce_s_per_byte: float = 0.2e-9
    call_s: float = 35e-6
    native_send_s: float = 4e-6
    native_receive_s: float = 6e-6
    native_wake_s: float = 15e-6
    native_call_s: float = 8e-6
    frame_s: float = 15e-6
    acknowledged: float = 66 / (2 * 1514)
    cores_shared: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 0:
                raise UserError(f"costs: {name} = {getattr(self, name)}; it must be 0 or more")

    @property
    def native(self) -> "Costs":
        """For what the backend's own code runs."""
        return replace(self, **{name: getattr(self, f"native_{name}") for name in ("send_s", "receive_s", "wake_s", "call_s")})

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
