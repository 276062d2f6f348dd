"""Translation: tiny pairs train on two ranks as on one, are translated, and score BLEU from sums of counts."""

import csv
import random
from pathlib import Path

import pytest
import sacrebleu
from equality import run_config, two_ranks_are_one, watched_training

from pool import Pool
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.tasks.catalogue import make_task
from thinwire.tasks.verses import load_verses
from thinwire.train.trained import open_trained

WORDS = {"thin": "fino", "wire": "hilo", "slow": "lento", "ring": "anillo", "tree": "arbol", "link": "enlace"}


def make_pairs(path: Path, count: int = 60) -> Path:
    """Sentences of two to five words, word by word."""
    chosen = random.Random(5)
    sentences = [[chosen.choice(list(WORDS)) for _ in range(chosen.randint(2, 5))] for _ in range(count)]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [(" ".join(words), " ".join(WORDS[word] for word in words)) for words in sentences]
        csv.writer(file).writerows([("source", "target"), *rows])
    return path


@pytest.mark.long
def test_two_ranks_train_as_one_and_the_model_translates(ranks1: Pool, ranks2: Pool, tmp_path: Path) -> None:
    task = {"kind": "translation", "source": str(make_pairs(tmp_path / "pairs.csv")), "width": 16, "layers": 1}
    folder = two_ranks_are_one(ranks1, ranks2, tmp_path, task)
    trained = open_trained(folder, tmp_path)
    assert isinstance(trained.task.predict(trained.model, "thin wire"), str)
    assert [line[:7] for line in trained.task.shown(trained.model, 1)] == ["source:", "target:", "model: ", ""]


def test_the_score_of_batches_is_that_of_all(tmp_path: Path) -> None:
    """Whatever the batches are, sums of their counts give sacrebleu's own number."""
    task = {"kind": "translation", "source": str(make_pairs(tmp_path / "pairs.csv")), "width": 16, "layers": 1}
    made = make_task(run_config(tmp_path / "run", task), Layout(), tmp_path)
    model = made.build_model().eval()
    made.written = lambda _, source: ["fino hilo lento"] * len(source)  # type: ignore[attr-defined, method-assign]
    wanted = [made._texts[row][1] for row in made._parts["held_out"].tolist()]  # type: ignore[attr-defined]
    whole = sacrebleu.corpus_bleu(["fino hilo lento"] * len(wanted), [wanted], force=True)
    assert made.score_of(made.score(model, 0)) == pytest.approx(whole.score, abs=1e-12)


@pytest.mark.long
def test_five_pairs_train(ranks1: Pool, tmp_path: Path) -> None:
    task = {"kind": "translation", "source": str(make_pairs(tmp_path / "pairs.csv", 5)), "width": 16, "layers": 1}
    config = run_config(tmp_path / "run", task, train={"micro_batch": 1, "steps": 2}, sync={"accumulate": 2})
    assert ranks1.run(watched_training, config)[0][0].is_dir()


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    def refused(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        config = run_config(tmp_path / "run", {"kind": "translation", "source": str(tmp_path / name)})
        with pytest.raises(UserError) as error:
            make_task(config, Layout(), tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "has no column 'target'" in refused("one.csv", "source,other\na,b\n")
    assert "line 2 has no text under 'target'" in refused("two.jsonl", '{"source": "a", "target": "b"}\n{"source": "a"}\n')
    assert "is no .csv" in refused("three.txt", "a b")
    with pytest.raises(UserError, match="apt-get install sword-text-kjv sword-text-sparv"):
        load_verses(tmp_path, tmp_path)
