"""Every process group that a run makes has train.timeout_s as its time-out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import make_config

from pool import LOOPBACK
from thinwire.config.run import RunConfig, dump_run
from warm import SOCKET, Warm, server

TIMEOUT_S = 47

NOTES = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

made = []
new_group, gloo = dist.new_group, dist.ProcessGroupGloo


class Noted(gloo):
    def __init__(self, store, rank, size, timeout):
        made.append(getattr(timeout, "_timeout", timeout).total_seconds())
        super().__init__(store, rank, size, timeout)


dist.ProcessGroupGloo = Noted

from thinwire.config.run import load_run
from thinwire.environment import read_environment
from thinwire.train.worker import work

work(load_run(Path(sys.argv[1])), read_environment(), None)
print(json.dumps(made), flush=True)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"sync": {"kind": "diloco", "every": 4}, "compress": {"kind": "int4"}, "collectives": {"kind": "priced"}},
        pytest.param({"compress": {"kind": "int4"}, "collectives": {"kind": "priced"}}, marks=pytest.mark.long),
        pytest.param({"sync": {"kind": "noloco", "every": 4}}, marks=pytest.mark.long),
    ],
)
@pytest.mark.long
def test_every_group_of_a_run_has_its_time_out(tmp_path: Path, settings: dict) -> None:
    config = make_config(tmp_path, timeout_s=TIMEOUT_S, steps=4)
    content = config.model_dump(mode="json", exclude_none=True)
    sync = {"accumulate": 1} if "sync" in settings else {}
    changed = RunConfig.model_validate(content | settings | ({"sync": settings["sync"] | sync} if sync else {}))
    dump_run(changed, tmp_path / "run.toml")
    (tmp_path / "notes.py").write_text(NOTES)
    environment = os.environ | {SOCKET: server(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "notes.py")]
    process = Warm(
        [sys.executable, *arguments, str(tmp_path / "run.toml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    ranks = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    assert len(ranks) == 2 and all(len(made) >= 5 for made in ranks)
    assert {seconds for made in ranks for seconds in made} == {TIMEOUT_S}
