"""A block's MLP in many: of E experts, each an MLP of its own, k compute a token; a router learns which.

    p     = softmax(R x)                          by token, over the experts; in float32 at least
    g_e   = p_e (k = 1), p_e / sum of the chosen p (k > 1), of the k largest; of equal ones the lower e is chosen
    y     = sum over the chosen e of g_e MLP_e(x), of those with a slot for the token

An expert has C = min(L, ceil(capacity k L / E)) slots for each sequence of L tokens, or L if capacity is 0, which drops nothing.
Tokens take them in their order, each for its first choice and then for its others, so that no token's place depends on a later
one; whoever finds none goes on without this expert. All slots are computed, empty ones as zeros: shapes depend on no value, so
nothing is read on the host, and what experts on other ranks get has a size that is known.

    balance = mean over sequences of  E sum over e of f_e mean over tokens of p_e      f_e: part of the choices that fell on e

It is 1 if choices are spread evenly, and is formed by sequence, as slots are: so a sequence counts the same in whatever
micro-batch and on whatever rank it is, and training in any of them is the same.

Shazeer et al. 2017 (arXiv 1701.06538); Lepikhin et al. 2020 (GShard, 2006.16668: groups of tokens, capacity, k = 2); Fedus et al.
2021 (Switch, 2101.03961: k = 1, the balance); DeepSeek-AI 2024 (V3, 2412.19437: balance by sequence).

Shapes: B batch, L sequence, M width, E experts, K chosen, T = B L K choices in order, C slots of a sequence, S = B C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.config.model import ModelConfig
from thinwire.models.transformer import MLP


class Experts(nn.Module):
    """In the place of an MLP. `compute` may be replaced: (experts, what is in their slots_ESM) -> what comes out of them_ESM."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.experts))
        self.compute: Callable[[Iterable[nn.Module], Tensor], Tensor] = compute
        self._balance: Tensor | None = None

    def forward(self, x_BLM: Tensor) -> Tensor:
        batch, length, width = x_BLM.shape
        count, slots = self.config.experts, self.config.expert_slots(length)
        gate_BLK, chosen_BLK = self._route(x_BLM)
        wanted_BXE = _one_hot(chosen_BLK.flatten(1), count)
        place_BX = (wanted_BXE.cumsum(1) * wanted_BXE).sum(-1) - 1
        sequence_B1 = torch.arange(batch, device=x_BLM.device)[:, None]
        row_BX = (chosen_BLK.flatten(1) * batch + sequence_B1) * slots + place_BX
        nowhere = count * batch * slots
        row_T = row_BX.masked_fill(place_BX >= slots, nowhere).flatten()
        x_TM = x_BLM.flatten(0, 1).repeat_interleave(self.config.experts_per_token, dim=0)
        slots_ESM = x_TM.new_zeros(nowhere + 1, width).index_put((row_T,), x_TM)[:-1].view(count, -1, width)
        y_ESM = self.compute(self.experts, slots_ESM)
        y_TM = F.pad(y_ESM.flatten(0, 1), (0, 0, 0, 1)).index_select(0, row_T)
        return (y_TM.view(batch, length, -1, width) * gate_BLK[..., None].to(x_BLM.dtype)).sum(2)

    def taken_balance(self) -> Tensor:
        """Of the last pass with gradients, [], once."""
        balance, self._balance = self._balance, None
        assert balance is not None, "a pass with gradients comes first"
        return balance

    def _route(self, x_BLM: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and numbers of the chosen experts, best first, each [B, L, K]."""
        count, most = self.config.experts, self.config.experts_per_token
        precise = torch.promote_types(x_BLM.dtype, torch.float32)
        with torch.autocast(x_BLM.device.type, enabled=False):
            p_BLE = F.linear(x_BLM.to(precise), self.router.weight.to(precise)).softmax(-1)
        gate_BLE, order_BLE = p_BLE.sort(dim=-1, descending=True, stable=True)
        gate_BLK, chosen_BLK = gate_BLE[..., :most], order_BLE[..., :most]
        if torch.is_grad_enabled():
            f_BE = _one_hot(chosen_BLK.flatten(1), count).to(precise).mean(1)
            self._balance = count * (f_BE * p_BLE.mean(1)).sum(-1).mean()
        return (gate_BLK / gate_BLK.sum(-1, keepdim=True) if most > 1 else gate_BLK), chosen_BLK


def _one_hot(chosen: Tensor, count: int) -> Tensor:
    """[.., count], int64; torch's own reads values on the host on some devices."""
    return (chosen[..., None] == torch.arange(count, device=chosen.device)).long()


def compute(experts: Iterable[nn.Module], slots_ESM: Tensor) -> Tensor:
    """Each expert on its slots."""
    return torch.stack([expert(slots_SM) for expert, slots_SM in zip(experts, slots_ESM, strict=True)])
