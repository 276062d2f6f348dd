"""The run folder: what is written is read back, a crash costs at most one line, mistakes are one line."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import make_run

from thinwire.cluster import load_cluster
from thinwire.errors import UserError
from thinwire.record import Record, RunFolder

RECORD = {"thinwire": "0.1.0", "started": "2026-11-21T09:30:00+00:00", "world_size": 2, "hosts": ["a", "b"]}
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


def step_event(step: int, **values: Any) -> dict[str, Any]:
    return {"event": "step", "step": step, "time_s": 0.5 * step, "tokens": 64 * step, "loss": 2.0, "step_s": 0.5} | values


@settings(max_examples=40, deadline=None)
@given(losses=st.lists(ANY_FLOAT, max_size=8), tokens=st.integers(0, 2**60))
def test_events_come_back_as_written(tmp_path_factory: pytest.TempPathFactory, losses: list[float], tokens: int) -> None:
    folder = RunFolder.create(tmp_path_factory.mktemp("run"))
    for number, loss in enumerate(losses):
        folder.append(step_event(number, loss=loss, tokens=tokens))
    read = folder.steps()
    assert [event.tokens for event in read] == [tokens] * len(losses)
    for event, loss in zip(read, losses, strict=True):
        assert event.loss == loss if math.isfinite(loss) else math.isnan(event.loss)
    lines = (folder.read_text("events.jsonl") or "").splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail)["event"] == "step" for line in lines)


def test_files_come_back_as_written_and_nothing_is_left_aside(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("four-hosts-100mbit"), steps=3)
    for name in ("record.json", "predicted.json", "measured.json", "ledger.json", "cards.json"):
        before = json.loads(folder.read_text(name) or "")
        read = getattr(RunFolder.open(folder.path), name.removesuffix(".json"))()
        folder.write(name, read)
        after = json.loads(folder.read_text(name) or "")
        assert _has(after, before)
    assert not list(folder.path.glob(".*"))


def _has(after: Any, before: Any) -> bool:
    """What was written, and maybe keys that were left out because they have a default."""
    if isinstance(before, dict):
        return all(key in after and _has(after[key], value) for key, value in before.items())
    if isinstance(before, list):
        return len(after) == len(before) and all(map(_has, after, before))
    return bool(after == before)


def test_a_newer_key_survives(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write("record.json", {**RECORD, "colour": "blue"})
    record = folder.record()
    assert isinstance(record, Record) and record.model_extra == {"colour": "blue"}


def test_absent_files_are_none(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    assert [folder.predicted(), folder.measured(), folder.ledger(), folder.cards(), folder.end()] == [None] * 5
    assert folder.steps() == [] and folder.read_text("run.toml") is None


def test_a_truncated_last_line_costs_only_itself(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for number in range(5):
        folder.append(step_event(number))
    path = folder.path / "events.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for length in random.Random(1).sample(range(last, len(whole)), 10):
        path.write_bytes(whole[:length])
        assert [event.step for event in folder.steps()] == [0, 1, 2, 3]


def test_resume_drops_what_came_after_and_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("two-racks"), steps=50, end="interrupted")
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    before = folder.steps()
    note = RunFolder.create(folder.path, resume=True).resume_at(20)
    assert [event.step for event in folder.steps()] == list(range(1, 21))
    assert folder.steps() == before[:20]
    assert note.time_s == pytest.approx(before[19].time_s)
    assert folder.end() is None and folder.checkpoints() == []
    assert folder.resumes() == [note] and note.dropped == sum(event.step > 20 for event in before) + 4 + 2
    folder.append(step_event(21))
    assert folder.steps()[-1].step == 21


def test_a_used_folder_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=2)
    files = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(UserError, match=r"not empty .* --resume"):
        RunFolder.create(folder.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty .*thesis.tex"):
        RunFolder.create(tmp_path / "other")
    with pytest.raises(UserError, match=r"no record\.json"):
        RunFolder.create(tmp_path / "other", resume=True)
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "other" / "thesis.tex")
    with pytest.raises(UserError, match="does not exist"):
        RunFolder.open(tmp_path / "nowhere")
    assert files == {path: path.read_bytes() for path in folder.path.iterdir()}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("record.json", "{", "record.json is not JSON"),
        ("record.json", '{"thinwire": "1"}', "record.json: started: .*required"),
        ("record.json", json.dumps({**RECORD, "world_size": "four"}), "record.json: world_size: .*'four'"),
        ("predicted.json", '{"step_s": "fast"}', "predicted.json: step_s: .*'fast'"),
        ("ledger.json", '{"entries": [{"rank": 0}]}', r"ledger.json: entries\.0\.label"),
        ("cards.json", "[]", "cards.json: "),
        ("events.jsonl", "nonsense\n", r"events.jsonl:1 is not JSON"),
        ("events.jsonl", '{"event": "step", "step": 1}\n', r"events.jsonl:1: step\.time_s"),
        ("events.jsonl", '{"event": "party", "step": 1}\n', "events.jsonl:1: .*party"),
    ],
)
def test_damage_is_one_line_that_names_file_and_key(tmp_path: Path, name: str, text: str, wanted: str) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=1)
    (folder.path / name).write_text(text)
    with pytest.raises(UserError, match=wanted) as caught:
        [folder.record(), folder.predicted(), folder.ledger(), folder.cards(), folder.steps()]
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_schema_is_not_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write("record.json", RECORD)
    with pytest.raises(UserError, match=r"record.json: hosts"):
        folder.write("record.json", {**RECORD, "hosts": 3})
    with pytest.raises(UserError, match=r"events.jsonl: "):
        folder.append({"event": "step", "step": 1})
    assert folder.record().hosts == ("a", "b") and not folder.has("events.jsonl")
