"""Tasks whose ranks share the states of one model train as one rank does, send what was predicted, and go on where they were."""

from pathlib import Path

import pytest
from equality import judged, losses, run_config, run_training, two_ranks_are_one
from test_image_classification import make_images
from test_texts import write
from test_translation import make_pairs

from pool import Pool
from thinwire.train.trained import open_trained

pytestmark = pytest.mark.heavy

KINDS = ["lm_lstm", "sentiment", "recommendation", "translation", "image_classification"]
"""No units at all; layers as units; embeddings alone; passes as many as texts want; batch norm, and units without a root."""


def own(folder: Path, kind: str) -> dict[str, object]:
    if kind == "image_classification":
        return {"kind": kind, "source": str(make_images(folder / "images")), "width": 4}
    source = make_pairs(folder / "own.csv") if kind == "translation" else write(folder / "own.jsonl", kind)
    return {"kind": kind, "source": str(source), "width": 8, "layers": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_two_shards_are_one_rank_and_the_model_is_of_use(ranks1: Pool, ranks2: Pool, tmp_path: Path, kind: str) -> None:
    folder = two_ranks_are_one(ranks1, ranks2, tmp_path, own(tmp_path, kind), layout={"shard": 2})
    trained = open_trained(folder, tmp_path)
    assert trained.task.score_of(trained.task.score(trained.model, 0)) == pytest.approx(judged(folder)[6], abs=1e-9)


@pytest.mark.long
def test_weights_that_stay_are_the_same_training(ranks1: Pool, ranks2: Pool, tmp_path: Path) -> None:
    shared = {"layout": {"shard": 2}, "sharded": {"reshard": "never"}}
    two_ranks_are_one(ranks1, ranks2, tmp_path, own(tmp_path, "sentiment"), **shared)


@pytest.mark.long
def test_a_run_goes_on_bit_for_bit_and_in_another_layout(ranks2: Pool, tmp_path: Path) -> None:
    task, shard = own(tmp_path, "image_classification"), {"layout": {"shard": 2}}
    whole = ranks2.run(run_training, run_config(tmp_path / "whole", task, **shard))[0].folder
    config = run_config(tmp_path / "cut", task, **shard)
    cut = ranks2.run(run_training, config, None, 2)[0].folder
    assert ranks2.run(run_training, config, cut, 4)[0].reason == "interrupted"
    assert losses(cut) == {step: loss for step, loss in losses(whole).items() if step <= 4}
    assert ranks2.run(run_training, run_config(tmp_path / "cut", task), cut)[0].reason == "done"
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-9) and judged(cut) == pytest.approx(judged(whole), abs=1e-9)
