"""Who else is told of a run: Prometheus, Perfetto, MLflow, Weights & Biases."""

import importlib.util
import json
import urllib.request
from functools import partial
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from command import TINY_RUN, one_line, thinwire
from pool import Pool, Rank
from thinwire.errors import UserError
from thinwire.train.metrics import exposition, metrics_served

RUN = f'{TINY_RUN}steps = 3\nlearning_rate = 1e-3\nrun = "out"\n[watch]\n'


def scraped(context: Rank) -> tuple[str, int, int]:
    torch.distributed.all_reduce(torch.ones(10))
    with metrics_served(partial(exposition, context.ledger, context.rank), 0, "") as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        with pytest.raises(HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/else", timeout=5)
        with (
            pytest.raises(UserError, match=f"rank {context.rank} cannot listen on 127.0.0.1:{port}"),
            metrics_served(str, port, f"rank {context.rank}"),
        ):
            pass
    return text, context.ledger.sent_bytes, context.ledger.step


def test_a_rank_answers_prometheus_with_its_ledger(ranks2: Pool) -> None:
    for rank, (text, sent_bytes, step) in enumerate(ranks2.run(scraped)):
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values[f'thinwire_step{{rank="{rank}"}}']) == step
        assert sent_bytes == 40 == float(values[f'thinwire_sent_bytes_total{{rank="{rank}",axis="world",op="all_reduce"}}'])
        if importlib.util.find_spec("prometheus_client"):
            from prometheus_client.parser import text_string_to_metric_families

            assert {family.name for family in text_string_to_metric_families(text)} >= {"thinwire_step", "thinwire_calls"}


@pytest.mark.long
def test_a_timeline_has_the_steps_and_collectives_of_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 4000)
    (tmp_path / "run.toml").write_text(RUN + "timeline_steps = 2\n")
    done = thinwire("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "out" / "timeline.json").read_text())
    for rank in (0, 1):
        rows = {
            event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name" and event["pid"] == rank
        }
        spans = [event for event in events if event["ph"] == "X" and event["pid"] == rank]
        passes = [span for span in spans if span["name"] == "forward and backward"]
        assert rows[passes[0]["tid"]] == "steps" and [span["args"]["step"] for span in passes] == [0, 1]
        sent = [span for span in spans if span["name"] == "all_reduce bucket 0"]
        assert [span["args"]["step"] for span in sent] == [0, 1] and rows[sent[0]["tid"]] == "axis data"
        assert all(span["dur"] > 0 for span in spans)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed (the extra `mlflow`)")
def test_mlflow_has_the_curves_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "text.txt").write_text("abcdefgh" * 4000)
    (tmp_path / "run.toml").write_text(RUN + 'loggers = ["mlflow"]\n')
    done = thinwire("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "out" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("thinwire").experiment_id])
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    curve = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(one.step, one.value) for one in curve] == [(event["step"], event["loss"]) for event in steps] and len(curve) == 3
    assert run.info.status == "FINISHED" and run.data.params["sync"] == "every_step"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (the extra `wandb`)")
def test_weights_and_biases_writes_a_run_offline(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 4000)
    (tmp_path / "run.toml").write_text(RUN + 'loggers = ["wandb"]\n')
    done = thinwire("train", "run.toml", cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.long
def test_an_unknown_logger_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN + 'loggers = ["visdom"]\n')
    done = thinwire("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 2 and "watch.loggers" in one_line(done.stderr)
