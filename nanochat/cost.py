"""What a model costs: parameters, FLOPs and memory, counted from its shapes."""

from collections.abc import Sequence
from functools import cache

import torch

from nanochat.gpt import GPT, GPTConfig, Linear


def meta_model(config: GPTConfig) -> GPT:
    """The model without storage: shapes only."""
    with torch.device("meta"):
        return GPT(config)


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, and their "total"."""
    counts = dict(wte=0, value_embeds=0, lm_head=0, transformer_matrices=0, scalars=0)
    for name, p in meta_model(config).named_parameters():
        part = (
            "wte"
            if name.startswith("transformer.wte")
            else "transformer_matrices"
            if name.startswith("transformer.h")
            else name.split(".")[0]
        )
        counts[part if part in counts else "scalars"] += p.numel()
    return {**counts, "total": sum(counts.values())}


def scaling_params(config: GPTConfig) -> int:
    """The parameters that scaling laws are stated in: the blocks' matrices and the head."""
    counts = parameter_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


@cache
def linear_params(config: GPTConfig) -> int:
    """Weights that every token is multiplied by: those of all Linears."""
    return sum(m.weight.numel() for m in meta_model(config).modules() if isinstance(m, Linear))


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token as nanochat counts: 6 per parameter of a Linear, 12·H·D·min(window, T) per layer.

    Causality does not halve attention here and embeddings are free; see PaLM, arXiv:2204.02311, appendix B.
    """
    linears = linear_params(config)
    attention = 0
    for layer in range(config.n_layer):
        window = config.window(layer)
        keys = config.sequence_len if window is None else min(window, config.sequence_len)
        attention += 12 * config.n_head * config.head_dim * keys
    return 6 * linears + attention


def attended(config: GPTConfig, short: int | None = None) -> float:
    """Pairs of query and key per token, summed over the layers, exactly: causal, and within the window.

    In a window of W a query sees its own key and the W before it. `short`: a short window, where it is not the
    config's own.
    """
    T, pairs = config.sequence_len, 0.0
    for layer in range(config.n_layer):
        window = config.window(layer)
        most = T if window is None else min((short or window) + 1, T)  # keys of a query
        pairs += (most * (most + 1) / 2 + (T - most) * most) / T
    return pairs


def training_flops(config: GPTConfig) -> dict[str, float]:
    """Training FLOPs per token, counted in the three ways in which a share of the peak is given.

    mfu: as nanochat counts. mfu_causal: attention only for the pairs that causality and windows leave. hfu: what is
    executed of that, with what the backward computes a second time: attention's Q·Kᵀ (FlashAttention,
    arXiv:2205.14135: 5 products where 4 give the gradients). Nothing else is: the head makes its gradients in forward.
    The optimizer's products are in none of them.
    """
    exact = config.n_head * config.head_dim * attended(config)
    linears = 6 * linear_params(config)
    return dict(mfu=flops_per_token(config), mfu_causal=linears + 12 * exact, hfu=linears + 14 * exact)


def decode_cost(config: GPTConfig, keys: Sequence[int], itemsize: int) -> tuple[int, int]:
    """(FLOPs, bytes) of one decode step: every row a token. keys: how many each row has, its token's own among them.

    The bytes are the least that must be read: each Linear's weights once, and each row's keys and values in the window.
    """
    linears = linear_params(config)
    windows = [config.window(layer) for layer in range(config.n_layer)]
    seen = sum(count if window is None else min(window + 1, count) for window in windows for count in keys)
    flops = 2 * len(keys) * linears + 4 * config.n_embd * seen
    return flops, itemsize * (linears + 2 * config.n_kv_head * config.head_dim * seen)


def training_bytes(config: GPTConfig, tokens: int, world: int = 1) -> int:
    """Predicted memory of one rank for a micro-batch of `tokens`, compute dtype bfloat16.

    Float32 matrices with gradients (8 bytes a parameter) and bfloat16 embeddings (4), moments sharded over the ranks,
    and about 40 bytes per token, channel and layer of activations kept for the backward, 5 for the head's chunks apart.
    """
    counts = parameter_counts(config)
    matrices = counts["transformer_matrices"] + counts["lm_head"]
    embeddings = counts["wte"] + counts["value_embeds"]
    weights = 8 * matrices + 4 * embeddings + 2 * matrices  # the last: bfloat16 casts alive in the step
    moments = (4 * counts["transformer_matrices"] + 8 * counts["lm_head"] + 4 * embeddings) // world
    activations = tokens * config.n_embd * (40 * config.n_layer + 16)
    head = 4 * config.padded_vocab_size * config.n_embd + 4 * (1 << 23) * 4
    return weights + moments + activations + head
