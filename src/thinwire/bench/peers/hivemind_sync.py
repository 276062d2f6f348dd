"""hivemind's gradient averaging behind the Synchroniser's contract, so that one loop trains it and ours.

Every step all ranks find each other through the DHT, form a group, and average their gradients by butterfly all-reduce: each rank
reduces a part of the vector and sends back by how much each value is off (Ryabinin et al. 2021, "Moshpit SGD").

    fp32 fp16 u8 q8      what goes over the wire: float32, float16, 8-bit uniform codes, 8-bit quantiles

This is hivemind.optim.GradientAverager, the part of hivemind.Optimizer that exchanges. The Optimizer itself decides which batches
belong to a step, by the others' progress in the DHT, so it would train on other batches than its rivals. Left out with it is its
averaging of parameters: replicas get what their group averaged with errors that differ, and drift apart a little.

A group is looked for from the beginning of the step, as the Optimizer does when it knows when the step will end; so that costs
seconds only where it takes longer than the computation. A group that is complete does not wait for `MATCHMAKING_S`.

hivemind takes an average for good from which some rank's values are missing, and its Optimizer goes on with a rank's own gradient
where there is none; on busy machines the last message of a stream is lost now and then (1.1). So it is here, and counted. A rank
that missed its group gives its gradient to the next one, late, and has caught up after a step on its own.
"""

import logging
import multiprocessing
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from hivemind import DHT, compression
from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.optim.grad_averager import GradientAverager
from hivemind.utils import get_dht_time

from thinwire.bench.peers.outside import within
from thinwire.bench.peers.rank import agree
from thinwire.sync.single_rank import SingleRank

CODECS = {
    "fp32": compression.NoCompression,
    "fp16": compression.Float16Compression,
    "u8": compression.Uniform8BitQuantization,
    "q8": compression.Quantile8BitQuantization,
}
MATCHMAKING_S, REQUEST_S = 1.0, 0.5
"""How long a leader waits for a full group before it tries again, and a rank for a leader's answer. 5 and 3 s by default."""
CHUNK_S = 15.0
"""A sender of which nothing comes for so long is left out, as in hivemind.Optimizer; a part has 512 KiB."""
START_S, GROUP_S, EXCHANGE_S = 60.0, 30.0, 600.0


class CountingAverager(GradientAverager):
    """Counts the averages from which something is missing; they are made in a process of their own."""

    def __init__(self, *arguments, **named):
        self.torn = multiprocessing.Value("q", 0)
        super().__init__(*arguments, **named)

    async def _run_allreduce_inplace_(self, tensors, group_info, group_id=None, **named):
        whole = False
        try:
            await super()._run_allreduce_inplace_(tensors, group_info, group_id, **named)
            runner = self._running_groups[group_id or group_info.group_id].result()
            whole = not runner.banned_senders and not runner.tensor_part_container.failed_size
        finally:
            self.torn.value += not whole


class HivemindSync(SingleRank):
    """One per rank. address: where the others find this rank."""

    def __init__(self, method, address):
        super().__init__()
        self._name, self._codec, self._address = method.name, CODECS[method.code](), address
        self._parameters, self._averager, self._control = [], None, None
        self._exchanges = self._missed = self._level_after = 0

    @property
    def torn(self):
        """Of the exchanges so far, the part that brought this rank less than all values, or values of another step."""
        return (self._averager.torn.value + self._missed) / max(1, self._exchanges)

    @contextmanager
    def attached(self, model, optimizer, mesh):
        """Starts the DHT, on rank 0 first, and the averager. Collective."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._try_codec()
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # hivemind's loops leave tasks behind, which are complained of
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with within(START_S, f"{self._name}: the start of hivemind on rank {rank}"):
            dht = self._dht([]) if rank == 0 else None
            first = agree(dht and [str(address) for address in dht.get_visible_maddrs()][:1])
            dht = dht or self._dht(first)
            self._averager = CountingAverager(
                self._parameters,
                dht=dht,
                prefix="thinwire",
                reuse_grad_buffers=True,
                target_group_size=world_size,
                min_group_size=world_size,
                min_matchmaking_time=MATCHMAKING_S,
                request_timeout=REQUEST_S,
                compression=self._codec,
                allow_state_sharing=False,
                next_chunk_timeout=CHUNK_S,
                allreduce_timeout=EXCHANGE_S,
                start=True,
            )
            dist.barrier()
        try:
            yield model
            dist.barrier()  # or a rank would lose the DHT's first node while it still averages
        finally:
            self._averager.shutdown()
            dht.shutdown()

    @contextmanager
    def microbatch(self, last):
        """Looks for a group from the first on, averages after the last."""
        alone = self._exchanges < self._level_after
        if self._control is None and not alone:
            soon, number = get_dht_time() + MATCHMAKING_S, self._exchanges + 1
            self._control = self._averager.schedule_step(soon, timeout=GROUP_S, gather=number, allow_retries=False)
        yield
        self._ready_at = self._clock.now()
        if last:
            self._exchanges += 1
            if alone:
                self._missed += 1
            else:
                self._exchange()

    @torch.no_grad()
    def _exchange(self):
        with within(EXCHANGE_S, f"{self._name}: exchange {self._exchanges} on rank {dist.get_rank()}"):
            self._averager.accumulate_grads_(batch_size=1)  # the loss is divided already
            try:
                numbers = self._averager.step(weight=1.0, control=self._control, timeout=EXCHANGE_S).values()
                self._level_after = max(numbers)
            except MatchmakingException:  # the all-reduce failed, which is counted there; what it left of the gradient is used
                pass
            except AllreduceException:  # no group was found
                self._missed += 1
        with self._averager.get_tensors() as averaged:
            for parameter, mean in zip(self._parameters, averaged, strict=True):
                parameter.grad.copy_(mean)
        self._averager.notify_used_averaged_gradients()
        self._control = None

    def _try_codec(self):
        values = torch.linspace(-1, 1, 1000)
        try:
            self._codec.extract(self._codec.compress(values, compression.CompressionInfo.from_tensor(values)))
        except Exception as error:
            sys.exit(f"{self._name}: hivemind cannot read its own code ({error}); its 8-bit codes want numpy < 2.4")

    def _dht(self, first):
        return DHT(
            initial_peers=first,
            host_maddrs=[f"/ip4/{self._address}/tcp/0"],
            use_relay=False,
            auto_nat=False,
            nat_port_map=False,
            startup_timeout=START_S,
            start=True,
        )


make_sync = HivemindSync
