"""Llama and GPT-2 in plain PyTorch: what `llmjax bench --torch` measures beside ours. Needs the extra `torch`.

Written as their authors did: separate products, `scaled_dot_product_attention`, AdamW, one precision context.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmjax.models.attention import RopeScaling
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.run import Run


def attend(q_BTC: torch.Tensor, k_BTC: torch.Tensor, v_BTC: torch.Tensor, width: int, turn: Callable) -> torch.Tensor:
    """Causal attention of heads of this width, [B, T, H·K]; `turn` rotates queries and keys [B, H, T, K]."""
    q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q_BTC, k_BTC, v_BTC))
    shared = q.shape[1] != k.shape[1]
    o_BHTK = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=shared)
    return o_BHTK.transpose(1, 2).flatten(2)


def angles(positions: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Rotation angles [T, K/2]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:
        turns = scaling.original * frequency / (2 * math.pi)
        keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return torch.arange(positions).float()[:, None] * frequency[None]


def rotate(x_BHTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (k, k + K/2)."""
    a, b = x_BHTK.float().chunk(2, -1)
    return torch.cat([a * cos_TK - b * sin_TK, b * cos_TK + a * sin_TK], -1).type_as(x_BHTK)


class LlamaBlock(nn.Module):
    def __init__(self, c: Llama):
        super().__init__()
        linear, self.head_dim, keys = nn.Linear, c.head_dim, c.kv_heads * c.head_dim
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(c.width, c.epsilon) for _ in range(2))
        self.query = linear(c.width, c.heads * c.head_dim, bias=False)
        self.key, self.value = (linear(c.width, keys, bias=False) for _ in range(2))
        self.out = linear(c.heads * c.head_dim, c.width, bias=False)
        self.gate, self.up = (linear(c.width, c.ff, bias=False) for _ in range(2))
        self.down = linear(c.ff, c.width, bias=False)

    def forward(self, x, turn):
        h = self.attention_norm(x)
        x = x + self.out(attend(self.query(h), self.key(h), self.value(h), self.head_dim, turn))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT2Block(nn.Module):
    def __init__(self, c: GPT2):
        super().__init__()
        self.head_dim, inner = c.head_dim, c.heads * c.head_dim
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(c.width, c.epsilon) for _ in range(2))
        self.query, self.key, self.value = (nn.Linear(c.width, inner) for _ in range(3))
        self.out = nn.Linear(inner, c.width)
        self.up, self.down = nn.Linear(c.width, c.ff), nn.Linear(c.ff, c.width)

    def forward(self, x, turn):
        h = self.attention_norm(x)
        x = x + self.out(attend(self.query(h), self.key(h), self.value(h), self.head_dim, turn))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Model(nn.Module):
    """`(tokens, targets) -> mean cross-entropy` of a Llama or a GPT-2."""

    def __init__(self, c: Llama | GPT2, sequence: int):
        super().__init__()
        llama = isinstance(c, Llama)
        self.embed = nn.Embedding(c.vocab, c.width)
        self.position = None if llama else nn.Embedding(c.positions, c.width)
        self.blocks = nn.ModuleList((LlamaBlock if llama else GPT2Block)(c) for _ in range(c.layers))
        self.final_norm = (nn.RMSNorm if llama else nn.LayerNorm)(c.width, c.epsilon)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)
        if not llama or c.tied:
            self.head.weight = self.embed.weight
        if llama:
            turns = angles(sequence, c.head_dim, c.theta, c.scaling)
            self.register_buffer("cos", turns.cos()), self.register_buffer("sin", turns.sin())

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens_BT)
        if self.position is not None:
            x = x + self.position.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x = block(x, self.turn)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten())

    def turn(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        return rotate(x_BHTK, self.cos, self.sin) if self.position is None else x_BHTK


def optimizer(run: Run, model: Model) -> torch.optim.Optimizer:
    """The run's AdamW, in one kernel; scales and biases do not decay."""
    adam, weights = run.optimizer, list(model.parameters())
    groups = [
        dict(params=[w for w in weights if w.ndim > 1], weight_decay=adam.weight_decay),
        dict(params=[w for w in weights if w.ndim < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=adam.lr, betas=(adam.b1, adam.b2), eps=adam.epsilon, fused=True)


def stepper(run: Run, compiled: bool) -> Callable[[], None]:
    """A function that takes one train step on random tokens and waits for it.

    The batch is cut as `accumulate` says, and is one piece where it does not.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bfloat16 = run.dtype != "float32" and (run.dtype != "auto" or device == "cuda")
    model = Model(run.model, run.sequence).to(device)
    adam, pieces = optimizer(run, model), max(run.accumulate, 1)
    loss = torch.compile(model) if compiled else model
    rows = np.random.default_rng(run.seed).integers(0, run.model.vocab, (pieces, run.batch // pieces, run.sequence + 1))
    batch = torch.from_numpy(rows).to(device)

    def step() -> None:
        for piece in batch:
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                mean = loss(piece[:, :-1].contiguous(), piece[:, 1:].contiguous())
            (mean / pieces).backward()
        if run.clip:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step
