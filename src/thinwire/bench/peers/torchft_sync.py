"""torchft's DiLoCo behind the Synchroniser's contract, so that the loop which trains ours trains it too.

    each rank       a replica group of its own: its store, its Manager, its server of checkpoints
    rank 0          also the lighthouse, which decides every N steps who takes part

torchft.local_sgd.DiLoCo hooks into the inner optimizer's step and all-reduces the pseudo-gradient in float32 over gloo, tensor by
tensor: its buckets leave out tensors that do not fit (torchft 0.2), and its quantisation wants a GPU. The outer optimizer is the
same as for ours, Nesterov's with the run's eta and mu, so both train alike but for rounding.

torchft goes on without ranks that fail, and without an exchange that failed. Here all have to take part in each, or the rank ends
with one line about it. The rehearsal is one exchange of nothing, because connections are made in the first.
"""

import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from thinwire.bench.peers.outside import within
from thinwire.bench.peers.rank import agree
from thinwire.listening import listen, shown
from thinwire.sync.outer import published_learning_rate
from thinwire.sync.single_rank import SingleRank

START_S, EXCHANGE_S = 60.0, 600.0
JOIN_MS = 1000
"""The lighthouse waits so long for more ranks than it needs; 60 s by default."""


class TorchftSync(SingleRank):
    """One per rank. method: whose [sync] is that of our DiLoCo; address: where the others find this rank."""

    def __init__(self, method, address):
        super().__init__()
        self._name, self._config, self._address = method.name, method.config.sync, address
        self._done = self._exchanges = 0
        self._manager = self._diloco = None

    @contextmanager
    def attached(self, model, optimizer, mesh):
        """Starts lighthouse and manager. Collective."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        lighthouse = None
        with within(START_S, f"{self._name}: the start of torchft on rank {rank}"):
            if rank == 0:
                lighthouse = LighthouseServer(bind=shown(self._address, 0), min_replicas=world_size, join_timeout_ms=JOIN_MS)
            found = agree(lighthouse and f"http://{self._address}:{lighthouse.address().rpartition(':')[2]}")
            listener = listen(self._address, 0, f"torchft at {self._address}")
            listening = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.fileno()}
            store = dist.TCPStore(self._address, listener.getsockname()[1], **listening)
            listener.detach()
            self._manager = Manager(
                pg=ProcessGroupGloo(timeout=timedelta(seconds=EXCHANGE_S)),
                load_state_dict=None,
                state_dict=None,
                min_replica_size=world_size,
                use_async_quorum=False,
                timeout=timedelta(seconds=EXCHANGE_S),
                quorum_timeout=timedelta(seconds=EXCHANGE_S),
                connect_timeout=timedelta(seconds=START_S),
                rank=0,
                world_size=1,
                store_addr=self._address,
                store_port=store.port,
                lighthouse_addr=found,
                replica_id=f"rank{rank}",
                hostname=self._address,
                init_sync=False,
            )
        self._diloco = DiLoCo(
            self._manager,
            [model],
            optimizer,
            torch.optim.SGD(
                model.parameters(),
                lr=self._config.outer_learning_rate or published_learning_rate(world_size),
                momentum=self._config.outer_momentum,
                nesterov=bool(self._config.outer_momentum),
            ),
            sync_every=self._config.every,
            backup_device=torch.device("cpu"),
            pin_memory=False,
        )
        try:
            with self._diloco:
                yield model
                dist.barrier()  # or a rank would lose its lighthouse while it still exchanges
        finally:
            self._manager.shutdown(wait=False)
            if lighthouse:
                lighthouse.shutdown()

    @contextmanager
    def rehearsal(self):
        """See the top of the file. Collective."""
        with within(START_S, f"{self._name}: the first exchange of rank {dist.get_rank()}"):
            self._manager.start_quorum()
            self._manager.allreduce(torch.zeros(1)).wait()
            self._manager.should_commit()
        self._check()
        yield

    def microbatch(self, last):
        """Replicas go alone. The exchange is in the optimizer's step, so how long it is waited for is not known."""
        return nullcontext()

    def after_step(self, step):
        """Sees that the exchange, if there was one in the optimizer's step, was everyone's."""
        self._done += 1
        if self._done % self._config.every == 0:
            self._check()

    @contextmanager
    def averaged(self):
        """Inside, the model holds what the last exchange left, which is the same on all replicas. Local."""
        fragment = self._diloco._fragments[0]
        model = dict(fragment._model_fragment.named_parameters())
        own = {name: parameter.detach().clone() for name, parameter in model.items()}
        with torch.no_grad():
            fragment.restore_parameters()
            yield
            for name, parameter in model.items():
                parameter.copy_(own[name])

    def _check(self):
        self._exchanges += 1
        took_part = self._manager.num_participants()
        failed = self._manager.errored()
        if failed or self._manager.current_step() != self._exchanges or took_part != dist.get_world_size():
            why = str(failed.original_exception).splitlines()[0] if failed else "it was not committed"
            sys.exit(f"{self._name}: exchange {self._exchanges} had {took_part} of {dist.get_world_size()} ranks: {why}")


make_sync = TorchftSync
