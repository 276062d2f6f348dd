"""What is trained, as the trainer sees it: batches, a loss, and sums over the held-out part from which a score follows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from thinwire.config.model import ModelConfig
from thinwire.workload import Workload

Batch = Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a task is judged by besides its loss. margin: by so much, in its unit, it has to be better than the baseline; stated
    before any run. higher: whether more is better."""

    name: str
    unit: str
    margin: float
    higher: bool = True


class Task(Protocol):
    """Made on every rank; methods are local: no rank waits for another."""

    @property
    def unit(self) -> str:
        """Of the loss: "nats per byte"."""

    @property
    def item(self) -> str:
        """What `workload` counts: "token", "image"."""

    @property
    def workload(self) -> Workload:
        """One micro-batch of one rank."""

    @property
    def shape(self) -> ModelConfig | None:
        """Of a `Transformer`, which layouts can cut; None: of another model, which every rank has whole."""

    @property
    def sha256(self) -> str:
        """Of the data: the same on all ranks."""

    @property
    def score_is(self) -> Score | None:
        """None: the loss is all there is."""

    @property
    def num_sums(self) -> int:
        """How many numbers `score` gives."""

    def build_model(self) -> nn.Module:
        """The same weights on each rank: seeded. What it is called with and gives are tensors."""

    def batch(self, step: int, index: int) -> Batch:
        """Micro-batch `index` of all that the replicas share in the step, `accumulate` times as many as there are replicas.

        A function of its arguments alone, so a run resumes by asking for a later step.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the micro-batch, a scalar with a gradient."""

    def held_out(self, replica: int) -> Iterator[tuple[Batch, int]]:
        """This replica's share of the held-out part: batches, and how many items count in each."""

    def score(self, model: nn.Module, replica: int) -> tuple[float, ...]:
        """Sums over this replica's share of the held-out part: of losses, of their weights, then what `score_of` wants. The loss
        is the first over the second, both summed over replicas."""

    def score_of(self, sums: Sequence[float]) -> float | None:
        """From the sums over all replicas; None without a `score_is`."""

    def settle(self, model: nn.Module) -> None:
        """Give `model` what it needs besides its weights to be used; nothing as a rule."""

    def predict(self, model: nn.Module, given: str) -> str:
        """What the model, in evaluation mode, says of an input: a text, or the path of a file. UserError for what is neither."""

    def picture(self, model: nn.Module, given: str) -> str:
        """The same, drawn: SVG; empty where there is nothing to draw."""

    def shown(self, model: nn.Module, count: int) -> list[str]:
        """Some held-out examples beside what the model, in evaluation mode, says of them: a line each, or several and an empty
        one. A line may be a picture (`pictures.uri`)."""

    def describe(self) -> dict[str, Any]:
        """`data` and, where there are such, `baseline`, `item` and `score` of record.json."""
