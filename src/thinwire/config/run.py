"""run.toml: everything that decides a training run. `plan` writes what `train` reads, so two plans can be compared by diff.

In a section with a `kind`, this selects the keys. Quantities take a number in the base unit or a string with its unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BeforeValidator, Field, model_validator

from thinwire.config.compress import SPARSELOCO, Compress, NoCompression, without_feedback
from thinwire.config.data import DataSection
from thinwire.config.experts import ExpertsSection
from thinwire.config.model import ModelConfig, preset
from thinwire.config.optimizer import AdamW, Muon, Optimizer
from thinwire.config.pipeline import APART, PipelineSection
from thinwire.config.pretrained import read_shape, tokenizer_of
from thinwire.config.sharded import ShardedSection
from thinwire.config.sync import EveryStep, LocalSGD, Sync
from thinwire.config.task import TaskSection
from thinwire.config.tensor import TensorSection
from thinwire.config.watch import WatchSection
from thinwire.errors import UserError
from thinwire.layout import Layout, check_sequence
from thinwire.tomlfile import Section, put, read_toml, read_value, validate
from thinwire.units import parse

DEFAULT_PRESET = "1m"
LEAST_EPSILON = 2.0**-12
"""Root of the least positive float16, 2^-24."""
Seconds = Annotated[float, BeforeValidator(lambda value: parse(value, "s"))]


class ClusterSection(Section):
    """What the ranks run on."""

    file: str = ""
    """A cluster file or the name of a shipped one; empty: unknown, so nothing is predicted for the wire."""


class ModelSection(ModelConfig):
    """A preset by name, single fields of which may be changed; or a pretrained model; or layers, width and heads at least."""

    preset: str = ""
    pretrained: str = ""
    """A folder as Hugging Face keeps models of Llama's shape: config.json gives the shape, training begins from its weights.
    data.tokenizer is the folder's, unless it says another. Extra `pretrained`."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        whole = {"layers", "width", "heads"} <= set(values)
        if folder := values.get("pretrained"):
            if values.get("preset"):
                raise ValueError(f"preset = {values['preset']!r} and pretrained = {folder!r}: give one of them")
            return values if whole else {**read_shape(Path(folder).expanduser()), **values}
        name = values.get("preset") or ("" if whole else DEFAULT_PRESET)
        if name:
            changes = {key: value for key, value in values.items() if key in ModelConfig.model_fields}
            unknown = set(values) - set(ModelSection.model_fields)
            filled = {**preset(name, changes).model_dump(), "preset": name}
            return filled | {key: values[key] for key in unknown}
        return values

    def shape(self) -> ModelConfig:
        """Without the names of what it was taken from."""
        return ModelConfig(**self.model_dump(exclude={"preset", "pretrained"}))


class CollectivesSection(Section):
    """What runs all-reduces and the other collectives, on GPUs in groups over several hosts."""

    kind: Literal["native", "priced", "measured"] = "native"
    """"native": the own algorithms of gloo, MPI or NCCL. "measured": when an op is first used in a class of sizes, the few
    algorithms that are best by price on the cluster are tried on the ranks, and the fastest is kept, the native one included.
    "priced": the best by price."""


class LayoutSection(Section):
    """Degrees of the parallel axes; their product is the number of ranks."""

    outer: int = Field(0, ge=0)
    """Replicas that exchange rarely; 0: all ranks that the other axes leave if sync.kind is such a one, else 1."""
    pipe: int = Field(1, ge=1)
    """Ranks among which the layers of the model are shared out; see [pipeline]."""
    data: int = Field(0, ge=0)
    """Replicas that average gradients in each step; 0: all ranks that the other axes leave, but 1 beside a rare sync.kind."""
    expert: int = Field(1, ge=1)
    """Replicas among which the experts of every block are shared out; see [experts]."""
    seq: int = Field(1, ge=1)
    """Ranks among which the tokens of every sequence are shared out."""
    shard: int = Field(1, ge=1)
    """Replicas, neighbours, that share the states of one: weights, gradients and the optimizer's; see [sharded]."""
    tensor: int = Field(1, ge=1)
    """Ranks among which every layer's matrices are shared out; see [tensor]."""
    map: Literal["links", "ranks"] = "links"
    """How ranks are numbered, and so which links the axes lie on: "links": along those of the cluster, where it is known, so that
    the inner axes have the fastest; "ranks": as they were started."""

    def resolve(self, world_size: int, *, rare: bool) -> Layout:
        """The Layout for `world_size` ranks. rare: of sync.kind. UserError if it does not fit."""
        if self.outer > 1 and not rare:
            raise UserError(f"layout.outer = {self.outer}: only a sync.kind that exchanges rarely uses this axis; set it to 1")
        others = self.pipe * self.expert * self.seq * self.shard * self.tensor
        if rare:
            data = self.data or (max(1, world_size // (self.outer * others)) if self.outer else 1)
            outer = self.outer or max(1, world_size // (data * others))
        else:
            outer = 1
            data = self.data or max(1, world_size // others)
        inner = {"expert": self.expert, "seq": self.seq, "shard": self.shard, "tensor": self.tensor}
        layout = Layout(outer=outer, pipe=self.pipe, data=data, **inner)
        layout.check(world_size)
        return layout


def _kind_or_bytes(value: Any) -> Any:
    return value if value in get_args(RecomputeKind) else parse(value, "B")


RecomputeKind = Literal["none", "selective", "full"]
Recompute = Annotated[RecomputeKind | float, BeforeValidator(_kind_or_bytes)]


class TrainSection(Section):
    """Steps, batches, optimizer, and what is written how often."""

    steps: int = Field(300, ge=1)
    micro_batch: int = Field(8, ge=1)
    """Sequences per micro-batch and rank."""
    sequence: int = Field(256, ge=2)
    """Tokens per sequence."""
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products of a model in float32; "auto": bfloat16 where the device is fast in it. Weights and their exchange
    stay float32. A model of another model.dtype is multiplied in that."""
    recompute: Recompute = "none"
    """Of activations, in the backward pass: "none" keeps all; "selective" drops those inside attention and MLP; "full" keeps what
    enters a block; or as many bytes as a rank may need, such as "8 GiB": then as few operations are repeated as fit."""
    optimizer: Optimizer = AdamW()
    on_host: tuple[Literal["optimizer", "activations"], ...] = ()
    """What lies in the host's memory while a device does not use it: the optimizer's state, which a step fetches and gives back
    piece by piece; what a forward pass keeps for the backward pass. For devices: a CPU has no other memory."""
    updates: Literal["together", "early"] = "together"
    """"early": each parameter is updated in the backward pass, as soon as its gradient is there, which is given up then. For one
    micro-batch a step without clipping, where no other rank has a part of the gradient."""
    rounded: Literal["none", "int8", "int4"] = "none"
    """As what passes and scores see the matrices: as `thinwire shrink` would store them. The optimizer's are whole."""
    learning_rate: float = Field(1e-3, gt=0)
    final_learning_rate: float = Field(0.1, ge=0, le=1)
    """End of the cosine, as a fraction of learning_rate."""
    warmup_steps: int = Field(20, ge=0)
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    eval_every: int = Field(100, ge=0)
    """Steps between evaluations on the held-out part; 0: at the end only."""
    eval_tokens: int = Field(131_072, ge=1)
    """Tokens of the held-out part that are scored, over all ranks; of a task of the catalogue, examples."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: by the clock."""
    checkpoint_every_s: Seconds = Field(600.0, ge=0)
    """Seconds between checkpoints, counted when a report is due; 0: at the end and when interrupted only."""
    checkpoints_kept: int = Field(3, ge=1)
    """The newest that stay."""
    checkpoint_copies: int = Field(1, ge=1, le=2)
    """Disks on which each rank's own part of a checkpoint is kept, where hosts share none. 2: sent to the next one as well."""
    log_every: int = Field(10, ge=1)
    replan: bool = False
    """Codes, periods of exchanges and micro-batches change in reports, where links or ranks are otherwise than predicted."""
    ranks: int = Field(0, ge=0)
    """Ranks to start when launched alone; 0: as many as the cluster file has, else 2."""
    run: str = ""
    """The run folder; empty: runs/<date>-<time>."""
    backend: Literal["auto", "gloo", "mpi"] = "auto"
    """What carries the ranks' exchanges. "mpi" needs the extra `mpi` and ranks that mpiexec has started; "auto": that where both
    are so, else gloo. On GPUs "auto" is NCCL, and the others go through memory of the host."""
    timeout_s: Seconds = Field(300.0, gt=0)
    """A collective that takes longer is given up, and the run with it."""


class RunConfig(Section):
    """A whole run. `RunConfig()` is valid: a 1M model on the standard library's sources."""

    cluster: ClusterSection = ClusterSection()
    collectives: CollectivesSection = CollectivesSection()
    task: TaskSection = TaskSection()
    model: ModelSection = ModelSection.model_validate({})
    data: DataSection = DataSection()
    layout: LayoutSection = LayoutSection()
    pipeline: PipelineSection = PipelineSection()
    tensor: TensorSection = TensorSection()
    sharded: ShardedSection = ShardedSection()
    experts: ExpertsSection = ExpertsSection()
    sync: Sync = EveryStep()
    compress: Compress = NoCompression()
    train: TrainSection = TrainSection()
    watch: WatchSection = WatchSection()

    @model_validator(mode="before")
    @classmethod
    def _with_what_follows(cls, content: Any) -> Any:
        sync = content.get("sync") if isinstance(content, dict) else None
        kind = sync.get("kind") if isinstance(sync, dict) else None
        if kind == "sparseloco" and not content.get("compress"):
            content = {**content, "compress": SPARSELOCO}
        if kind == "retrace" and "compress" in content:
            content = {**content, "compress": without_feedback(content["compress"])}
        model, data = (content.get(name, {}) if isinstance(content, dict) else {} for name in ("model", "data"))
        if isinstance(model, dict) and isinstance(data, dict) and model.get("pretrained") and "tokenizer" not in data:
            content = {**content, "data": {**data, "tokenizer": tokenizer_of(Path(model["pretrained"]).expanduser())}}
        return content

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        self.task.check(self)
        if self.sync.kind == "auto" and self.compress.kind != "none":
            raise ValueError(f"compress.kind = {self.compress.kind!r}: sync.kind = 'auto' chooses codes too; leave it out")
        if self.train.sequence > self.model.context:
            raise ValueError(f"train.sequence {self.train.sequence} is longer than model.context {self.model.context}")
        self._check_pipeline()
        self._check_tensor()
        self._check_sequence()
        self._check_experts()
        if self.layout.shard > 1:
            self._check_sharded()
        assigns = "sync.assign = 'by_speed'" * self.sync.by_speed or "train.replan = true" * self.train.replan
        for axis in ("pipe", "expert", "seq", "shard", "tensor") if assigns else ():
            if getattr(self.layout, axis) > 1:
                raise ValueError(f"{assigns} assigns micro-batches to replicas of one rank; leave it out with layout.{axis}")
        self._check_replan()
        self.sync.check(self.train, self.layout)
        if self.train.recompute != "none" and (reason := self.cannot_recompute):
            raise ValueError(f"train.recompute = {self.train.recompute!r}: {reason}")
        if self.train.updates == "early":
            self._check_early()
        for axis in ("pipe", "expert", "shard", "tensor") if self.train.rounded != "none" else ():
            if getattr(self.layout, axis) > 1:
                raise ValueError(
                    f"train.rounded = {self.train.rounded!r} rounds whole matrices, and layout.{axis} = "
                    f"{getattr(self.layout, axis)} gives ranks parts of them; set it to 1"
                )
        dtype, optimizer = self.model.dtype, self.train.optimizer
        moments = isinstance(optimizer, AdamW) and optimizer.states == "full"
        if self.compress.kind != "none" and self.compress.precondition and not moments:
            raise ValueError("compress.precondition = true takes the second moments of train.optimizer.kind = 'adamw' in full")
        if dtype != "float32" and self.train.dtype not in ("auto", dtype):
            raise ValueError(
                f"train.dtype = {self.train.dtype!r} is for a model in float32, and model.dtype = {dtype!r}, in which it is "
                "multiplied; leave train.dtype out"
            )
        if dtype == "float16" and isinstance(optimizer, AdamW | Muon) and optimizer.epsilon < LEAST_EPSILON:
            raise ValueError(
                f"train.optimizer.epsilon = {optimizer.epsilon:g} with model.dtype = 'float16', in which squares of gradients "
                f"below {LEAST_EPSILON:.2g} are 0 and a step is divided by epsilon alone; set it to 2.5e-4 or more, or take "
                "'bfloat16'"
            )
        return self

    def laid_out(self, world_size: int) -> Layout:
        """On so many ranks. UserError for what does not fit."""
        layout = self.layout.resolve(world_size, rare=self.sync.rare)
        if self.train.updates == "early" and layout.data > 1:
            raise UserError(
                f"train.updates = 'early' with layout.data = {layout.data}: a gradient is averaged before it is used; take a "
                "sync.kind that exchanges rarely, such as 'diloco', or train.updates = 'together'"
            )
        return layout

    @property
    def cannot_recompute(self) -> str:
        """Why train.recompute is "none"; nothing if it may be another."""
        if self.layout.pipe > 1 and self.pipeline.schedule in APART:
            return (
                f"pipeline.schedule = {self.pipeline.schedule!r} goes back twice, for inputs and for weights, and would compute "
                "activations again both times; take '1f1b' or 'interleaved'"
            )
        return ""

    def _check_early(self) -> None:
        for name, value, wanted in (
            ("train.clip", self.train.clip, 0),
            ("sync.accumulate", self.sync.accumulate, 1),
            *((f"layout.{axis}", getattr(self.layout, axis), 1) for axis in ("pipe", "expert", "seq", "shard")),
        ):
            if value != wanted:
                raise ValueError(
                    f"train.updates = 'early' with {name} = {value:g}: no gradient is whole before the backward passes are over; "
                    f"set it to {wanted}, or train.updates to 'together'"
                )

    def _check_replan(self) -> None:
        kind, code, plain = self.sync.kind, self.compress.kind, ("none", "bf16", "int8", "int4")
        codes = dict.fromkeys(("every_step", "diloco", "streaming"), plain) | {"sparseloco": ("topk",)}
        stays = self.sync.by_speed or bool(getattr(self.sync, "first", None)) or not self.task.is_language_model
        if self.train.replan and (stays or code not in codes.get(kind, ())):
            raise ValueError(
                f"train.replan = true with sync.kind = {kind!r}, compress.kind = {code!r}: it changes every_step without assign, "
                f"diloco and streaming in {', '.join(plain)}, and sparseloco in topk, all without first; leave it out"
            )

    def _check_pipeline(self) -> None:
        stages, units = self.layout.pipe * self.pipeline.per_rank, self.model.layers + 2
        if self.layout.pipe > 1 and stages > units:
            raise ValueError(
                f"layout.pipe = {self.layout.pipe} with {self.pipeline.per_rank} stages a rank is {stages} stages, and a model "
                f"of {self.model.layers} layers has {units} units to share out; take layout.pipe = "
                f"{units // self.pipeline.per_rank} or less"
            )
        if self.pipeline.copies != "none" and not self.data.windows:
            raise ValueError(
                f"pipeline.copies = {self.pipeline.copies!r} is for samples that return, and data.windows = 0 draws others in "
                "each epoch; set data.windows, or leave copies out"
            )

    def _check_sequence(self) -> None:
        check_sequence(self.train.sequence, self.layout.seq)
        for axis in ("seq", "expert"):
            degree = getattr(self.layout, axis)
            if degree > 1 and isinstance(self.sync, LocalSGD) and self.sync.every_inside:
                raise ValueError(
                    f"sync.every_inside = {self.sync.every_inside} lets ranks of a replica take steps alone, and each of "
                    f"layout.{axis} = {degree} ranks has a part of their gradient only; leave it out with layout.{axis}"
                )

    def _check_experts(self) -> None:
        if self.model.experts and self.layout.seq > 1:
            raise ValueError(
                f"model.experts = {self.model.experts} with layout.seq = {self.layout.seq}: experts have slots for whole "
                "sequences; set it to 1"
            )
        if self.layout.expert > 1:
            self.model.check_experts(self.layout.expert)
            if self.sync.rare and self.compress.kind != "none":
                raise ValueError(
                    f"compress.kind = {self.compress.kind!r} with sync.kind = {self.sync.kind!r} and layout.expert = "
                    f"{self.layout.expert}: codes depend on the experts beside what these ranks each have whole, which would "
                    "come to differ; take compress.kind = 'none', or set layout.expert to 1"
                )

    def _check_tensor(self) -> None:
        degree = self.layout.tensor
        self.model.check_tensor(degree)
        if degree > 1 and isinstance(self.train.optimizer, Muon):
            raise ValueError(
                f"train.optimizer.kind = 'muon' orthonormalises whole matrices, of which a rank has a part with layout.tensor = "
                f"{degree}; take 'adamw', or layout.pipe in place of it"
            )
        if degree > 1 and self.collectives.kind != "native":
            raise ValueError(
                f"collectives.kind = {self.collectives.kind!r} lets groups of replicas add up in different orders, by which what "
                f"the {degree} ranks of layout.tensor each have whole would come to differ; set it to 'native'"
            )

    def _check_sharded(self) -> None:
        degree = self.layout.shard
        if self.model.experts:
            raise ValueError(
                f"layout.shard = {degree} and model.experts = {self.model.experts} do not go together; take layout.expert"
            )
        if self.layout.pipe > 1 and self.sharded != ShardedSection():
            raise ValueError(
                f"[sharded] says how ranks that run all layers share weights and gradients; the {degree} of a stage of "
                f"layout.pipe = {self.layout.pipe} share the optimizer's state alone; leave the section out"
            )
        if isinstance(self.train.optimizer, Muon):
            raise ValueError(
                f"train.optimizer.kind = 'muon' orthonormalises whole matrices, of which a rank has some rows with "
                f"layout.shard = {degree}; take 'adamw', or layout.data in place of it"
            )
        if self.collectives.kind != "native":
            raise ValueError(
                f"collectives.kind = {self.collectives.kind!r} chooses for the groups of axes, and the {degree} ranks of "
                "layout.shard exchange over groups of their own; set it to 'native'"
            )


def load_run(path: Path | None, changes: list[str] = []) -> RunConfig:  # noqa: B006 (never changed)
    """Read run.toml (None: all defaults) and apply `changes` such as "train.steps=50". UserError in one line."""
    content = read_toml(path) if path else {}
    where = f"{path or 'the defaults'}{' with --set' if changes else ''}"
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {change!r}: write section.key=value, e.g. --set train.steps=50")
        put(content, key.strip(), read_value(text.strip()), f"--set {change!r}")
    return validate(RunConfig, content, where)


def dump_run(config: RunConfig, path: Path) -> None:
    """Write `config` in full, defaults included."""
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
