"""Speech: a user's own folder of recordings trains on two ranks as on one; what is heard depends on the recording alone."""

import ctypes.util
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from equality import CODED_AND_RARE, alike, judged, run_config, two_ranks_are_one, watched_training
from hypothesis import given, settings
from hypothesis import strategies as st

from pool import Pool
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.tasks import prompts
from thinwire.tasks.catalogue import make_task
from thinwire.tasks.recordings import BANDS, Varied, log_mel, loudness, read_wav
from thinwire.tasks.speech import edits
from thinwire.train.trained import open_trained

WORDS = {"low": 300.0, "middle": 900.0, "high": 2500.0}
TEXTS = st.lists(st.sampled_from("abc"), max_size=5)


def write_wav(path: Path, samples: Any, rate: int = 8000, width: int = 2) -> Path:
    """samples: from -1 to 1."""
    whole = np.round(np.asarray(samples) * (2.0 ** (8 * width - 1) - 1)).astype("<i4")
    content = (whole + 128 if width == 1 else whole)[:, None].view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, width, rate, 0, "NONE", ""))
        file.writeframes(content)
    return path


def tone(text: str, rate: int, drawn: np.random.Generator) -> Any:
    """A tone for each word, with pauses and noise."""
    time = np.arange(int(0.2 * rate)) / rate
    parts = [np.concatenate([np.sin(2 * np.pi * WORDS[word] * time), 0 * time]) for word in text.split()]
    whole = np.concatenate(parts)
    return 0.5 * whole + drawn.normal(0, 0.003, len(whole))


def make_folder(folder: Path, count: int = 40) -> Path:
    """Recordings of one to three words at two rates, and their transcript."""
    folder.mkdir(parents=True)
    drawn, lines = np.random.default_rng(1), []
    for number in range(count):
        text = " ".join(drawn.choice(list(WORDS), 1 + number % 3))
        rate = (8000, 16000)[number % 4 == 0]
        write_wav(folder / f"{number}.wav", tone(text, rate, drawn), rate)
        lines.append(json.dumps({"file": f"{number}.wav", "text": text.title()}))
    (folder / "transcript.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def small(folder: Path) -> dict[str, Any]:
    return {"kind": "speech", "source": str(folder), "width": 8, "layers": 1}


def made(folder: Path, **sections: Any) -> Any:
    return make_task(run_config(folder.parent / "run", small(folder), **sections), Layout(), folder.parent)


@pytest.mark.long
@pytest.mark.parametrize("layout", [{}, {"shard": 2}], ids=["data", "shard"])
def test_two_ranks_train_as_one_and_the_model_is_of_use(ranks1: Pool, ranks2: Pool, tmp_path: Path, layout: dict) -> None:
    source = make_folder(tmp_path / "own")
    folder = two_ranks_are_one(ranks1, ranks2, tmp_path, small(source), layout=layout)
    trained = open_trained(folder, tmp_path)
    assert trained.task.score_of(trained.task.score(trained.model, 0)) == pytest.approx(judged(folder)[6], abs=1e-9)
    assert trained.task.predict(trained.model, str(source / "0.wav"))
    assert [line[:5] for line in trained.task.shown(trained.model, 2)] == 2 * ["said:"]


@pytest.mark.long
@CODED_AND_RARE
def test_codes_and_rare_exchanges_send_what_was_predicted(ranks2: Pool, tmp_path: Path, sections: dict) -> None:
    found = ranks2.run(watched_training, run_config(tmp_path / "two", small(make_folder(tmp_path / "own")), **sections))
    alike(found[0][0], found)


@pytest.mark.long
def test_five_recordings_train(ranks1: Pool, tmp_path: Path) -> None:
    task = small(make_folder(tmp_path / "own", 5))
    config = run_config(tmp_path / "run", task, train={"micro_batch": 1, "steps": 2}, sync={"accumulate": 2})
    assert judged(ranks1.run(watched_training, config)[0][0])


@pytest.mark.long
def test_tiny_data_are_learned_from_words_and_from_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, by hand."""
    folder = make_folder(tmp_path / "own")
    new = write_wav(tmp_path / "new.wav", tone("high low middle", 22050, np.random.default_rng(9)), 22050)
    for most, enough in ((1000, 95.0), (2, 80.0)):
        monkeypatch.setattr("thinwire.tasks.speech.MOST_UNITS", most)
        sections = {"train": {"micro_batch": 12}, "sync": {"accumulate": 1}, "model": {"dtype": "float32"}}
        task = make_task(run_config(tmp_path / "run", {**small(folder), "width": 32}, **sections), Layout(), tmp_path)
        model = task.build_model()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(200):
            task.loss(model, task.batch(step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert task.score_of(task.score(model, 0)) >= max(enough, task.baseline()[1])
        if most == 1000:
            assert task.predict(model.eval(), str(new)) == "high low middle"


def test_what_is_heard_depends_on_the_recording_alone(tmp_path: Path) -> None:
    """Not on what it is batched with."""
    task = made(make_folder(tmp_path / "own", 24))
    model = task.build_model()
    task.settle(model)
    model.eval()
    bands, steps, _, _ = task.examples("train", np.arange(6, dtype=np.int64))
    together = model(bands.double(), steps)
    for row, count in enumerate(steps.tolist()):
        alone = model(bands[row : row + 1, :, :count].double(), steps[row : row + 1])
        assert torch.allclose(together[row : row + 1, : alone.shape[1]], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recordings_of_each_width_are_read(tmp_path: Path, width: int) -> None:
    samples = np.sin(np.arange(800) / 7.0)
    found, rate = read_wav(write_wav(tmp_path / "one.wav", samples, 11025, width))
    assert rate == 11025 and np.abs(found - samples).max() < 2.0 ** (2 - 8 * width) + 1e-6


def test_a_tone_is_in_its_band_at_any_rate() -> None:
    """What is seen does not depend on how many samples a second there are, and not on what a microphone does to each band."""
    tones = {rate: np.sin(2 * np.pi * 1000.0 * np.arange(rate) / rate).astype(np.float32) for rate in (8000, 44100)}
    seen = [loudness(tone, rate, Varied()) for rate, tone in tones.items()]
    peaks = [one[5:90].mean(0).argmax() for one in seen]
    assert peaks[0] == peaks[1] and all(one.shape[1] == BANDS and abs(len(one) - 97) <= 1 for one in seen)
    hz = 700.0 * (10.0 ** (np.linspace(*(2595 * np.log10(1 + f / 700) for f in (100, 3700)), BANDS + 2) / 2595) - 1)
    assert hz[int(peaks[0])] < 1000.0 < hz[int(peaks[0]) + 2]
    assert log_mel(tones[8000], 8000).float().mean(0).abs().max() < 1e-3


@settings(max_examples=30)
@given(TEXTS, TEXTS, TEXTS)
def test_edits_are_a_distance(one: list[str], two: list[str], three: list[str]) -> None:
    assert edits(one, two) == edits(two, one) and (edits(one, two) == 0) == (one == two)
    assert edits(one, three) <= edits(one, two) + edits(two, three)
    assert abs(len(one) - len(two)) <= edits(one, two) <= max(len(one), len(two))


@pytest.mark.parametrize("spoil", ["no transcript", "two", "missing", "no text", "no wav", "slow", "silent", "one"])
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path, spoil: str) -> None:
    folder = make_folder(tmp_path / "own", 1 if spoil == "one" else 4)
    transcript = folder / "transcript.jsonl"
    if spoil == "no transcript":
        transcript.unlink()
    elif spoil == "two":
        (folder / "transcript.csv").write_text("file,text\n0.wav,low\n")
    elif spoil == "missing":
        (folder / "3.wav").unlink()
    elif spoil == "no text":
        transcript.write_text('{"file": "0.wav"}\n')
    elif spoil == "no wav":
        (folder / "2.wav").write_bytes(b"RIFFlessness")
    elif spoil == "slow":
        write_wav(folder / "1.wav", np.ones(100), 4000)
    elif spoil == "silent":
        write_wav(folder / "1.wav", np.zeros(100))
    said = {
        "no transcript": "has 0 of transcript.csv",
        "two": "has 2 of transcript.csv",
        "missing": "names 3.wav",
        "no text": "no text under 'text'",
        "no wav": "2.wav cannot be read",
        "slow": "4000 samples a second",
        "silent": "is silent",
        "one": "0 held-out examples",
    }[spoil]
    with pytest.raises(UserError, match=said) as raised:
        made(folder)
    assert "\n" not in str(raised.value)


def test_what_has_to_be_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LIBRARY", "libnothing.so.1")
    with pytest.raises(UserError, match="apt-get install espeak-ng asterisk-core-sounds-en-wav"):
        prompts.load_prompts(tmp_path)


@pytest.mark.long
@pytest.mark.skipif(
    not (ctypes.util.find_library("espeak-ng") and prompts.FOLDER.is_dir()), reason=f"apt-get install {prompts.PACKAGES}"
)
def test_prompts_are_kept_and_held_out_are_whole_speakers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SPOKEN", 138)
    monkeypatch.setattr(prompts, "HELD_OUT", 20)
    found = [prompts.load_prompts(tmp_path) for _ in range(2)]
    assert len({about["sha256"] for _, _, about in found}) == 1
    seen, texts, about = found[1]
    assert [len(texts[part]) for part in ("train", "held_out")] == [138, 20 + 35] == [len(one) for one in seen.values()]
    assert texts["held_out"][20:] == list(prompts.FILES) and about["bytes"] > 300_000
    assert len(prompts.HELD_VOICES) == 10
