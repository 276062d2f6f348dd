"""A training step on equal accelerators: the model's shape, the layout, the batch, the links. Plain data.

Ranks lie in the usual order: tensor innermost, then seq, data, pipe, and outer outermost; so an axis lies inside a host as far as
the degrees of the axes inside of it leave room. Hosts may lie at sites, whose uplinks are another tier.

    N     parameters: V h (twice where not tied) + L (h a_w (2 + 2 g) + m h F), a_w = width of all heads, g = kv_heads / heads,
          m = 3 matrices for a gated MLP, else 2; F counts once for each expert
    m     micro-batches of a step: B / (d b)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from thinwire.plan.gpu.network import Network


@dataclass(frozen=True, kw_only=True)
class Job(Network):
    """One step on a network. Letters: L layers, h width, a heads, F hidden, V vocabulary, s sequence; d, t, p, c, e degrees.

    zero: 0 to 3; recompute: "none", "selective" or "full"; compiled: torch.compile; hidden_tensor: what the tensor axis sends
    hides under products ("async tensor parallel"); stages: layers of each, where that is known; fused: attention that keeps
    no scores; wide_gradients: summed in float32.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    gated: bool
    tied: bool
    vocabulary: int
    sequence: int
    experts: int = 1
    experts_per_token: int = 1
    precision: str
    data: int = 1
    tensor: int = 1
    pipe: int = 1
    seq: int = 1
    expert: int = 1
    interleave: int = 1
    zero: int = 0
    sequence_parallel: bool = False
    micro_batch: int
    global_batch: int
    schedule: str = "1f1b"
    recompute: str = "none"
    offload: str = ""
    compiled: bool = False
    hidden_tensor: bool = False
    stages: tuple[int, ...] = ()
    fused: bool = True
    wide_gradients: bool = False
    outer: int = 1

    @property
    def micro_batches(self) -> float:
        """Of one replica in a step."""
        return max(1.0, self.global_batch / (self.data * self.micro_batch))

    @property
    def tokens(self) -> float:
        """Of a micro-batch, on one rank of the seq axis."""
        return self.micro_batch * self.sequence / self.seq

    @property
    def layer_parameters(self) -> tuple[float, float]:
        """Of one block, without norms: of attention, and of all experts' MLPs."""
        attention = self.width**2 * (2 + 2 * self.kv_heads / self.heads)
        return attention, (3 if self.gated else 2) * self.width * self.hidden * self.experts

    @property
    def embedding_parameters(self) -> float:
        """Of one of the matrices at the ends."""
        return float(self.vocabulary * self.width)

    @property
    def parameters(self) -> float:
        """Of the whole model, without norms and learned positions."""
        return self.layers * sum(self.layer_parameters) + self.embedding_parameters * (1 if self.tied else 2)

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Blocks of each stage; where only the embeddings' places make it even, the first and the last have one less."""
        p = self.pipe
        if len(self.stages) == p:
            return self.stages
        if p > 1 and self.layers % p and (self.layers + 2) % p == 0:
            each = (self.layers + 2) // p
            return (each - 1, *(each,) * (p - 2), each - 1)
        fewer, more = divmod(self.layers, p)
        return tuple(fewer + (1 if p - more - 1 <= stage < p - 1 else 0) for stage in range(p)) if more else (fewer,) * p

    @property
    def local_parameters(self) -> float:
        """On the rank that has most, before ZeRO: a stage's, divided over tensor and expert ranks."""
        attention, experts = self.layer_parameters
        block = (attention + experts / self.expert) / self.tensor
        ends = self.embedding_parameters / self.tensor * (1 if self.pipe > 1 or self.tied else 2)
        counts = self.stage_layers
        return max(max(counts[0], counts[-1]) * block + ends, max(counts) * block)

    def at_site(self, axis: str) -> int:
        """Ranks of a group along "data", "shards", "pipe" or "outer" at each of several sites; 0 if they are all at one."""
        stride = self.tensor if axis == "shards" else self.tensor * self.seq
        stride *= {"pipe": self.data, "outer": self.data * self.pipe}.get(axis, 1)
        degree = self.seq * self.data if axis == "shards" else getattr(self, axis)
        if not self.site_devices or stride * degree <= self.site_devices:
            return 0
        return max(1, min(degree, self.site_devices // stride))

    def place(self, axis: str) -> tuple[int, int]:
        """(hosts, ranks of a group on each) of a group along "tensor", "seq", "data", "pipe" or "outer"; "expert" lies in data,
        and "shards" are seq and data together."""
        stride = 1
        within = {"expert": self.expert, "shards": self.seq * self.data}
        if axis in within:
            inside = max(1, min(within[axis], self.per_host // self.tensor))
            return ceil(within[axis] / inside), inside
        for name in ("tensor", "seq", "data", "pipe", "outer"):
            degree = getattr(self, name)
            if name == axis:
                inside = max(1, min(degree, self.per_host // stride))
                return ceil(degree / inside), inside
            stride *= degree
        raise ValueError(axis)
