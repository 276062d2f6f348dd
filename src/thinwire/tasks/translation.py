"""A sentence in another language: verses of the King James Bible into Spanish (`verses`), or a CSV or JSONL with the columns
`source` and `target`.

Pairs longer than train.sequence tokens on either side are left out. The model: torch's nn.Transformer, norms first, without
dropout, one embedding for both languages and the output (Vaswani et al. 2017); a translation takes the likeliest token each time.
Score: BLEU of sacrebleu over all held-out pairs, from sums of its counts. Baseline: the source as it stands. Margin, stated
beforehand: 3 points.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.own import columns_of
from thinwire.tasks.task import Score
from thinwire.tasks.text import BEGIN, END, PAD, Codes, digest_of, library, padded, split
from thinwire.tasks.verses import load_verses

VOCABULARY, WIDTH, LAYERS, HEADS = 4000, 128, 2, 4
MAX_HELD_OUT = 2000


class Seq2Seq(nn.Module):
    """forward(source [B, S], before [B, T]) -> logits [B, T, vocabulary] of what follows each of `before`."""

    def __init__(self, vocabulary: int, width: int, layers: int, longest: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, **options)  # type: ignore[arg-type]
        encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.transformer = nn.Transformer(
            width,
            HEADS,
            layers,
            layers,
            4 * width,
            custom_encoder=encoder,
            **options,  # type: ignore[arg-type]
        )
        place, index = torch.arange(longest)[:, None], torch.arange(0, width, 2)
        angle = place * torch.exp(-math.log(10_000.0) * index / width)
        waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
        self.register_buffer("places", waves, persistent=False)

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        nothing = source == PAD
        later = torch.ones(before.shape[1], before.shape[1], dtype=torch.bool, device=before.device).triu(1)
        found = self.transformer(
            self._embedded(source),
            self._embedded(before),
            tgt_mask=later,
            src_key_padding_mask=nothing,
            memory_key_padding_mask=nothing,
        )
        return F.linear(found, self.embed.weight)

    def _embedded(self, tokens: Tensor) -> Tensor:
        places: Any = self.places
        return self.embed(tokens) * self.embed.embedding_dim**0.5 + places[: tokens.shape[1]]


class Translation(ExampleTask):
    """See the top of the file. Subclasses may read other pairs of texts."""

    item, unit = "pair", "nats per token"
    score_is = Score(name="BLEU", unit="points", margin=3.0)
    num_measured = 10
    vocabulary = VOCABULARY

    def pairs(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """(source, target), and what the record says of them."""
        if self.config.task.source:
            found, about = columns_of(Path(self.config.task.source).expanduser(), ("source", "target"))
            return [(one[0], one[1]) for one in found], about
        return load_verses(self.cache_folder)

    def load(self) -> dict[str, Any]:
        pairs, about = self.pairs()
        parts = dict(zip(("train", "held_out"), split(len(pairs), MAX_HELD_OUT), strict=True))
        self.codes = Codes([text for row in parts["train"].tolist() for text in pairs[row]], self.vocabulary, self.cache_folder)
        sides = [self.codes.tokens([pair[side] for pair in pairs]) for side in (0, 1)]
        self._texts, self._pairs = pairs, [self.as_kept(*both) for both in zip(*sides, strict=True)]
        fits = np.array([max(map(len, pair)) <= self.config.train.sequence for pair in self._pairs])
        self._parts = {part: rows[fits[rows]] for part, rows in parts.items()}
        self.num_train, self.num_held_out = (len(rows) for rows in self._parts.values())
        return {**about, "documents": len(pairs), "left_out": int((~fits).sum()), "sha256": digest_of(map("\t".join, pairs))}

    def as_kept(self, source: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        """With the mark of the end."""
        return [*source, END], [*target, END]

    def build(self) -> nn.Module:
        width, layers = self.config.task.width or WIDTH, self.config.task.layers or LAYERS
        return Seq2Seq(self.codes.vocabulary, width, layers, self.config.train.sequence + 8)

    def examples(self, part: str, rows: Rows) -> Tensors:
        chosen = self._parts[part][rows]
        sources, targets = zip(*(self._pairs[row] for row in chosen.tolist()), strict=True)
        return padded(sources), padded(targets), torch.from_numpy(chosen)

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        source, target, _ = batch
        before = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        return F.cross_entropy(model(source, before).flatten(0, 1), target.flatten(), ignore_index=PAD)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        wanted = [self._texts[row][1] for row in batch[2].tolist()]
        bleu = library("sacrebleu").corpus_bleu(self.written(model, batch[0]), [wanted], force=True)
        return *bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len

    def measured_score(self, sums: Sequence[float]) -> float:
        whole = [round(one) for one in sums]
        score = library("sacrebleu.metrics").BLEU.compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp")
        return float(score.score)

    @torch.no_grad()
    def written(self, model: nn.Module, source: Tensor) -> list[str]:
        """What the model writes for each row [B, S], at most train.sequence tokens."""
        found = source.new_full((len(source), 1), BEGIN)
        open_ = torch.ones(len(source), dtype=torch.bool, device=source.device)
        while bool(open_.any()) and found.shape[1] <= self.config.train.sequence:
            following = model(source, found)[:, -1].argmax(1).where(open_, PAD)
            open_ &= following != END
            found = torch.cat([found, following[:, None]], 1)
        return [self.codes.text(row) for row in found[:, 1:].tolist()]

    def baseline(self) -> tuple[str, float]:
        rows = np.array(self._parts["held_out"]).tolist()
        texts = [self._texts[row] for row in rows]
        same = library("sacrebleu").corpus_bleu([one[0] for one in texts], [[one[1] for one in texts]], force=True)
        return "the source as it stands", float(same.score)

    def predict(self, model: nn.Module, given: str) -> str:
        source, _ = self.as_kept(self.codes.tokens([given])[0][: self.config.train.sequence - 1], [])
        return self.written(model, padded([source]).to(next(model.parameters()).device))[0]

    def shown(self, model: nn.Module, count: int) -> list[str]:
        rows = np.arange(min(count, self.num_held_out), dtype=np.int64)
        source, _, chosen = self.examples("held_out", rows)
        written = self.written(model, source.to(next(model.parameters()).device))
        found = []
        for row, text in zip(chosen.tolist(), written, strict=True):
            found += [f"source: {self._texts[row][0]}", f"target: {self._texts[row][1]}", f"model:  {text}", ""]
        return found
