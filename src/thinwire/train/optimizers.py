"""The optimizers of `train.optimizer`: AdamW (in 8 bits: `eight_bit`), SGD with momentum, and two of our own.

Muon: momentum orthonormalised, for matrices; AdamW for embeddings, the head and vectors.

    m <- mu m + g,   n = g + mu m (Nesterov),   x <- (1 - lr d) x - 0.2 sqrt(max(rows, columns)) lr O(n)

O(n) is near the nearest orthonormal matrix to n: five quintic Newton-Schulz steps y <- a y + (b S + c S^2) y with S = y y^T, on
n / ||n||, which bring the singular values close to 1. The factor makes the step as large as AdamW's, so that one learning rate
does for both. Jordan et al. 2024 (Muon; the coefficients), Liu et al. 2025 (arXiv 2502.16982: the factor, weight decay).

Descent by signs: x <- x - lr (sign(g) + d x), with d the weight decay (Bernstein et al. 2018, signSGD). The gradient's size does
not matter. Over the momentum that DeMo exchanges (Peng et al. 2024) this is its Signum form.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.config.optimizer import SGD, AdamW, Muon, SignSGD
from thinwire.config.run import TrainSection
from thinwire.train.eight_bit import AdamW8bit
from thinwire.train.updates import keep_on_host

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def make_optimizer(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """As train.optimizer says; weight decay on matrices only. Its state lies where train.on_host says: on a device."""
    optimizer = _chosen(model, train)
    if "optimizer" in train.on_host:
        keep_on_host(optimizer)
    return optimizer


def _chosen(model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """Fused where PyTorch has it so."""
    chosen, rate = train.optimizer, train.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in model.parameters() if parameter.dim() >= 2], "weight_decay": chosen.weight_decay},
        {"params": [parameter for parameter in model.parameters() if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    match chosen:
        case AdamW():
            kind = AdamW8bit if chosen.states == "8bit" else torch.optim.AdamW
            return kind(groups, lr=rate, betas=(chosen.beta1, chosen.beta2), eps=chosen.epsilon, fused=True)
        case SGD():  # fused on CPUs, PyTorch 2.13 leaves most parameters in 16 bits where they are
            fused = all(parameter.itemsize > 2 for parameter in model.parameters())
            return torch.optim.SGD(groups, rate, chosen.momentum, fused=fused)
        case SignSGD():
            return SignDescent(groups, rate)
        case Muon():
            return OrthogonalMomentum(by_kind_of_matrix(model, chosen.weight_decay), rate, chosen)


class SignDescent(torch.optim.Optimizer):
    """No state of its own. Groups: params, weight_decay (0 unless given)."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(parameter.grad.sign(), alpha=-group["lr"])


def by_kind_of_matrix(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: hidden matrices; embeddings (and heads tied to them) and an untied head; vectors."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up, hidden, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif id(parameter) in embeddings or name.startswith("head"):
            looked_up.append(parameter)
        else:
            hidden.append(parameter)
    return [
        {"params": hidden, "weight_decay": weight_decay, "orthogonal": True},
        {"params": looked_up, "weight_decay": weight_decay, "orthogonal": False},
        {"params": vectors, "weight_decay": 0.0, "orthogonal": False},
    ]


def orthonormalised(matrix: Tensor) -> Tensor:
    """O of the formula above, for a matrix of any shape (more dims: all but the first count as columns). float32."""
    a, b, c = COEFFICIENTS
    rows = matrix.flatten(1)
    y = rows.T if rows.shape[0] > rows.shape[1] else rows
    y = y / (y.norm() + 1e-7)
    for _ in range(STEPS):
        s = y @ y.T
        y = a * y + (b * s + c * s @ s) @ y
    return (y.T if rows.shape[0] > rows.shape[1] else y).reshape(matrix.shape)


class OrthogonalMomentum(torch.optim.Optimizer):
    """See the top of the file. Groups as of `by_kind_of_matrix`."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, config: Muon) -> None:
        defaults = {"lr": lr, "momentum": config.momentum, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._move(parameter, group)
        # Of copies, since it adds keys of its own to the groups, which checkpoints have not.
        adamw = torch.optim.AdamW([dict(group) for group in self.param_groups if not group["orthogonal"]])
        adamw.state = self.state
        adamw.step()

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        update = orthonormalised(gradient.add(momentum, alpha=group["momentum"]))
        rows, columns = parameter.flatten(1).shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])
