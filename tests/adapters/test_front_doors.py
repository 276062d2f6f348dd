"""Accelerate, Lightning and Transformers' Trainer train a small GPT-2 on real ranks, through our codes and by DiLoCo."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from small_gpt2 import LOOPS, loss_of, model, predicted, settings_of

from pool import Pool, Rank
from thinwire.collectives.wire import sent_bytes

MISSING = [name for name in ("accelerate", "lightning", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.long,  # to load the frameworks takes each rank some ten seconds
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed"),
    pytest.mark.filterwarnings("ignore"),
]

INT4: dict[str, Any] = {"compress": {"kind": "int4", "exclude": "*wte*"}}
DILOCO = {"sync": "diloco", "every": 4, "compress": "int4"}
DOORS = ("transformers", "lightning", "accelerate")
PREFIX = {"lightning": "net."}


def steps_sent(context: Rank, name: str, folder: Path, steps: int) -> tuple[int, int]:
    """Bytes that the ledger has for `steps` steps beyond those of one, and those predicted."""
    sent = []
    for number in (1, 1 + steps):
        before = context.ledger.snapshot()
        _, door = LOOPS[name](context, settings_of(name, INT4), folder, steps=number)
        assert door.ledger is context.ledger
        sent.append(
            sum(
                total.wire_bytes - (before[call].wire_bytes if call in before else 0)
                for call, total in context.ledger.snapshot().items()
                if call.axis == "data" and call.label.startswith("bucket")
            )
        )
        door.work.detach()
    return sent[1] - sent[0], steps


@pytest.mark.door("codes in every step", *DOORS)
@pytest.mark.door("bytes as predicted", *DOORS)
@pytest.mark.parametrize("name", DOORS)
def test_the_ledger_shows_what_was_predicted(ranks2: Pool, name: str, tmp_path: Path) -> None:
    """Also on CPUs, where Lightning would drop a hook."""
    transfers = predicted(model(), 2, PREFIX.get(name, ""), INT4["compress"], tracks_use=name == "transformers")
    expected = sum(one.calls * sent_bytes(one.op, one.message_bytes, 2, 0) for one in transfers)
    plain = 2 * 4 * sum(one.numel() for one in model().parameters()) // 2
    for sent, steps in ranks2.run(steps_sent, name, tmp_path, 3, timeout_s=200):
        assert sent == steps * expected < steps * plain / 2


def trained(context: Rank, name: str, settings: dict[str, Any] | None, folder: Path, options: dict[str, Any]) -> Any:
    net, door = LOOPS[name](context, settings and settings_of(name, settings), folder, **options)
    if door is not None and hasattr(door.work, "detach"):
        door.work.detach()
    return loss_of(net), [one.detach().clone() for one in net.parameters()]


SAVES = {"transformers": {"save_steps": 6}, "lightning": {"save_every": 6}, "accelerate": {"save_at": 6}}
PLACES = {"transformers": "checkpoint-6", "lightning": "step=6.ckpt", "accelerate": ""}


@pytest.mark.door("resumed to the bit", *DOORS)
@pytest.mark.parametrize(("pool", "settings"), [("ranks2", INT4), ("ranks4", DILOCO)], ids=["int4", "diloco"])
@pytest.mark.parametrize("name", DOORS)
def test_a_resumed_run_is_the_uninterrupted_one(
    request: pytest.FixtureRequest, pool: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """At a step between two exchanges; to the bit."""
    ranks: Pool = request.getfixturevalue(pool)
    whole = ranks.run(trained, name, settings, tmp_path, {"steps": 10, **SAVES[name]}, timeout_s=200)
    checkpoint = str(tmp_path / PLACES[name])
    again = ranks.run(
        trained, name, settings, tmp_path / "again", {"steps": 10, "resume": checkpoint, **SAVES[name]}, timeout_s=200
    )
    for one, other in zip(whole, again, strict=True):
        assert all(map(torch.equal, one[1], other[1]))
    assert all(map(torch.equal, whole[0][1], whole[1][1]))  # all ranks hold one model


def loss_in_shards(context: Rank, name: str, settings: dict[str, Any], folder: Path, options: dict[str, Any]) -> float:
    net, _ = LOOPS[name](context, settings_of(name, settings), folder, shard=True, **options)
    return loss_of(net)


@pytest.mark.door("FSDP2", *DOORS)
@pytest.mark.parametrize("name", DOORS)
def test_a_model_in_shards_trains_as_a_whole_one(ranks2: Pool, name: str, tmp_path: Path) -> None:
    options = {"steps": 6, "save_strategy": "no"} if name == "transformers" else {"steps": 6}
    whole = ranks2.run(trained, name, None, tmp_path, options, timeout_s=200)[0][0]
    plain = {"compress": "none", "weights": "float32"}
    for loss in ranks2.run(loss_in_shards, name, plain, tmp_path, options, timeout_s=200):
        assert loss == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["transformers", "accelerate"])
def test_a_checkpoint_in_shards_is_refused_in_one_line(ranks2: Pool, name: str, tmp_path: Path) -> None:
    options = {"steps": 3, "save_at": 2} if name == "accelerate" else {"steps": 3}
    with pytest.raises(Exception, match="fully_shard"):
        ranks2.run(loss_in_shards, name, {"compress": "none", "weights": "float32"}, tmp_path, options, timeout_s=200)


@pytest.mark.door("plain averaging", *DOORS)
@pytest.mark.door("DiLoCo and its kin", *DOORS)
@pytest.mark.parametrize("name", DOORS)
def test_the_loss_is_that_of_plain_averaging(ranks2: Pool, name: str, tmp_path: Path) -> None:
    """Of its own DDP: without codes to some digits, with int8 to 1 %. Coarser codes, and to exchange rarely, cost such
    a small model more."""

    def loss(settings: dict[str, Any] | None) -> float:
        return ranks2.run(trained, name, settings, tmp_path, {"steps": 60}, timeout_s=200)[0][0]

    stock = loss(None)
    assert stock < loss_of(model()) - 1
    assert loss({"compress": "none"}) == pytest.approx(stock, rel=1e-3)
    assert loss({"compress": {"kind": "int8", "exclude": "*wte*"}}) == pytest.approx(stock, rel=0.01)
    assert loss(DILOCO) == pytest.approx(stock, rel=0.15)
