"""Less memory for training: moments in 8 bits, updates within the backward pass, states and activations on the host."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config_of, losses, run_training, scores
from torch import nn

from pool import Pool
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig, load_run
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer
from thinwire.plan.memory import need
from thinwire.sync.host_memory import HostMemory
from thinwire.sync.single_rank import SingleRank
from thinwire.train.eight_bit import AdamW8bit, decode, encode
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import Stepper
from thinwire.train.updates import activations_on_host, check_on_host, keep_on_host
from thinwire.workload import Workload

EIGHT_BIT = {"optimizer": {"kind": "adamw", "states": "8bit"}}
WIDE = {"model": {"layers": 2, "width": 64, "heads": 2, "vocabulary": 257}}
"""Matrices of which a half has moments in 8 bits, but for the outer ones of attention."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_coding_again_gives_the_same_codes_and_small_values_keep_their_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = (torch.randn(1000) * 10.0 ** torch.randint(-3, 1, (1000,))).to(dtype)
    for moment, signed in ((values, True), (values.square(), False), (torch.zeros(300, dtype=dtype), True)):
        codes, scales = encode(moment, signed=signed)
        assert codes.element_size() == 1 and len(codes) == len(moment) and len(scales) == -(-len(moment) // 256)
        found = decode(codes, scales, signed=signed)
        again = encode(found, signed=signed)
        assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
        largest = scales.repeat_interleave(256)[: len(moment)].float()
        share = (moment.float().abs() / largest).nan_to_num()
        error = (found.float() - moment.float()).abs() / largest.clamp_min(1e-30)
        rounding = torch.finfo(dtype).eps * share if dtype == torch.bfloat16 else 0.0
        step = share.sqrt() / 127 + 1 / 254**2 if signed else 2 * share**0.75 / 255 + 1e-4 * share + 1e-9
        assert bool((error <= step + rounding + 1e-6).all())


def test_moments_in_8_bits_move_nearly_as_adamw_and_take_what_is_predicted() -> None:
    shape = ModelConfig(layers=1, width=64, heads=2, vocabulary=256, context=16)
    config = load_run(None, ["train.optimizer.states=8bit", "train.clip=0"])
    models = []
    for states in ("full", "8bit"):
        torch.manual_seed(0)
        model = Transformer(shape)
        train = config.train.model_copy(update={"optimizer": config.train.optimizer.model_copy(update={"states": states})})
        optimizer = make_optimizer(model, train)
        for step in range(4):
            tokens = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(step))
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    moved = [torch.cat([one.detach().flatten() for one in model.parameters()]) for model in models]
    assert 0 < float((moved[0] - moved[1]).abs().mean()) < 0.1 * 4 * config.train.learning_rate
    held = sum(one.nbytes for state in optimizer.state.values() for one in state.values() if one.dim())
    assert held == Workload.of_transformer(shape, 1, 16).optimizer_bytes("adamw 8bit") < 0.3 * 8 * len(moved[0])


def test_an_update_in_the_backward_pass_is_the_same_and_one_gradient_is_there_at_a_time() -> None:
    """Bit for bit, with a tied embedding; passes before training move nothing and leave nothing."""
    shape = ModelConfig(layers=2, width=16, heads=2, vocabulary=64, context=16)
    config = load_run(None, ["train.clip=0"])
    found = []
    for updates in ("together", "early"):
        torch.manual_seed(0)
        model = Transformer(shape)
        train = config.train.model_copy(update={"updates": updates})
        optimizer, most = make_optimizer(model, train), [0]
        stepper = Stepper(
            model=model,
            optimizer=optimizer,
            sync=SingleRank(),
            loss=lambda model, batch: model(*batch),
            precision=nullcontext,
            train=train,
        )
        tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        stepper.rehearse((tokens, tokens))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, model=model, most=most: most.append(sum(one.grad is not None for one in model.parameters()))
            )
        for step in range(3):
            stepper.run(step, [(tokens, tokens)], 1)
        found.append(model)
        assert max(most) == (1 if updates == "early" else len(list(model.parameters())))
    for one, other in zip(*(model.parameters() for model in found), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("piece_bytes", [1, 2**20])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW8bit], ids=lambda kind: kind.__name__)
def test_state_on_the_host_changes_nothing(kind: Any, piece_bytes: int) -> None:
    """Copies are made on a CPU too; so is a state that was loaded."""
    models = []
    for moved in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64))
        optimizer = kind(model.parameters(), lr=1e-2, fused=True)
        if moved:
            keep_on_host(optimizer, piece_bytes)
        for step in range(4):
            torch.manual_seed(step)
            model(torch.randn(8, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        models.append((model, optimizer.state_dict()["state"]))
    for one, other in zip(*(model.parameters() for model, _ in models), strict=True):
        assert torch.equal(one, other)
    for key, state in models[0][1].items():
        assert all(torch.equal(value, models[1][1][key][name]) for name, value in state.items())


def test_activations_on_the_host_give_the_same_gradients_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, copied = [], []

    def taken(self: HostMemory, values: torch.Tensor) -> torch.Tensor:
        copied.append(tuple(values.shape))
        return values.clone()

    monkeypatch.setattr(HostMemory, "taken", taken)
    for moved in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 256))
        x = torch.randn(256, 128)
        with activations_on_host(torch.device("cpu")) if moved else nullcontext():
            output = model(x)
        output.square().sum().backward()
        gradients.append([one.grad for one in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert copied == [(256, 128), (256, 256), (256, 256)], "what enters the matrices and the GELU"


def test_what_cannot_be_is_refused() -> None:
    for change, said in (
        ("train.clip=1", r"with train.clip = 1: no gradient is whole before"),
        ("sync.accumulate=2", r"with sync.accumulate = 2.*set it to 1"),
        ("layout.shard=2", r"with layout.shard = 2"),
    ):
        with pytest.raises(UserError, match=said):
            load_run(None, ["train.updates=early", "train.clip=0", change])
    config = load_run(None, ["train.updates=early", "train.clip=0"])
    with pytest.raises(UserError, match=r"with layout.data = 2: a gradient is averaged before it is used"):
        config.laid_out(2)
    assert config.laid_out(1).world_size == 1
    with pytest.raises(UserError, match=r"train.on_host = \['optimizer'\]: this rank's device is a CPU"):
        check_on_host(("optimizer",), torch.device("cpu"))


def test_what_a_rank_needs_follows_the_settings() -> None:
    def needed(*changes: str, on_device: bool = False) -> Any:
        config = load_run(None, ["train.clip=0", "model.preset=124m", *changes])
        return need(config, config.model.shape(), config.laid_out(1), casts=False, on_device=on_device)

    plain = needed()
    assert 0 < needed("train.updates=early").gradients_bytes < plain.gradients_bytes / 3
    assert needed("train.optimizer.states=8bit").optimizer_bytes < 0.26 * plain.optimizer_bytes
    assert needed('train.on_host=["optimizer"]', on_device=True).optimizer_bytes == 4 * 64 * 2**20 < plain.optimizer_bytes
    on_host = needed('train.on_host=["activations"]', on_device=True).activations_bytes
    assert on_host < plain.activations_bytes == needed('train.on_host=["activations"]').activations_bytes


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"outer": 2}, {"tensor": 2}], ids=str)
def test_runs_with_early_updates_learn_the_same(ranks2: Pool, tmp_path: Path, layout: dict[str, int]) -> None:
    """Replicas that exchange rarely, and ranks that share matrices: to the bit."""
    sync = {"kind": "diloco", "every": 3} if "outer" in layout else {}
    found = []
    for updates in ("together", "early"):
        train = {"clip": 0, "updates": updates}
        config = config_of(tmp_path / updates, layout, 1, train=train, sync=sync)
        folder = ranks2.run(run_training, config)[0].folder
        found.append((losses(folder), scores(folder)))
    assert found[0] == found[1] and len(found[0][0]) == 12


@pytest.mark.long
def test_moments_in_8_bits_resume_bit_for_bit_and_move_between_layouts(ranks4: Pool, tmp_path: Path) -> None:
    """Into moments kept in full too; losses go on nearly as without a break."""

    def config(layout: dict[str, int], run: str, train: dict[str, Any] = EIGHT_BIT) -> RunConfig:
        count = 2 if "shard" in layout else 8
        return config_of(tmp_path, layout, count, train={**train, "run": str(tmp_path / run)}, **WIDE)

    shards = {"shard": 2, "data": 2}
    whole = losses(ranks4.run(run_training, config(shards, "whole"))[0].folder)
    for resumed in (None, tmp_path / "cut"):
        ranks4.run(run_training, config(shards, "cut"), resumed, 6 if resumed is None else 99)
    assert losses(tmp_path / "cut") == whole
    turns: list[tuple[dict[str, int], dict[str, Any]]] = [
        (shards, EIGHT_BIT),
        ({"tensor": 2, "pipe": 2}, EIGHT_BIT),
        ({"shard": 4}, {}),
        (shards, EIGHT_BIT),
    ]
    for number, (layout, train) in enumerate(turns):
        resumed = tmp_path / "moved" if number else None
        ranks4.run(run_training, config(layout, "moved", train), resumed, 3 * (number + 1) if number < 3 else 99)
    assert losses(tmp_path / "moved") == pytest.approx(whole, rel=2e-3)
