"""Replicas that go alone, in one process, by the papers' formulas: what distributed ones are compared with. Nothing of ours."""

import torch
from torch import nn

STEPS = 10
WIDTH = 15
"""Odd, so that two ranks do not hold equal shards."""


class Net(nn.Module):
    """The last block has one row: of several ranks among which it is cut only the first holds something of it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList([*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * rank + step))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


SETTINGS = {
    "diloco": (0.7, 0.9, 3, 0, 0.0),
    "local_sgd": (1.0, 0.0, 4, 0, 0.0),
    "muloco": (0.7, 0.6, 3, 0, 0.0),
    "streaming": (0.4, 0.9, 4, 2, 0.5),
    "added": (1.0, 0.0, 4, 3, None),
}
"""Outer learning rate and momentum, H, tau, alpha; None: to what comes back is added what a replica has moved since."""


def reference(kind: str, workers: int, ranks_of_each: int = 1) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(Each replica's parameters after STEPS, the final anchor). A replica of several ranks takes all of their batches."""
    models = [Net() for _ in range(workers)]
    optimizers = [adamw(model) for model in models]
    names = [name for name, _ in models[0].named_parameters()]
    rate, mu, every, tau, alpha = SETTINGS[kind]
    groups = [[n for n in names if f"blocks.{b}." in n] for b in range(4)] + [[n for n in names if "embed" in n]]
    groups = groups if tau else [names]
    anchor = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    u = {name: torch.zeros_like(p) for name, p in anchor.items()}
    waiting: dict[int, dict[str, torch.Tensor]] = {}
    stood = [dict[str, torch.Tensor]() for _ in models]

    def send(group: list[str]) -> dict[str, torch.Tensor]:
        for at, m in zip(stood, models, strict=True):
            at |= {n: p.detach().clone() for n, p in m.named_parameters() if n in group}
        return {n: torch.stack([anchor[n] - dict(m.named_parameters())[n].detach() for m in models]).mean(0) for n in group}

    def apply(deltas: dict[str, torch.Tensor]) -> None:
        for n, d in deltas.items():
            u[n] = mu * u[n] + d
            anchor[n] = anchor[n] - rate * (d + mu * u[n] if mu else d)
            for at, m in zip(stood, models, strict=True):
                p = dict(m.named_parameters())[n].data
                p.copy_(anchor[n] + (p - at[n]) if alpha is None else alpha * p + (1 - alpha) * anchor[n])

    sent = dict.fromkeys(range(len(groups)), 0)
    for step in range(STEPS):
        for replica, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            ranks = range(replica * ranks_of_each, (replica + 1) * ranks_of_each)
            inner_step(model, optimizer, torch.cat([batch(step, rank) for rank in ranks]))
        for index, group in enumerate(groups):
            if index in waiting and step + 1 == sent[index] + tau:
                apply(waiting.pop(index))
            if (step + 1) % every == (index + 1) * every // len(groups) % every:
                waiting[index], sent[index] = send(group), step + 1
                if not tau:
                    apply(waiting.pop(index))
    local = [flat(model) for model in models]
    for index in list(waiting):
        apply(waiting.pop(index))
    late = [index for index in range(len(groups)) if sent[index] != STEPS]
    deltas = [send(groups[index]) for index in late]
    for each in deltas:
        apply(each)
    return local, torch.cat([anchor[name].reshape(-1) for name in names])
