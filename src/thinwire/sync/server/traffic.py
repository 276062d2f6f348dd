"""What one push and the pull that answers it will send, over each link. No communication.

    worker -> server i     64 B head, C_push(n_i)        n_i: values of range i
    server i -> worker     64 B head, C_pull(n_i)        C: bytes of the code, 4 n_i without one

The first pull of a life is float32 whatever the code. Joining costs a HELLO and a head more to each server, and its weights once
if it has none; leaving costs one head. What precedes HELLO, the challenges and the service's own description, is in no ledger.

A step that pushes nothing may send a head "progress to server i", one in `heartbeat_s` at most: how many there are depends on the
clock and on nothing else, so they are entered under that label and are not predicted.
"""

from thinwire.config.replicas import Service
from thinwire.sync.server.coding import coded_bytes, make_flat
from thinwire.sync.server.link import AXIS
from thinwire.sync.server.message import HEAD_BYTES
from thinwire.sync.server.ranges import cut
from thinwire.traffic import Transfer


def pushed(service: Service, numel: int, every: int = 1) -> list[Transfer]:
    """What a worker sends, each `every` of its steps."""
    codec, found = make_flat(service.push), []
    for index, part in enumerate(cut(numel, service.servers)):
        for label, size in (("head", HEAD_BYTES), ("push", coded_bytes(codec, part.numel))):
            found.append(Transfer(label=f"{label} to server {index}", axis=AXIS, op="send", message_bytes=size, every=every))
    return found


def pulled(service: Service, numel: int, index: int, worker: str, every: int = 1) -> list[Transfer]:
    """What server `index` sends to one worker, each `every` of the worker's steps."""
    size = coded_bytes(make_flat(service.pull), cut(numel, service.servers)[index].numel)
    return [
        Transfer(label=f"{label} to worker {worker}", axis=AXIS, op="send", message_bytes=size, every=every)
        for label, size in (("head", HEAD_BYTES), ("weights", size))
    ]
