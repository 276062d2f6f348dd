"""Classes, slots and answers of texts: tiny data of one's own train on two ranks as on one, and are of use afterwards."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from equality import run_config, sent_as_predicted, two_ranks_are_one, watched_training

from pool import Pool
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.tasks.catalogue import make_task
from thinwire.tasks.intent_slots import composed, slots_of
from thinwire.tasks.qa import by_rule, by_text
from thinwire.train.trained import open_trained

pytestmark = pytest.mark.heavy

NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn")


def records(kind: str, count: int) -> list[dict[str, str]]:
    chosen = random.Random(1)
    names = [chosen.sample(NAMES, 3) for _ in range(count)]
    if kind == "sentiment":
        grades = [("good", "a fine day with"), ("bad", "a sad hour without")]
        return [{"label": grades[i % 2][0], "text": f"{grades[i % 2][1]} {x} and {y}"} for i, (x, y, _) in enumerate(names)]
    if kind == "intent_slots":
        wants = [("call", "please call [who:{}] for {}"), ("write", "write to {} about [what:{}]")]
        return [{"label": wants[i % 2][0], "text": wants[i % 2][1].format(x, y)} for i, (x, y, _) in enumerate(names)]
    if kind == "summarisation":
        return [{"text": f"Here {x} has called {y} more than once.", "summary": f"{x} called {y}"} for x, y, _ in names]
    if kind == "recommendation":
        return [{"user": f"{x} {i % 9}" if i % 4 else x, "item": other} for i, (x, *both) in enumerate(names) for other in both]
    if kind == "lm_lstm":
        return [{"text": f"{x} called {y} again and again." * 10} for x, y, _ in names]
    return [{"question": f"Who called {y}?", "text": f"Then {z} saw that {x} called {y}.", "answer": x} for x, y, z in names]


def write(path: Path, kind: str, count: int = 60) -> Path:
    path.write_text("\n".join(map(json.dumps, records(kind, count))), encoding="utf-8")
    return path


GIVEN = {
    "sentiment": "a fine day",
    "intent_slots": "please call Ada for Bob",
    "qa": "Who called Ada? Then Bob called Ada.",
    "summarisation": "Here Ada has called Bob more than once.",
    "lm_lstm": "Ada",
    "recommendation": "Ada",
}


@pytest.mark.parametrize("kind", GIVEN)
def test_two_ranks_train_as_one_and_the_model_is_of_use(ranks1: Pool, ranks2: Pool, tmp_path: Path, kind: str) -> None:
    task = {"kind": kind, "source": str(write(tmp_path / "own.jsonl", kind)), "width": 8, "layers": 1}
    folder = two_ranks_are_one(ranks1, ranks2, tmp_path, task)
    trained = open_trained(folder, tmp_path)
    assert isinstance(trained.task.predict(trained.model, GIVEN[kind]), str)
    assert trained.task.shown(trained.model, 2) or kind == "lm_lstm"


def test_buckets_of_an_lstm_hold_what_was_predicted(ranks2: Pool, tmp_path: Path) -> None:
    """Its kernels have their gradients ready in another order in float32 than in float64."""
    task = {"kind": "lm_lstm", "source": str(write(tmp_path / "own.jsonl", "lm_lstm")), "width": 8, "layers": 1}
    sections = {"model": {"dtype": "float32"}, "sync": {"accumulate": 2, "bucket_bytes": 1024}}
    found = ranks2.run(watched_training, run_config(tmp_path / "two", task, **sections))
    assert {"bucket 0", "bucket 1"} <= sent_as_predicted(found[0][0])


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in GIVEN if kind != "lm_lstm"])
def test_five_records_train(ranks1: Pool, tmp_path: Path, kind: str) -> None:
    task = {"kind": kind, "source": str(write(tmp_path / "own.jsonl", kind, 5)), "width": 8, "layers": 1}
    config = run_config(tmp_path / "run", task, train={"micro_batch": 1, "steps": 2}, sync={"accumulate": 2})
    assert ranks1.run(watched_training, config)[0][0].is_dir()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sentiment", "intent_slots", "qa"])
def test_tiny_data_are_learned_and_beat_the_baseline(tmp_path: Path, kind: str) -> None:
    """On one rank, by hand."""
    import torch

    task = {"kind": kind, "source": str(write(tmp_path / "own.jsonl", kind, 200)), "width": 16, "layers": 1}
    made = make_task(run_config(tmp_path / "run", task, train={"micro_batch": 32}, sync={"accumulate": 1}), Layout(), tmp_path)
    model = made.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(60):
        made.loss(model, made.batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.score_of(made.score(model, 0)) > max(90.0, made.baseline()[1])


def test_an_answer_that_is_not_in_its_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "Who?", "text": "Nobody.", "answer": "Ada"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="'Ada' to 'Who\\?' is not in its text"):
        make_task(run_config(tmp_path / "run", {"kind": "qa", "source": str(tmp_path / "own.jsonl")}), Layout(), tmp_path)


def test_no_text_that_is_held_out_was_asked_about_in_training() -> None:
    texts = [[f"text {number}"] for number in range(40) for _ in range(3)]
    train, held_out = by_text(texts)
    assert sorted([*train, *held_out]) == list(range(len(texts))) and len(held_out) == 12
    assert not {texts[row][0] for row in train} & {texts[row][0] for row in held_out}


@pytest.mark.parametrize(
    ("text", "words", "slots"),
    [
        ("send [file:the Log] to [host:alpha]", "send the log to alpha", "- file file - host"),
        ("[time:at noon] stop", "at noon stop", "time time -"),
        ("stop now", "stop now", "- -"),
    ],
)
def test_slots_stand_in_brackets(text: str, words: str, slots: str) -> None:
    assert slots_of(text) == (words.split(), slots.split())


def test_composed_requests_are_all_different_and_always_the_same() -> None:
    assert len(set(composed(500))) == 500 and composed(500) == composed(500)


def test_rules_ask_about_names_where_they_stand() -> None:
    def answers(text: str) -> Sequence[tuple[str, str]]:
        return [(" ".join(question), words[begin]) for question, words, begin, _ in by_rule(text)]

    assert answers("And Caleb the son of Jephunneh said unto Joshua.") == [
        ("Whose son was Caleb ?", "Jephunneh"),
        ("Who was the son of Jephunneh ?", "Caleb"),
        ("To whom did Jephunneh speak ?", "Joshua"),
        ("Who spoke to Joshua ?", "Jephunneh"),
    ]
    assert answers("So Saul went down to Gilgal.") == [("Where did Saul go ?", "Gilgal"), ("Who went to Gilgal ?", "Saul")]
    assert answers("And Saul sent David.") == [("Who was it that Saul sent ?", "David"), ("Who sent David ?", "Saul")]
    assert answers("Then He said unto Peter.") == []
