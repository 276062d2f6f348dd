"""`thinwire.init()`: torch.distributed over gloo, MPI or NCCL, with collectives chosen for the network that it runs on."""

import socket
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from thinwire.cluster import load_cluster
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.mpi.start import started_for_good
from thinwire.collectives.nccl import register_nccl
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.store import open_store
from thinwire.collectives.tuned.tuner import make_tuner
from thinwire.environment import agent_has_store, read_environment, restart, set_variables, shared_gpu_variables
from thinwire.errors import UserError

Collectives = Literal["measured", "priced", "native"]
InnerName = Literal["gloo", "mpi", "nccl"]
WHERE = {"store", "init_method", "rank", "world_size"}
"""Options of init_process_group that say where the ranks meet."""


def init(
    cluster: str | None = None,
    *,
    collectives: Collectives = "measured",
    cache: str | None = None,
    inner: InnerName = "gloo",
    bind: str = "",
    **options: Any,
) -> Ledger:
    """Instead of `torch.distributed.init_process_group(**options)`, on every rank; DDP, FSDP2, DTensor and user code stay as is.

    cluster: a cluster file (`thinwire probe` writes one) or the name of a shipped one, whose ranks are those of the job; without
    one all cards are taken for equal, and more is left to measuring. collectives: "measured" tries the few best by price on the
    ranks when an op is first used in a class of sizes, and keeps the backend's own unless another is faster; "priced" takes the
    best by price at once; "native" leaves all as it is. cache: where rank 0 keeps what was measured; default: beside the cluster
    file. inner: what carries the bytes; "mpi" (the extra `mpi`) for ranks that mpiexec has started: they are MPI's ranks, meet
    through MPI, and MPI ends with the program; tensors of a GPU go through memory of the host then, with collectives = "native";
    "nccl" for tensors on CUDA, between hosts (`collectives.nccl`): set the device first. Prices are those of gloo's messages;
    with another carrier better measure. bind: the address at which rank 0 opens the store where the ranks meet; by default that
    by which the other hosts reach it (`thinwire.listening`). Where torchrun has started the ranks, or `options` name a store, it
    is somebody else's.

    Returns the ledger of what is sent. UserError for a bad cluster file or setting, or without a CUDA device for "nccl".
    """
    for name, value, known in (("collectives", collectives, get_args(Collectives)), ("inner", inner, get_args(InnerName))):
        if value not in known:
            raise UserError(f"{name} = {value!r}; there are {', '.join(map(repr, known))}")
    if collectives == "native":
        for name, given in (("cluster", cluster), ("cache", cache)):
            if given is not None:
                raise UserError(f"{name} = {given!r} has no effect with collectives = 'native'; leave one of them out")
    tuner = None
    if collectives != "native":
        network = None if cluster is None else load_cluster(cluster)
        tuner = make_tuner(network, cluster or "", measures=collectives == "measured", cache=cache or "")
    ledger, mpi, ranks = Ledger(), None, dict[str, Any]()
    if inner == "mpi":
        timeout: timedelta = options.pop("timeout", default_pg_timeout)
        mpi = started_for_good(timeout.total_seconds())
        ranks = mpi.ranks(timeout, bind)
    elif (place := read_environment().place) and not agent_has_store() and not WHERE & options.keys():
        timeout = options.get("timeout") or default_pg_timeout
        store: dist.Store = open_store(place, timeout.total_seconds(), bind)
        ranks = {"store": store, "rank": place.rank, "world_size": place.world_size}
    elif (life := restart()) and life.lives and place and not WHERE & options.keys():
        timeout = options.get("timeout") or default_pg_timeout
        held = open_store(place, timeout.total_seconds(), bind, held=True)  # in which the last life has left its addresses
        store = dist.PrefixStore(f"life {life.lives}", held)
        ranks = {"store": store, "rank": place.rank, "world_size": place.world_size}
    elif bind:
        raise UserError(f"bind = {bind!r}: here somebody else opens the store, torchrun or who has given it; leave it out")
    if inner == "nccl":
        if place := read_environment().place:
            set_variables(shared_gpu_variables(place, torch.cuda.device_count(), socket.gethostname()))
        register_nccl(ledger, tuner)
    elif mpi and tuner is None:
        found = torch.accelerator.current_accelerator()
        backend.register(ledger, inner=mpi.inner, devices=("cpu", found.type) if found else ("cpu",))
    else:
        register_scheduled(ledger, tuner, inner=mpi.inner if mpi else None)
    dist.init_process_group(backend.NAME, **options, **ranks)
    return ledger
