"""What real runs teach `thinwire plan` of the machine that they ran on."""

from pathlib import Path

import numpy as np
import pytest
from small_run import make_config, run_training

from pool import Pool
from thinwire.errors import UserError
from thinwire.plan.calibration import NOTHING, Calibration, Factors
from thinwire.train.learn import Ran, learn, read_run


def missed(logarithms: Factors, runs: list[Ran]) -> float:
    """Median error of a step."""
    return float(np.median([abs(run.terms(np.array(logarithms)).sum() / run.measured.step_s - 1) for run in runs]))


@pytest.mark.long
def test_real_runs_teach_what_others_will_take(ranks2: Pool, tmp_path: Path) -> None:
    """On this machine, whose rates a file has wrong."""
    config = make_config(tmp_path, steps=30, log_every=5, eval_every=0)
    folders = []
    for number, (micro, accumulate) in enumerate([(2, 2), (8, 1), (4, 2), (2, 4), (8, 2), (4, 4)]):
        train = config.train.model_copy(update={"run": str(tmp_path / f"run{number}"), "micro_batch": micro})
        sync = config.sync.model_copy(update={"accumulate": accumulate})
        cluster = config.cluster.model_copy(update={"file": "2x1xcpu:10Gflop/s@1Gbit/s"})
        done = ranks2.run(run_training, config.model_copy(update={"train": train, "sync": sync, "cluster": cluster}))
        folders.append(Path(done[0].folder))
    found = [read_run(folder) for folder in folders]
    after = learn(Calibration(), found[:4]).machines[0]
    assert missed(after.mean, found[4:]) < missed(NOTHING, found[4:])
    assert "4 runs" in after.about()
    with pytest.raises(UserError, match="teaches nothing"):
        (folders[0] / "measured.json").unlink()
        read_run(folders[0])
