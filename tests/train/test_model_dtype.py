"""Runs of models in every dtype: they learn, send what was predicted, and are resumed bit for bit."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import make_config
from test_training import losses, run_training, scores

from pool import Pool, Rank
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer
from thinwire.record import RunFolder
from thinwire.tomlfile import validate
from thinwire.train.optimizers import make_optimizer
from thinwire.train.trained import open_trained
from thinwire.workload import Workload

pytestmark = pytest.mark.heavy

SYNCS: dict[str, dict[str, Any]] = {
    "every_step": {"kind": "every_step", "accumulate": 2, "bucket_bytes": 4096},
    "local_sgd": {"kind": "local_sgd", "every": 2},
    "diloco": {"kind": "diloco", "every": 2},
    "streaming": {"kind": "streaming", "every": 3, "layers_per_fragment": 1, "overlap": 1},
    "sparseloco": {"kind": "sparseloco", "every": 2},
    "muloco": {"kind": "muloco", "every": 2},
    "noloco": {"kind": "noloco", "every": 2},
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
ADAMW = {"kind": "adamw", "epsilon": 1e-3}
"""float16 asks for it."""


def long(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


def config_of(folder: Path, dtype: str, sync: str = "every_step", kind: str = "none", **train: Any) -> RunConfig:
    content = make_config(folder, dtype="auto", optimizer=ADAMW, **train).model_dump()
    content["model"] |= {"dtype": dtype}
    return validate(RunConfig, content | {"sync": SYNCS[sync], "compress": {"kind": kind}}, "the test")


def run_and_sent(context: Rank, config: RunConfig) -> tuple[Path, dict[tuple[str, str, str], float]]:
    """The run folder, and what this rank has sent."""
    folder, sent = run_training(context, config).folder, Counter[tuple[str, str, str]]()
    for call, total in context.recorded().items():
        sent[call.label, call.axis, call.op] += total.wire_bytes if total.last_step >= 0 else 0
    return folder, dict(sent)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sync", "dtype", "kind"),
    [
        *[("every_step", "bfloat16", "none"), ("every_step", "float64", "int4"), ("diloco", "bfloat16", "int4")],
        *[("streaming", "float64", "none"), ("noloco", "float16", "none")],
        *(long(sync, dtype, kind) for sync in SYNCS for dtype in DTYPES for kind in ("none", "bf16", "int4")),
    ],
)
def test_it_sends_what_was_predicted_and_resumes_bit_for_bit(
    ranks2: Pool, tmp_path: Path, sync: str, dtype: str, kind: str
) -> None:
    if sync == "noloco" and kind == "int4":
        pytest.skip("noloco sends weights")
    (tmp_path / "whole").mkdir()
    whole, sent = ranks2.run(run_and_sent, config_of(tmp_path / "whole", dtype, sync, kind))[0]
    rows = RunFolder.open(whole).predicted().transfers
    predicted = {(row.label, row.axis, row.op): pytest.approx(12 * row.wire_bytes_per_step, abs=0.5) for row in rows}
    assert len(rows) >= 3 and predicted == {key: sent.get(key) for key in predicted}
    config = config_of(tmp_path, dtype, sync, kind)
    cut = ranks2.run(run_training, config, None, 5)[0]
    assert cut.reason == "interrupted"
    resumed = ranks2.run(run_training, config, cut.folder)[0].folder
    assert losses(resumed) == losses(whole) and scores(resumed) == scores(whole)
    assert scores(whole)[12] < 0.99 * losses(whole)[1]
    assert RunFolder.open(whole).record().dtype in (dtype, "bfloat16" if dtype == "float32" else dtype)
    trained = open_trained(whole, tmp_path)
    assert next(trained.model.parameters()).dtype == getattr(torch, dtype)
    assert trained.held_out_loss() == pytest.approx(trained.recorded, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "signsgd", "muon"])
def test_every_optimizer_steps_in_every_dtype(tmp_path: Path, optimizer: str, dtype: str) -> None:
    """And its state has the bytes that are said of it."""
    chosen = {"kind": optimizer} | ({"epsilon": 1e-3} if optimizer in ("adamw", "muon") else {})
    content = config_of(tmp_path, dtype).model_dump()
    content["train"] |= {"optimizer": chosen, "learning_rate": 0.05 if optimizer == "sgd" else 1e-3}  # less is rounded off
    config = validate(RunConfig, content, "the test")
    torch.manual_seed(0)
    model = Transformer(config.model.shape()).to(getattr(torch, dtype))
    made = make_optimizer(model, config.train)
    tokens = torch.randint(0, 256, (2, 17))
    before = [one.detach().clone() for one in model.parameters()]
    found = []
    for _ in range(20):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        loss.backward()
        made.step()
        made.zero_grad()
        found.append(float(loss.detach()))
    assert found[-1] < found[0] and all(bool(one.isfinite().all()) for one in model.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    state = [value for one in made.state.values() for value in one.values() if torch.is_tensor(value) and value.dim()]
    workload = Workload.of_transformer(config.model.shape(), 2, 16)
    assert workload.stored_bytes == sum(one.nbytes for one in model.parameters())
    if optimizer in ("adamw", "sgd"):
        assert sum(value.nbytes for value in state) == workload.optimizer_bytes(optimizer)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "bfloat16"}, "train.dtype = 'bfloat16' is for a model in float32, and model.dtype = 'float16'"),
        ({"optimizer": {"kind": "adamw"}}, "train.optimizer.epsilon = 1e-08 with model.dtype = 'float16'"),
        ({"optimizer": {"kind": "muon"}}, "train.optimizer.epsilon = 1e-08 with model.dtype = 'float16'"),
    ],
)
def test_what_float16_cannot_do_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    content = config_of(tmp_path, "float16").model_dump()
    with pytest.raises(UserError) as caught:
        validate(RunConfig, content | {"train": content["train"] | change}, "run.toml")
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "sync"),
    [("bfloat16", {"kind": "diloco", "every": 2}), ("float64", {"kind": "local_sgd", "every": 4, "every_inside": 2})],
)
def test_replicas_of_several_ranks_send_what_was_predicted(
    ranks4: Pool, tmp_path: Path, dtype: str, sync: dict[str, Any]
) -> None:
    """Inside in 2 bytes a value of bfloat16, outside in 4."""
    content = config_of(tmp_path, dtype).model_dump() | {"sync": sync, "layout": {"data": 2, "outer": 2}}
    whole, sent = ranks4.run(run_and_sent, validate(RunConfig, content, "the test"))[0]
    rows = [row for row in RunFolder.open(whole).predicted().transfers if row.axis in ("data", "outer")]
    assert {row.axis for row in rows} == {"data", "outer"}
    for row in rows:
        assert sent[row.label, row.axis, row.op] == pytest.approx(12 * row.wire_bytes_per_step, abs=0.5)
