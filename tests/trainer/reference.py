"""Decoders as plain float64 equations: one sequence, one head, one token at a time.

Written from the papers and the released code, not from `foreshock.trainer`; slow on purpose.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from foreshock.trainer.config import ModelConfig

Weights = Mapping[str, Tensor]
"""Of one model, or of one layer; names as in the model."""

EPS = 1e-5
GATED = ("llama3", "llama3_smooth_swiglu", "llama3_smooth_swiglu_token", "olmo2", "fog_swiglu")


def unit(z: Tensor) -> Tensor:
    return z / (z.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def rotated(z: Tensor) -> Tensor:
    """(T, K): pairs (2j, 2j + 1) turned by position times 500000^(-2j/K)."""
    width = z.shape[-1]
    rows = []
    for position, row in enumerate(z):
        turned = []
        for j in range(width // 2):
            angle = position * 500_000.0 ** (-2 * j / width)
            a, b = row[2 * j], row[2 * j + 1]
            turned.append(a * math.cos(angle) - b * math.sin(angle))
            turned.append(a * math.sin(angle) + b * math.cos(angle))
        rows.append(torch.stack(turned))
    return torch.stack(rows)


def in_bounds(config: ModelConfig, w: Weights, which: str, heads: Tensor) -> Tensor:
    """(heads, T, K), which is query or key."""
    kind = config.architecture
    if kind == "fog_flash":
        return (w[f"attention.regulariser.{which}_alpha"] * heads).tanh()
    if kind == "op":
        return w[f"attention.regulariser.{which}_gain"] * unit(heads)
    if kind == "olmo2":
        whole = torch.cat(list(heads), -1)
        gain = w[f"attention.regulariser.{which}_norm.gain"]
        return torch.stack((gain * unit(whole)).chunk(len(heads), -1))
    return unit(heads) if kind.startswith("fog") else heads


def attention(config: ModelConfig, w: Weights, x: Tensor) -> Tensor:
    """(T, D)."""
    width, queries, keys = config.width // config.heads, config.heads, config.kv_heads
    columns = torch.split(x @ w["attention.qkv.weight"].T, width, -1)
    q = in_bounds(config, w, "query", torch.stack(columns[:queries]))
    k = in_bounds(config, w, "key", torch.stack(columns[queries : queries + keys]))
    v = columns[queries + keys :]
    # 0.125 at 128 and never a logit above 16, or the usual 1/sqrt(K).
    fog = config.architecture.startswith("fog")
    scale = min(math.sqrt(2 / width), 16 / width) if fog else 1 / math.sqrt(width)
    mixed = []
    for head in range(queries):
        group = head * keys // queries
        qh, kh = rotated(q[head]), rotated(k[group])
        rows = []
        for t in range(len(x)):
            p = torch.softmax(scale * (kh[: t + 1] @ qh[t]), 0)
            rows.append(p @ v[group][: t + 1])
        mixed.append(torch.stack(rows))
    return torch.cat(mixed, -1) @ w["attention.out.weight"].T


def xielu(w: Weights, name: str, z: Tensor) -> Tensor:
    a_p = torch.log(1 + w[f"{name}.activation.p"].exp())
    a_n = 0.5 + torch.log(1 + w[f"{name}.activation.n"].exp())
    low = torch.where(z > 0, torch.zeros_like(z), z)
    below = a_n * (low.exp() - 1 - low) + 0.5 * low
    return torch.where(z > 0, a_p * z * z + 0.5 * z, below)


def xielu_mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return xielu(w, name, x @ w[f"{name}.up.weight"].T) @ w[f"{name}.down.weight"].T


def mlp(config: ModelConfig, w: Weights, x: Tensor) -> Tensor:
    """(T, D), by architecture; Smooth-SwiGLU is SwiGLU where nothing is cast."""
    kind = config.architecture
    if kind in GATED:
        gate = x @ w["mlp.gate.weight"].T
        hidden = gate * torch.sigmoid(gate) * (x @ w["mlp.up.weight"].T)
        return hidden @ w["mlp.down.weight"].T
    if kind == "fog_max":
        return xielu_mlp(w, "mlp", x)
    if kind == "fog_moe":
        return torch.stack([experts(config, w, row) for row in x])
    z = x @ w["mlp.up.weight"].T
    hidden = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    return hidden @ w["mlp.down.weight"].T


def best_of(config: ModelConfig, w: Weights, x: Tensor) -> list[int]:
    """Experts of one token, of the highest router logits."""
    logits = (w["mlp.router"] @ x).tolist()
    return sorted(range(len(logits)), key=lambda e: -logits[e])[: config.experts_per_token]


def experts(config: ModelConfig, w: Weights, x: Tensor) -> Tensor:
    """(D,), for one token."""
    logits = w["mlp.router"] @ x
    chosen = best_of(config, w, x)
    total = sum(logits[e].exp() for e in chosen)
    parts = [logits[e].exp() / total * xielu_mlp(w, f"mlp.experts.{e}", x) for e in chosen]
    return torch.stack(parts).sum(0)


def balance(config: ModelConfig, w: Weights, rows: Tensor) -> Tensor:
    """E sum_e f_e P_e over the tokens (N, D) that a layer's experts see."""
    number = config.experts
    chosen = [e for row in rows for e in best_of(config, w, row)]
    mean = torch.softmax(rows @ w["mlp.router"].T, -1).mean(0)
    terms = [chosen.count(e) / len(chosen) * mean[e] for e in range(number)]
    return number * torch.stack(terms).sum()


def layer(
    config: ModelConfig, w: Weights, x: Tensor, see: Callable[[Tensor], None] = lambda _: None
) -> Tensor:
    """(T, D); `see` is shown what the feed-forward gets."""
    kind, small = config.architecture, 1 / math.sqrt(config.layers)
    if kind.startswith("llama3"):
        h = x + attention(config, w, w["attention_norm.gain"] * unit(x))
        return h + mlp(config, w, w["mlp_norm.gain"] * unit(h))
    if kind == "op":
        h = x + small * attention(config, w, x)
        return h + small * mlp(config, w, h)
    h = x + w["attention_norm.gain"] * unit(attention(config, w, x))
    see(h)
    return h + w["mlp_norm.gain"] * unit(mlp(config, w, h))


def loss(config: ModelConfig, w: Weights, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of tokens (B, T), and what is added to it in the gradient (experts)."""
    total = torch.zeros((), dtype=torch.float64)
    seen: list[list[Tensor]] = [[] for _ in range(config.layers)]
    for sequence, following in zip(tokens, targets, strict=True):
        logits = logits_of(config, w, sequence, seen)
        total = total + functional.cross_entropy(logits, following, reduction="sum")
    extra = torch.zeros((), dtype=torch.float64)
    if config.architecture == "fog_moe":
        for number in range(config.layers):
            own = of_layer(w, number)
            extra = extra + config.balance * balance(config, own, torch.cat(seen[number]))
    return total / tokens.numel(), extra


def of_layer(w: Weights, number: int) -> Weights:
    start = f"blocks.{number}."
    return {name.removeprefix(start): v for name, v in w.items() if name.startswith(start)}


def logits_of(
    config: ModelConfig, w: Weights, sequence: Tensor, seen: list[list[Tensor]]
) -> Tensor:
    """(T, vocabulary) of one sequence (T,)."""
    kind = config.architecture
    x = w["embedding"][sequence]
    if kind == "op" or kind.startswith("fog"):
        x = x / config.init_std
    for number in range(config.layers):
        x = layer(config, of_layer(w, number), x, seen[number].append)
    if not kind.startswith("fog"):
        x = w["norm.gain"] * unit(x)
    return x @ w["embedding" if config.tied else "head"].T
