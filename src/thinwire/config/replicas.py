"""What servers and replicas that live and die alone must agree on. Server 0 sends it to each worker that joins."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from thinwire.config.optimizer import SGD, AdamW
from thinwire.config.run import Seconds
from thinwire.tomlfile import Section


class Code(Section):
    """How vectors travel. Options that may be None belong to single kinds, with defaults there."""

    kind: Literal["none", "bf16", "fp16", "int8", "int4", "fp4", "sign", "ternary", "codebook2", "topk"] = "none"
    feedback: bool | None = None
    """Of pushes: what coding loses is kept at the sender and added to the next one; None: yes. What a pull loses is in the next
    difference anyway."""
    feedback_decay: float | None = Field(None, ge=0, le=1)
    """Of what is kept, this part is added (SparseLoCo: 0.95); None: all."""
    rounding: Literal["nearest", "stochastic"] | None = None
    hadamard: bool = False
    k: int | None = Field(None, ge=1)
    values: Literal["bf16", "int8"] | None = None

    @property
    def feeds_back(self) -> bool:
        """Whether a worker keeps a residual (error feedback)."""
        return self.kind != "none" and self.feedback is not False

    @model_validator(mode="after")
    def _check(self) -> Code:
        given = self.model_dump(exclude={"kind"}, exclude_defaults=True)
        if self.kind == "none" and given:
            raise ValueError(
                f"{next(iter(given))} = {next(iter(given.values()))!r} has no effect on what is not coded; leave it out"
            )
        if self.feedback is False and self.feedback_decay is not None:
            raise ValueError(f"feedback_decay = {self.feedback_decay} has no effect without feedback; leave it out")
        return self


class ServerAdamW(AdamW):
    """On the server's range of the weights."""


class ServerSGD(SGD):
    """On the server's range of the weights; without momentum, unless it is asked for."""

    momentum: float = Field(0.0, ge=0, lt=1)


class Gradients(Section):
    """A push is a gradient; the server's optimizer makes a step of it (Li et al. 2014)."""

    kind: Literal["gradients"] = "gradients"
    delay: int = Field(0, ge=-1)
    """How many steps a worker may be ahead of the slowest live one; 0: sequential, -1: any number (eventual)."""
    learning_rate: float = Field(0.1, gt=0)
    """Used where a push names none."""
    optimizer: Annotated[ServerSGD | ServerAdamW, Field(discriminator="kind")] = ServerSGD()


class DiLoCo(Section):
    """A push is how far a replica's own optimizer went in some local steps; merged pushes are an outer step."""

    kind: Literal["diloco"] = "diloco"
    every: int = Field(30, ge=1)
    """Local steps between pushes, for replicas that say nothing else."""
    quorum: int = Field(0, ge=0)
    """Pushes of live replicas that make a merge; 0: of all that live."""
    grace_s: Seconds = Field(0.0, ge=0)
    """Once the quorum is there, the others may come for so long."""
    learning_rate: float = Field(0.7, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weighting: Literal["tokens_squared_per_step", "tokens", "equal"] = "tokens_squared_per_step"


class Service(Section):
    """One parameter service: its servers and what they do with what is pushed."""

    servers: int = Field(1, ge=1)
    """The weights are cut into so many ranges, a server each."""
    first_workers: int = Field(1, ge=1)
    """Nobody begins before so many workers have joined; from then on they come and go."""
    total_tokens: float = Field(0.0, ge=0)
    """Once so many tokens, as pushes weigh them, are merged, the run is over for every worker; 0: each ends by itself."""
    merge: Annotated[Gradients | DiLoCo, Field(discriminator="kind")] = DiLoCo()
    push: Code = Code()
    pull: Code = Code()
    """Other than "none": a worker is sent the code of the difference to what it has."""
    most_values: int = Field(2**30, ge=1)
    """No server takes first weights of more values than this."""
    heartbeat_s: Seconds = Field(0.5, gt=0)
    """A worker sends word of its progress at most so often."""
    timeout_s: Seconds = Field(300.0, gt=0)
    """Whoever makes no progress for so long is given up: no step, no wait for an answer, no word. A shorter silence delays; one
    that is killed is noticed at once."""

    @model_validator(mode="after")
    def _check(self) -> Service:
        for option in ("feedback", "feedback_decay"):
            if getattr(self.pull, option) is not None:
                raise ValueError(f"pull.{option} has no effect: what a pull loses is in the next difference; leave it out")
        if isinstance(self.merge, DiLoCo) and self.merge.quorum and self.servers > 1:
            raise ValueError(
                f"a quorum of {self.merge.quorum} with {self.servers} servers: each would merge others; take 1 server"
            )
        return self
