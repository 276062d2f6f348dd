"""What else somebody will want: which packages a Debian package depends on (`apt-cache dumpavail`; real choices, of
packagers), or a CSV or JSONL with the columns `user` and `item`.

Of alternatives the first counts. Items that fewer than `LEAST_USERS` have are left out, then users with fewer than
`LEAST_ITEMS`. Of at most 2,000 users one item each, drawn by the seed, is held out. The model: a vector for each user and
item, and a number for each item, p(item | user) = softmax(u . v + b) over all items (Koren et al. 2009, with a softmax).
Gradients of the vectors are dense: sparse ones can be averaged (`compress.sparse`), but how many rows they have depends on
the batch, so that what they send could not be predicted. Score: hit rate at 10, the share of held-out items among the ten
likeliest that the user does not have. Baseline: the ten that most users have. Margin, stated beforehand: 10 points.
"""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.data.loader import key_of
from thinwire.errors import UserError
from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.own import columns_of
from thinwire.tasks.task import Score
from thinwire.tasks.text import digest_of

LEAST_USERS, LEAST_ITEMS, MAX_HELD_OUT, WIDTH, SHOWN = 10, 4, 2000, 32, 10
READ_S = 120.0


class Factors(nn.Module):
    """forward(users [B]) -> logits [B, items]."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users, self.items, self.often = nn.Embedding(users, width), nn.Embedding(items, width), nn.Embedding(items, 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=width**-0.5)
        nn.init.zeros_(self.often.weight)

    def forward(self, users: Tensor) -> Tensor:
        return self.of_vectors(self.users(users))

    def of_vectors(self, wanted: Tensor) -> Tensor:
        """[B, width] of anybody -> logits [B, items]."""
        return wanted @ self.items.weight.T + self.often.weight[:, 0]


class Recommendation(ExampleTask):
    """See the top of the file."""

    item, unit = "choice", "nats per choice"
    score_is = Score(name="hit rate at 10", unit="%", margin=10.0)

    def load(self) -> dict[str, Any]:
        own = self.config.task.source
        found, about = columns_of(Path(own).expanduser(), ("user", "item")) if own else _dependencies()
        chosen = _often_enough(dict.fromkeys((one[0], one[1]) for one in found), *((1, 2) if own else (LEAST_USERS, LEAST_ITEMS)))
        self.names, self.items = sorted({user for user, _ in chosen}), sorted({item for _, item in chosen})
        user_of, item_of = ({name: place for place, name in enumerate(names)} for names in (self.names, self.items))
        self._known: list[list[int]] = [[] for _ in self.names]
        for user, item in sorted(chosen):
            self._known[user_of[user]].append(item_of[item])
        held_users = np.arange(min(MAX_HELD_OUT, len(self.names)), dtype=np.int64)
        held_users = held_users * len(self.names) // max(1, len(held_users))
        held = [(user, self._known[user].pop(key_of(20, user) % len(self._known[user]))) for user in held_users.tolist()]
        train = [(user, item) for user, known in enumerate(self._known) for item in known]
        parts = (("train", train), ("held_out", held))
        self._pairs = {part: np.array(pairs, dtype=np.int64).reshape(-1, 2) for part, pairs in parts}
        self.num_train, self.num_held_out = len(train), len(held)
        return {**about, "documents": len(chosen), "sha256": digest_of(f"{user}\t{item}" for user, item in sorted(chosen))}

    def build(self) -> nn.Module:
        return Factors(len(self.names), len(self.items), self.config.task.width or WIDTH)

    def examples(self, part: str, rows: Rows) -> Tensors:
        users, items = torch.from_numpy(self._pairs[part][rows]).unbind(1)
        return users, items

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        users, items = batch
        return F.cross_entropy(model(users), items)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        users, items = batch
        logits = model(users)
        for row, user in enumerate(users.tolist()):
            logits[row, self._known[user]] = -torch.inf
        best = logits.topk(min(SHOWN, logits.shape[1]), 1).indices
        return float((best == items[:, None]).any(1).sum()), float(len(users))

    def baseline(self) -> tuple[str, float]:
        usual = [item for item, _ in Counter(self._pairs["train"][:, 1].tolist()).most_common()]
        hits = 0
        for user, item in self._pairs["held_out"].tolist():
            known = set(self._known[user])
            hits += item in [one for one in usual[: SHOWN + len(known)] if one not in known][:SHOWN]
        return f"the {SHOWN} that most have", 100.0 * hits / self.num_held_out

    def predict(self, model: nn.Module, given: str) -> str:
        """given: a user of the data, or items with commas between them."""
        device, names = next(model.parameters()).device, [name.strip() for name in given.split(",")]
        factors: Any = model
        if given in self.names:
            known = self._known[self.names.index(given)]
            logits = factors(torch.tensor([self.names.index(given)], device=device))[0]
        else:
            if unknown := [name for name in names if name not in self.items]:
                raise UserError(f"{unknown[0]!r} is neither a user nor an item of the data; give items with commas between them")
            known = [self.items.index(name) for name in names]
            length = factors.users.weight.norm(dim=1).mean()
            logits = factors.of_vectors(length * F.normalize(factors.items.weight[known].mean(0, keepdim=True)))[0]
        logits = logits.clone()
        logits[known] = -torch.inf
        return ", ".join(self.items[item] for item in logits.topk(min(SHOWN, len(logits) - len(known))).indices.tolist())

    def shown(self, model: nn.Module, count: int) -> list[str]:
        held = self._pairs["held_out"][:count].tolist()
        return [f"{self.names[user]}, {self.items[item]} wanted: {self.predict(model, self.names[user])}" for user, item in held]


def _often_enough(pairs: Iterable[tuple[str, str]], least_users: int, least_items: int) -> list[tuple[str, str]]:
    listed = list(pairs)
    users = Counter(item for _, item in listed)
    listed = [pair for pair in listed if users[pair[1]] >= least_users]
    items = Counter(user for user, _ in listed)
    return [pair for pair in listed if items[pair[0]] >= least_items]


def _dependencies() -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """(package, what it depends on) of all that apt knows here."""
    if shutil.which("apt-cache") is None:
        raise UserError("there is no apt-cache, whose list of packages is the data; give task.source")
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, timeout=READ_S, check=False)
    pairs, package = list[tuple[str, ...]](), ""
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        key, _, value = line.partition(": ")
        if key == "Package":
            package = value
        elif key == "Depends":
            pairs += [(package, one.split("|")[0].split("(")[0].split(":")[0].strip()) for one in value.split(",")]
    if len(pairs) < 10_000:
        raise UserError(f"apt-cache dumpavail lists {len(pairs)} dependencies; run apt-get update, or give task.source")
    about = {"source": "dependencies of Debian packages (apt-cache dumpavail)", "licence": "facts", "files": 1}
    return pairs, {**about, "bytes": len(done.stdout)}
