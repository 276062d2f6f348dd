"""No option of a public function is ignored: each is used, which shows in what it makes, or refused in one line.

The tests walk the signatures, and the schemas behind their **options: an option that is new is missing in the tables here.
"""

import inspect
from dataclasses import is_dataclass
from fractions import Fraction
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import thinwire
from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.compress.coded import CodedExchange
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import BLOCKED, Coded, ShardedOptions
from thinwire.config.replicas import Code, Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import Mirror, PushCoder
from thinwire.sync.standalone import KINDS, OF_THE_LOOP
from thinwire.tomlfile import validate
from thinwire.workload import Parameter

PARAMETERS = [Parameter("embed.weight", (100, 64)), Parameter("0.weight", (64, 512)), Parameter("0.bias", (64,))]
CODING: dict[str, Any] = {
    "exclude": ("0.*",),
    "vectors": True,
    "after_steps": 3,
    "exchange": "gather",
    "feedback": False,
    "feedback_decay": 0.5,
    "feedback_average": 0.5,
    "feedback_reset": 7,
    "feedback_removal": 0.5,
    "feedback_storage": "int8",
    "precondition": False,
    "fused": True,
    "rounding": "stochastic",
    "hadamard": True,
    "k": 16,
    "values": "int8",
    "fraction": 0.5,
    "rank": 3,
    "tile": 32,
    "momentum": 0.5,
    "warmup_steps": 2,
}
"""A value for each option of [compress] that is no kind's default."""
UNBLOCKED = set(get_args(Coded.model_fields["kind"].annotation)) - BLOCKED
SAME = {(kind, option) for kind in ("bf16", "fp16") for option in ("vectors", "feedback")}
SAME |= {(kind, "precondition") for kind in UNBLOCKED}
"""Where that value is what the kind does anyway; the other one is below."""
OTHERWISE = {"vectors": False, "feedback": True, "precondition": True}


def described(thing: Any) -> Any:
    """What an object is made of, as far as options can change it."""
    if isinstance(thing, dict):
        return {key: described(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [described(value) for value in thing]
    if thing is None or isinstance(thing, int | float | str | torch.dtype | Fraction):
        return thing
    if isinstance(thing, CodedExchange):
        coded = [thing.is_coded(one.name, one.shape) for one in PARAMETERS]
        made = [described(vars(averager)) for averager in thing._averagers]
        held = [thing.memory_bytes(PARAMETERS, p) for p in (2, 3)]
        return [thing.settled_after, coded, made, described(vars(thing._memory)), held]
    if is_dataclass(thing) or type(thing).__module__.startswith("thinwire."):
        return [type(thing).__name__, described({key: value for key, value in vars(thing).items() if "ledger" not in key})]
    return type(thing).__name__


def used_or_refused(make: Any, plain: dict[str, Any], option: str, value: Any) -> str:
    """ "used", "refused", or "ignored"."""
    try:
        made = make(**plain, **{option: value})
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    return "used" if described(made) != described(make(**plain)) else "ignored"


def exchange(**options: Any) -> CodedExchange:
    made = make_exchange(Coded(**options), Ledger(), moments=True)
    assert isinstance(made, CodedExchange)
    return made


@pytest.mark.parametrize("option", [option for option in Coded.model_fields if option != "kind"])
def test_each_option_of_compress_is_used_or_refused(option: str) -> None:
    found = {}
    for kind in get_args(Coded.model_fields["kind"].annotation):
        value = OTHERWISE[option] if (kind, option) in SAME else CODING[option]
        found[kind] = used_or_refused(exchange, {"kind": kind}, option, value)
    assert "ignored" not in found.values(), found
    assert "used" in found.values(), f"no kind uses {option}"


def test_a_single_pattern_may_be_a_string() -> None:
    assert exchange(kind="int4", exclude="*0*").is_coded("0.weight", (64, 512)) is False
    assert exchange(kind="int4", exclude="*0*").is_coded("1.weight", (64, 512)) is True


ROUNDS: dict[str, Any] = {
    "every": 4,
    "first": [[4, 2]],
    "every_inside": 2,
    "accumulate": 2,
    "bucket_bytes": 4096,
    "outer_learning_rate": 0.123,
    "outer_momentum": 0.234,
    "layers_per_fragment": 2,
    "overlap": 2,
    "mixing": 0.25,
    "arrival": "add",
    "outer_device": "host",
    "compress": "fp16",
}
"""A value for each option of the kinds of local steps that is no kind's default."""


def rounds(context: Rank) -> dict[tuple[str, str], str]:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def make(kind: str, **options: Any) -> Any:
        return thinwire.DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.1), kind=kind, **options)._sync

    return {
        (kind, option): used_or_refused(make, {"kind": kind}, option, value) for kind in KINDS for option, value in ROUNDS.items()
    }


def test_each_option_of_diloco_is_used_or_refused(ranks1: Pool) -> None:
    (found,) = ranks1.run(rounds)
    assert "ignored" not in found.values(), found
    named = {option for schema in KINDS.values() for option in schema.model_fields if option != "kind"}
    assert named | {"compress"} == ROUNDS.keys(), "an option that this table does not have, or has too much"
    for (kind, option), how in found.items():
        exists = option == "compress" or (option in KINDS[kind].model_fields and option not in OF_THE_LOOP)
        assert how == ("used" if exists else "refused"), (kind, option, how)
    assert inspect.signature(thinwire.DiLoCo).parameters.keys() == {
        *("model", "optimizer", "every", "kind", "compress", "group", "options")
    }


def shards(context: Rank) -> dict[str, str]:
    ledger = Ledger()

    def make(gradients: Any = "int4", weights: Any = "int8", **options: Any) -> Any:
        model = fully_shard(nn.Sequential(*(fully_shard(nn.Linear(64, 64)) for _ in range(4))))
        made = thinwire.compress_sharded(model, gradients, weights, **options)
        model(torch.ones(1, 64)).sum().backward()
        ahead = [len(unit.module._get_fsdp_state()._states_to_forward_prefetch) for unit in made._units]
        seen = [[(t.label, t.message_bytes) for t in made.transfers()], made.memory_bytes, ahead, made._ledger is ledger]
        made.detach()
        return seen

    dense = {"gradients": "float32", "weights": "float32"}
    stock = {"gradients": "int4", "weights": None}
    values = {"exclude": "1.*", "feedback": "float32", "prefetch_units": 1, "ledger": ledger}
    found = {option: used_or_refused(make, {}, option, value) for option, value in values.items()}
    found["gradients"] = used_or_refused(make, {}, "gradients", "int8")
    found["weights"] = used_or_refused(make, {}, "weights", "int4")
    found["replicas, on a mesh of one axis"] = used_or_refused(make, {}, "replicas", "int4")
    found["exclude, nothing coded"] = used_or_refused(make, dense, "exclude", "1.*")
    found["feedback, nothing coded"] = used_or_refused(make, dense, "feedback", "int8")
    found["prefetch_units, stock weights"] = used_or_refused(make, stock, "prefetch_units", 1)
    return found


@pytest.mark.long
def test_each_option_of_compress_sharded_is_used_or_refused(ranks2: Pool) -> None:
    found = ranks2.run(shards)[0]
    options = ShardedOptions.model_fields.keys() - {"nonfinite"}  # that one is for what is not finite
    named = inspect.signature(thinwire.compress_sharded).parameters.keys() - {"model", "options", "replicas"}
    assert {option: how for option, how in found.items() if "," not in option} == dict.fromkeys(named | options, "used")
    assert {how for option, how in found.items() if "," in option} == {"refused"}


@pytest.mark.parametrize("option", ["cluster", "cache"])
def test_init_refuses_what_native_collectives_would_not_use(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} = 'four-hosts-100mbit' has no effect with collectives = 'native'"):
        thinwire.init(collectives="native", **{option: "four-hosts-100mbit"})
    assert inspect.signature(thinwire.init).parameters.keys() == {"cluster", "collectives", "cache", "inner", "bind", "options"}
    assert not dist.is_initialized()


PUSHED: dict[str, Any] = {
    "feedback": False,
    "feedback_decay": 0.5,
    "rounding": "stochastic",
    "hadamard": True,
    "k": 16,
    "values": "int8",
}


@pytest.mark.parametrize("way", ["push", "pull"])
def test_each_option_of_pushes_and_pulls_is_used_or_refused(way: str) -> None:
    def make(kind: str, **options: Any) -> Any:
        code = getattr(validate(Service, {way: {"kind": kind, **options}}, "--service"), way)
        return PushCoder(code) if way == "push" else Mirror(code)

    kinds = get_args(Code.model_fields["kind"].annotation)
    found = {
        (kind, option): used_or_refused(make, {"kind": kind}, option, value) for kind in kinds for option, value in PUSHED.items()
    }
    assert "ignored" not in found.values(), found
    assert PUSHED.keys() | {"kind"} == Code.model_fields.keys()
    for option in PUSHED:
        uses = [kind for kind in kinds if found[kind, option] == "used"]
        assert bool(uses) == (way == "push" or "feedback" not in option), (option, uses)
        assert found["none", option] == "refused"


def test_the_tables_have_every_argument_of_workers() -> None:
    """Each is used: by tests/sync/test_server_*.py."""
    assert inspect.signature(thinwire.AsyncDiLoCo).parameters.keys() == {
        *("model", "optimizer", "store", "name", "every", "tokens_per_step", "secret_file")
    }
    assert inspect.signature(thinwire.ParameterServerWorker).parameters.keys() == {
        "model",
        "store",
        "name",
        "ledger",
        "secret_file",
    }
    assert inspect.signature(thinwire.ParameterServerWorker.step).parameters.keys() == {"self", "samples", "learning_rate"}
    assert inspect.signature(thinwire.compress_gradients).parameters.keys() == {
        "replica",
        "kind",
        "optimizer",
        "nonfinite",
        "options",
    }
