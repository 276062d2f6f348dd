"""A word-level LSTM whose gradients are exchanged once in ten micro-batches, in plain PyTorch; one line of it is thinwire's.

    torchrun --nproc-per-node 2 examples/lstm_accumulation.py --compression int4

An embedding of 10,000 words of 300 values, two LSTM layers of 1,024, DistributedDataParallel. The text is the standard library's.
"""

import argparse
import re
import sysconfig
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire


class WordModel(nn.Module):
    def __init__(self, words: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, words)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def read_words(count: int) -> torch.Tensor:
    """The text as numbers of words; all but the commonest are the last one."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    words = re.findall(r"\w+|[^\w\s]", "\n".join(path.read_text("utf-8", errors="replace") for path in files))
    number = {word: index for index, (word, _) in enumerate(Counter(words).most_common(count - 1))}
    return torch.tensor([number.get(word, count - 1) for word in words])


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--embedding", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compression", default="none", help="none, bf16, int8, int4, ...")
    args = parser.parse_args(arguments)

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(WordModel(args.words, args.embedding, args.hidden), gradient_as_bucket_view=True)
    if args.compression != "none":
        thinwire.compress_gradients(model, args.compression)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    text = read_words(args.words)
    draw = torch.Generator().manual_seed(1 + rank)
    losses = []
    for step in range(args.steps):
        begun, total = time.perf_counter(), 0.0
        for micro in range(args.accumulate):
            starts = torch.randint(len(text) - args.length - 1, (args.batch,), generator=draw)
            windows = torch.stack([text[start : start + args.length + 1] for start in starts.tolist()])
            with nullcontext() if micro == args.accumulate - 1 else model.no_sync():
                logits = model(windows[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / args.accumulate
                loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if rank == 0:
            tokens = args.batch * args.length * args.accumulate * ranks / (time.perf_counter() - begun)
            print(f"step {step + 1}/{args.steps}  loss {total:.3f}  {tokens:,.0f} tokens/s", flush=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
