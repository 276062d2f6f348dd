"""A small run for tests: a text of its own, a tiny model, everything below a temporary folder."""

import random
from pathlib import Path

from thinwire.config.run import RunConfig


def make_text(path: Path, size: int = 60_000) -> Path:
    """Sentences of a few words, so that there is something to learn."""
    chosen = random.Random(7)
    words = ["thin", "wire", "ring", "tree", "rank", "slow", "link", "loss", "step", "send"]
    path.write_text(" ".join(chosen.choice(words) for _ in range(size // 5)), encoding="utf-8")
    return path


def make_config(folder: Path, **train: object) -> RunConfig:
    """A run of 12 steps that reports each step."""
    text = folder / "text.txt"
    if not text.exists():
        make_text(text)
    settings = {
        "steps": 12,
        "micro_batch": 2,
        "sequence": 16,
        "dtype": "float32",
        "log_every": 1,
        "eval_every": 4,
        "eval_tokens": 512,
        "warmup_steps": 2,
        "run": str(folder / "run"),
        "timeout_s": 20,
    } | train
    return RunConfig.model_validate(
        {
            "model": {"layers": 2, "width": 16, "heads": 2, "context": 16},
            "data": {"source": str(text), "cache": str(folder / "cache")},
            "sync": {"accumulate": 2, "bucket_bytes": 4096},
            "train": settings,
        }
    )
