"""Another exchange, and another period, while a run trains: what the old codes owe arrives, and what is sent is as predicted."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import EveryStep, LocalSGD
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.sync.make import make_synchroniser
from thinwire.sync.single_rank import SingleRank

STEPS, AT = 12, 4
INT4, PLAIN = Coded(kind="int4", exclude=(), vectors=True), NoCompression()
SYNCS = {"every_step": (EveryStep(), EveryStep()), "local_sgd": (LocalSGD(every=3), LocalSGD(every=4))}


def gradient(step: int, number: int, rank: int, like: torch.Tensor) -> torch.Tensor:
    seed = 1000 * rank + 10 * step + number
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def model_of_zeros() -> nn.Module:
    model = nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def switched(
    context: Rank, kind: str, codes: tuple[Any, Any], states: list[dict[str, Any]] | None, stop: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Gradients that do not depend on parameters, at a rate of 1; before step AT it goes over to the other setting. states: to go
    on with, of a run that was stopped. Returns the parameters that count, and the state."""
    kept = states[context.rank] if states else {"first": 0}
    number = int(kept["first"] > AT)
    rare, first = kind != "every_step", kept["first"]
    layout = Layout(outer=2) if rare else Layout(data=2)
    sync = make_synchroniser(SYNCS[kind][number], codes[number], layout, context.ledger)
    model = model_of_zeros()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if states:
        model.load_state_dict(kept["model"])
        sync.load_state_dict(kept["sync"])
    with sync.attached(model, optimizer, init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)) as module:
        with sync.rehearsal():
            for _ in range(2):
                module(torch.zeros(1, 40)).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        for step in range(first, stop):
            if step == AT:
                sync.switch(make_exchange(codes[1], context.ledger), getattr(SYNCS[kind][1], "every", 1))
            with sync.microbatch(last=True):
                module(torch.zeros(1, 40))
                terms = [(p * gradient(step, n, context.rank, p)).sum() for n, p in enumerate(model.parameters())]
                torch.stack(terms).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            sync.after_step(step)
        weights = {name: values.clone() for name, values in model.state_dict().items()}
        state = {"first": stop, "model": weights, "sync": sync.state_dict()}
        if stop == STEPS:
            sync.finish()
        with sync.averaged():
            return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), state


def exact() -> torch.Tensor:
    """Less the mean of all gradients of two ranks."""
    parameters = list(model_of_zeros().parameters())
    sums = [sum(gradient(s, n, r, p) for s in range(STEPS) for r in (0, 1)) for n, p in enumerate(parameters)]
    return torch.cat([-one.reshape(-1) / 2 for one in sums])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", SYNCS)
def test_what_codes_owe_arrives_when_they_are_given_up(ranks2: Pool, kind: str) -> None:
    """And without the change it would not have."""
    for codes, close in (((INT4, PLAIN), True), ((INT4, INT4), False)):
        (one, _), (other, _) = ranks2.run(switched, kind, codes, None, STEPS)
        assert torch.equal(one, other)
        assert torch.allclose(one, exact(), atol=1e-5) == close


@pytest.mark.parametrize("codes", [(INT4, PLAIN), (PLAIN, INT4)], ids=["plain", "int4"])
def test_resumed_behind_a_change_equals_uninterrupted(ranks2: Pool, codes: tuple[Any, Any]) -> None:
    """Also with what is owed still to be sent."""
    whole = ranks2.run(switched, "local_sgd", codes, None, STEPS)
    cut = [state for _, state in ranks2.run(switched, "local_sgd", codes, None, 6)]
    assert bool(cut[0]["sync"]["owed"]) == (codes[0] == INT4)
    resumed = ranks2.run(switched, "local_sgd", codes, cut, STEPS)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(whole, resumed, strict=True))


def test_what_is_owed_is_shared_out_to_other_ranks() -> None:
    """The mean for each, so that the mean over all stays the same."""
    states = [{"inner": {}, "exchange": {}, "owed": {"a": torch.tensor([2.0 * rank])} if rank else {}} for rank in range(4)]
    sync = make_synchroniser(LocalSGD(), PLAIN, Layout(outer=2), None)  # type: ignore[arg-type]
    sync.adopt(states)
    assert sync._owed["a"].item() == 3.0  # type: ignore[attr-defined]


def test_what_cannot_change_says_so() -> None:
    with pytest.raises(UserError, match="SingleRank cannot change while it trains"):
        SingleRank().switch(None, 1)
