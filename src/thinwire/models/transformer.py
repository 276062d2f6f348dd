"""A plain decoder-only transformer: pre-norm, causal attention, no biases, nothing parallel in it.

    x = embed(tokens) (+ positions);   per block:  x += out(attention(qkv(norm(x))));   x += down(act(up(norm(x))))
    logits = norm(x) @ head.T          (head = embed when tied)

Rotary positions: Su et al. 2021 (arXiv 2104.09864); grouped queries: Ainslie et al. 2023 (arXiv 2305.13245); SwiGLU:
Shazeer 2020 (arXiv 2002.05202). Weights start as in GPT-2 and Llama: normal with deviation `init_std` (there 0.02), and
init_std / sqrt(2 layers) where a matrix writes into the residual stream.

Modules are registered in the order of the forward pass and the projections are fused, so that gradients become ready in
exactly the reverse of `model.parameters()`, as an exchange overlapped with the backward pass needs them. This file
needs torch only and can be loaded by its path; `config` is anything with the fields of `ModelConfig`.

Shapes: B batch, L sequence, M width, N heads of queries, K heads of keys and values, D head width, F hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from thinwire.config.model import ModelConfig

NORM_EPSILON = 1e-5


class Attention(nn.Module):
    """Causal self-attention with `heads` queries that share `kv_heads` keys and values. `attend` may be replaced."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.width // config.heads
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention

    def forward(self, x_BLM: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, _ = x_BLM.shape
        qkv = self.qkv(x_BLM).view(batch, length, self.heads + 2 * self.kv_heads, self.head_width)
        qk, v_BLKD = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if rotation is not None:
            qk = rotate(qk, *rotation)
        q_BLND, k_BLKD = qk.split([self.heads, self.kv_heads], dim=2)
        # transposed last: the kernel's output takes this layout, so flatten copies nothing
        y_BNLD = self.attend(q_BLND.transpose(1, 2), k_BLKD.transpose(1, 2), v_BLKD.transpose(1, 2))
        return self.out(y_BNLD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) with gate and up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.width, config.hidden * (2 if self.gated else 1), bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BLM: Tensor) -> Tensor:
        up = self.up(x_BLM)
        if self.gated:
            gate_BLF, up_BLF = up.chunk(2, dim=-1)
            return self.down(F.silu(gate_BLF) * up_BLF)
        return self.down(F.gelu(up, approximate="tanh"))


class Block(nn.Module):
    """Attention, then the MLP or some of several (`experts`), each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = _mlp_or_experts(config)

    def forward(self, x_BLM: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x_BLM = x_BLM + self.attention(self.attention_norm(x_BLM), rotation)
        return x_BLM + self.mlp(self.mlp_norm(x_BLM))


def _mlp_or_experts(config: ModelConfig) -> nn.Module:
    if not config.experts:
        return MLP(config)
    from thinwire.models.experts import Experts  # which needs the MLP; and so this file is enough without experts

    return Experts(config)


class Transformer(nn.Module):
    """forward(tokens_BL) gives logits_BLV; with `targets_BL` it gives the mean cross-entropy in nats, in float32 or
    float64 if the weights are. Its gradient is that of the cross-entropy and what balances experts, if there are any.

    Targets of -100 do not count; `loss` may be replaced. There are no buffers: built on `torch.device("meta")`, the model is
    complete after `to_empty` and `init_weights`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws every weight anew, in the order of registration."""
        init_std = self.config.init_std
        residual_std = init_std / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith((".out.weight", ".down.weight")) else init_std
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor | None = None) -> Tensor:
        x_BLM = embed(tokens_BL, self.embed, self.positions, self.config)
        rotation = rotation_of(x_BLM, self.config)
        for block in self.blocks:
            x_BLM = block(x_BLM, rotation)
        logits_BLV = project(x_BLM, self.norm, self.embed if self.head is None else self.head)
        if targets_BL is None:
            return logits_BLV
        loss = self.loss(logits_BLV, targets_BL)
        if not self.config.experts or not torch.is_grad_enabled():
            return loss
        blocks: Any = self.blocks
        balance = torch.stack([block.mlp.taken_balance() for block in blocks]).mean()
        return loss + self.config.balance * (balance - balance.detach())


def embed(
    tokens_BL: Tensor,
    embedding: nn.Embedding,
    positions: nn.Embedding | None,
    config: ModelConfig,
    position_L: Tensor | None = None,
) -> Tensor:
    """What the first block gets, x_BLM. position_L: of the tokens; None: 0, 1, .."""
    length = tokens_BL.shape[1]
    if length > config.context:
        raise ValueError(f"a sequence of {length} tokens is longer than the context of {config.context}")
    x_BLM = embedding(tokens_BL)
    if positions is None:
        return x_BLM
    return x_BLM + positions(torch.arange(length, device=tokens_BL.device) if position_L is None else position_L)


def project(x_BLM: Tensor, norm: nn.Module, head: nn.Embedding | nn.Linear) -> Tensor:
    """What the last block gives, to logits_BLV. head: with the weight [V, M], which may be the embedding's."""
    return F.linear(norm(x_BLM), head.weight)


def causal_attention(q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
    """Each token's mean of the values up to its own, y_BNLD, weighted by softmax(q k' / sqrt(D)); N is a multiple of K."""
    grouped = q_BNLD.shape[1] != k_BKLD.shape[1]
    return F.scaled_dot_product_attention(q_BNLD, k_BKLD, v_BKLD, is_causal=True, enable_gqa=grouped)


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Mean over the targets that count, in nats; in float32, or float64 if the logits are."""
    precise = torch.promote_types(logits_BLV.dtype, torch.float32)
    return F.cross_entropy(logits_BLV.flatten(0, 1).to(precise), targets_BL.flatten())


def make_norm(config: ModelConfig) -> nn.Module:
    """RMSNorm or LayerNorm over the width, with a gain and no bias."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=NORM_EPSILON)
    return nn.LayerNorm(config.width, eps=NORM_EPSILON, bias=False)


def rotation_of(x_BLM: Tensor, config: ModelConfig, position_L: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """What every block gets beside x: the rotation of its positions (None: 0, 1, ..), None if positions are learned."""
    if config.positions != "rotary":
        return None
    if position_L is None:
        position_L = torch.arange(x_BLM.shape[1], device=x_BLM.device)
    return make_rotation(position_L, config.width // config.heads, config.rotary_base, x_BLM)


def make_rotation(position_L: Tensor, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position and pair, each [L, 1, D/2], in the dtype and on the device of `like`.

    Made in each forward pass (once for all blocks): cheap beside one block, and the model needs no buffers.
    """
    precise = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_width, 2, device=like.device, dtype=precise) / head_width
    angle = torch.outer(position_L.to(precise), base**-exponent)
    return angle.cos().to(like.dtype)[:, None], angle.sin().to(like.dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its position's angle; x is [B, L, heads, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
