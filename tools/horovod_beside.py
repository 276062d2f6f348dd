"""A training step through Horovod 0.28.1 and through `thinwire.horovod.torch`, in turns, on one network.

    thinwire lab run --cluster two-racks --unpaced -- python tools/horovod_beside.py FOLDER [CONTENDER ...]

FOLDER holds Horovod's package. Its last release (June 2023) asks for C++14, and current PyTorch for C++20; with that it builds:

    pip download --no-deps --no-binary :all: horovod==0.28.1 && tar xzf horovod-0.28.1.tar.gz && cd horovod-0.28.1
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 20/' CMakeLists.txt horovod/torch/CMakeLists.txt
    export HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    pip install --no-deps --no-build-isolation --target FOLDER .

Both run the same function on the same ranks; only the module differs. Each turn begins with `init` and steps that are not
counted, and ends with `shutdown`. Ours knows the network by the lab's cluster file. Bytes are those of the network card.
"""

import argparse
import importlib
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn

import thinwire
from thinwire.environment import read_environment

CONTENDERS = ("horovod none", "ours none", "horovod fp16", "ours fp16", "ours int4")
WARM_STEPS = 5
"""What is sent together differs from step to step, and ours tries collectives when a size is new."""


def network() -> nn.Module:
    """A Transformer of 3.2 million parameters in 75 tensors, from a seed."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False), nn.Linear(256, 64))


def trained(hvd: ModuleType, compression: str, steps: int) -> tuple[list[float], list[int], float]:
    """Seconds and bytes from this host's card, of each of `steps` steps on this rank, and the last loss."""
    hvd.init()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=getattr(hvd.Compression, compression)
    )
    draw = torch.Generator().manual_seed(hvd.rank())
    data, target = torch.randn(4, 16, 256, generator=draw), torch.randint(64, (64,), generator=draw)
    loss, seconds, sent = torch.zeros(()), [], []
    for _ in range(WARM_STEPS + steps):
        begun, before = time.perf_counter(), card_bytes()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data).flatten(0, 1), target)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
        sent.append(card_bytes() - before)
    loss = hvd.allreduce(loss.detach(), name="loss")
    hvd.shutdown()
    return seconds[WARM_STEPS:], sent[WARM_STEPS:], float(loss)


def place_for_horovod() -> None:
    """What its launcher would tell each rank: one rank a host, and where they meet, a server on rank 0 which each `init` begins
    anew."""
    rank, size = dist.get_rank(), dist.get_world_size()
    where: list[object] = [None]
    if rank == 0:
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer

        server = RendezvousServer()
        port = server.start()
        server.init(get_host_assignments(parse_hosts(",".join(f"rank{one}:1" for one in range(size))), size))
        where = [(socket.gethostbyname(os.environ["MASTER_ADDR"]), port)]
    dist.broadcast_object_list(where)
    address, port = where[0]  # type: ignore[misc]
    places = {"RANK": rank, "SIZE": size, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "CROSS_RANK": rank, "CROSS_SIZE": size}
    places |= {"HOSTNAME": f"rank{rank}", "GLOO_RENDEZVOUS_ADDR": address, "GLOO_RENDEZVOUS_PORT": port}
    places |= {"GLOO_IFACE": os.environ["GLOO_SOCKET_IFNAME"], "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo"}
    os.environ |= {f"HOROVOD_{name}": str(value) for name, value in places.items()}


def card_bytes() -> int:
    """Sent by this host so far."""
    card = os.environ["GLOO_SOCKET_IFNAME"]
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(f"{card}:")]
    return int(line.split(":")[1].split()[8])


def main() -> None:
    """On each rank that the lab has started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("contenders", nargs="*", default=CONTENDERS, metavar="CONTENDER", help=", ".join(CONTENDERS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.folder))
    torch.set_num_threads(1)
    lab = read_environment().lab
    thinwire.init(str(lab.cluster) if lab else None)
    seconds: dict[str, list[float]] = {name: [] for name in arguments.contenders}
    sent: dict[str, list[int]] = {name: [] for name in arguments.contenders}
    for turn in range(arguments.turns):
        for name in arguments.contenders:
            whose, compression = name.split()
            if whose == "horovod":
                place_for_horovod()
            hvd = importlib.import_module("horovod.torch" if whose == "horovod" else "thinwire.horovod.torch")
            dist.barrier()
            own, bytes_sent, loss = trained(hvd, compression, arguments.steps)
            sent[name] += bytes_sent
            slowest = torch.tensor(own)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[name] += slowest.tolist()
            if dist.get_rank() == 0:
                told = ", ".join(f"{one:.3f}" for one in slowest.tolist())
                print(f"turn {turn + 1}: {name:12}  {told} s, loss {loss:.4f}", flush=True)
    if dist.get_rank() == 0:
        report(seconds, sent)
    dist.destroy_process_group()


def report(seconds: dict[str, list[float]], sent: dict[str, list[int]]) -> None:
    """A line for each contender: the median of its steps beside Horovod's of the same precision, or in float32."""
    medians = {name: statistics.median(several) for name, several in seconds.items()}
    parameters = sum(one.numel() for one in network().parameters())
    print(f"{dist.get_world_size()} ranks, {parameters:,} parameters")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        beside = medians.get(f"horovod {name.split()[1]}", medians.get("horovod none", median))
        line = f"{name:12}  {median:.3f} s a step ({low:.3f} to {high:.3f}), {beside / median:.2f} x"
        print(f"{line}, {statistics.median(sent[name]) / 1e6:.1f} MB a step from the first host's card")


if __name__ == "__main__":
    main()
