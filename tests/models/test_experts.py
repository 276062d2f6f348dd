"""Experts compute what their formulas say, for the tokens that have a slot, and are spread by the gradient of the balance."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models.experts import Experts
from thinwire.models.llama import names_of
from thinwire.models.transformer import Transformer
from thinwire.workload import Workload

BATCH, LENGTH, WIDTH = 3, 12, 16


def shape(**changes: object) -> ModelConfig:
    fields = {"layers": 2, "width": WIDTH, "heads": 2, "hidden": 8, "vocabulary": 23, "experts": 4, "init_std": 0.3}
    return ModelConfig.model_validate({**fields, "dtype": "float64", **changes})


def new_experts(config: ModelConfig) -> Experts:
    torch.manual_seed(2)
    return Experts(config).double()


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_the_formula(block: Experts, x_BLM: Tensor) -> tuple[Tensor, Tensor]:
    """y, token by token; and the balance."""
    config, y_BLM, balances = block.config, torch.zeros_like(x_BLM), []
    for b, x_LM in enumerate(x_BLM):
        p_LE = (x_LM @ block.router.weight.T).softmax(-1)
        taken, fell = [0] * config.experts, torch.zeros(config.experts, dtype=x_LM.dtype)
        for t, p_E in enumerate(p_LE):
            likely = p_E.tolist()
            chosen = sorted(range(config.experts), key=lambda e, p=likely: (-p[e], e))[: config.experts_per_token]
            total = p_E[chosen].sum() if len(chosen) > 1 else 1.0
            for e in chosen:
                fell[e] += 1 / (LENGTH * config.experts_per_token)
                if taken[e] < config.expert_slots(LENGTH):
                    taken[e] += 1
                    y_BLM[b, t] = y_BLM[b, t] + p_E[e] / total * block.experts[e](x_LM[t])
        balances.append(config.experts * (fell * p_LE.mean(0)).sum())
    return y_BLM, torch.stack(balances).mean()


@pytest.mark.parametrize("chosen", [1, 2, 4])
@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.25])
def test_experts_compute_the_formula(chosen: int, capacity: float) -> None:
    block = new_experts(shape(experts_per_token=chosen, capacity=capacity))
    found, expected = [], []
    for forward, into in ((lambda x: (block(x), block.taken_balance()), found), (lambda x: by_the_formula(block, x), expected)):
        x = tokens().requires_grad_()
        y, balance = forward(x)
        (y.square().sum() + 3 * balance).backward()
        into += [y.detach(), balance.detach(), x.grad, *(one.grad.clone() for one in block.parameters())]
        block.zero_grad()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_of_equal_experts_the_first_are_chosen_and_early_tokens_have_their_slots() -> None:
    block = new_experts(shape(experts_per_token=2, capacity=1.0))
    torch.nn.init.zeros_(block.router.weight)
    x = tokens()
    first = sum(block.experts[e](x) for e in (0, 1)) / 2
    slots = block.config.expert_slots(LENGTH)
    assert slots == LENGTH // 2
    torch.testing.assert_close(block(x)[:, :slots], first[:, :slots])
    assert not block(x)[:, slots:].any()
    assert block.taken_balance().item() == pytest.approx(1.0)


def test_a_sequence_counts_the_same_in_any_batch() -> None:
    block, x = new_experts(shape(capacity=0.75)), tokens()
    together = block(x)
    balance = block.taken_balance()
    alone = []
    for one in x:
        torch.testing.assert_close(block(one[None])[0], together[len(alone)], rtol=1e-12, atol=1e-14)
        alone.append(block.taken_balance())
    torch.testing.assert_close(torch.stack(alone).mean(), balance)


def test_the_loss_is_the_texts_and_its_gradient_balances_too() -> None:
    torch.manual_seed(5)
    seen, targets = torch.randint(23, (2, BATCH, LENGTH))
    gradients = []
    for balance in (0.0, 0.5):
        torch.manual_seed(3)
        model = Transformer(shape(balance=balance)).double()
        loss = model(seen, targets)
        torch.testing.assert_close(loss, F.cross_entropy(model(seen).flatten(0, 1), targets.flatten()))
        with torch.no_grad():
            assert torch.equal(model(seen, targets), loss)
        loss.backward()
        gradients.append(model.blocks[-1].mlp.router.weight.grad)  # type: ignore[union-attr]
    model.zero_grad()
    model(seen)
    torch.stack([block.mlp.taken_balance() for block in model.blocks]).mean().backward()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(gradients[1] - gradients[0], 0.5 * model.blocks[-1].mlp.router.weight.grad)  # type: ignore[union-attr]


def test_the_balance_spreads_tokens_evenly() -> None:
    """From a router that sends all to one expert."""
    block, x = new_experts(shape(experts_per_token=1, capacity=0.0)), tokens() + 1.0
    with torch.no_grad():
        block.router.weight[0] += 0.1
    optimizer, found = torch.optim.SGD(block.router.parameters(), lr=0.05), []
    for _ in range(40):
        block(x)
        balance = block.taken_balance()
        balance.backward()
        found.append(balance.item())
        optimizer.step()
        optimizer.zero_grad()
    assert found[0] > 1.5 and min(found) < 1.1


def test_numbers_of_parameters_and_of_those_that_are_active() -> None:
    sparse, dense = (Workload.of_transformer(shape(experts=experts), 1, 8) for experts in (4, 0))
    matrices = 3 * 8 * WIDTH
    assert sparse.num_parameters - dense.num_parameters == 2 * (3 * matrices + 4 * WIDTH)
    assert shape(experts_per_token=3).idle_parameters == 2 * matrices and shape(experts=0).idle_parameters == 0
    assert sum(one.numel() for one in Transformer(shape()).parameters()) == sparse.num_parameters


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="experts_per_token 5 is more than the 4 experts"):
        shape(experts_per_token=5)
    with pytest.raises(UserError, match="matrices of experts are not split"):
        shape().check_tensor(2)
    with pytest.raises(UserError, match="one MLP a block"):
        names_of(shape())
