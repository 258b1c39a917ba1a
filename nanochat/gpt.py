"""The GPT model: the architecture, only that, readable top to bottom.

What it has: rotary positions, QK norm, RMS norms without weights, squared-ReLU MLP, grouped key/value heads, sliding
windows, untied head with a softcap, no biases; and four tricks that each are one field of the config: smear (mix in the
previous token's embedding), residual mixing (blend the first embedding into every layer), value embeddings (a token
table that adds to the attention values) and backout (subtract the middle of the residual stream at the end).
`GPTConfig.original(…)` is the architecture of October 2025, without the tricks.

Letters: B batch, T tokens, C width, H query heads, K key/value heads, D head dim, V vocabulary, L layers.
Start reading at `GPT.forward`. The mathematics is nanochat's (github.com/karpathy/nanochat), and so are the names in
the state dict: checkpoints carry over.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from kernels import (
    add_rms_norm,
    embedding,
    flash_attention,
    fp8_add_rms_norm,
    fp8_linear,
    fp8_mix_rms_norm,
    fp8_mlp_relu2,
    linear_cross_entropy,
    mix_rms_norm,
    mlp_relu2,
    qk_norm_rotary,
    rms_norm,
)
from kernels.fp8 import Quantized, new_history, plain
from kernels.fp8.quantize import FP8_ROW
from kernels.linears import linears
from nanochat import optim


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and tricks. Raises ValueError when they do not fit together."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6  # query heads, H
    n_kv_head: int = 6  # key/value heads, K: H must be a multiple
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers: L sees everything, S a quarter; the last layer is always L
    rope_base: float = 100_000.0
    qk_scale: float = 1.2  # multiplies q and k after their norm: sharper attention
    softcap: float = 15.0
    smear: bool = True
    residual_mix: bool = True
    value_embeds: bool = True
    backout: bool = True
    original_init: bool = False  # the initial distributions of October 2025

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}, wanted at least 1")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"GPTConfig: n_embd {self.n_embd} over n_head {self.n_head} is not an even head dim")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"GPTConfig: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"GPTConfig: window_pattern is {self.window_pattern!r}, wanted letters S and L")

    @classmethod
    def original(cls, **sizes: Any) -> "GPTConfig":
        """The architecture of October 2025 (the published d20, d32 and d34 checkpoints)."""
        plain = dict(window_pattern="L", rope_base=10_000.0, qk_scale=1.0, original_init=True)
        tricks = dict(smear=False, residual_mix=False, value_embeds=False, backout=False)
        return cls(**{**plain, **tricks, **sizes})

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64  # matrix products like multiples of 64

    def window(self, layer: int) -> int | None:
        """How many keys before itself a query of this layer sees; None for all."""
        if layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return None
        return -(-self.sequence_len // 4 // 128) * 128

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


class Cache(Protocol):
    """What the model needs of a KV cache (see nanochat/engine/cache.py, nanochat/evaluate/core_batches.py)."""

    start: Tensor  # (B,) int64: the position of the first new token of each row
    previous: Tensor  # (B, 1, C): embedding of the token before it, zeros at the beginning; the model replaces it

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Keeps the new keys and values (B, T, K, D); attention of q (B, T, H, D) over what each sees: (B, T, H, D)."""
        ...


class Linear(nn.Linear):
    """No bias; the float32 master weight is cast to the activation's dtype at use, or rounded to fp8 (GPT.set_fp8)."""

    history: Tensor | None
    shadow: Tensor | None = None  # the weight in the compute dtype, where it is cast once a step (GPT.keep_shadows)
    gradient: Tensor | None = None  # the float32 weight's, where backward adds to it itself

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.fp8 = False
        self.register_buffer("history", None, persistent=False)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight, self.history)
        return together(x, self)[0]

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight to multiply with."""
        return self.weight.to(dtype) if self.shadow is None else self.shadow


def together(x: Tensor | Quantized, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of the layers makes of one input, or of as many of its channels as it reads."""
    int8 = not isinstance(layers[0], Linear)  # an engine's
    if int8 or (layers[0].fp8 and layers[0].training):
        return tuple(layer(x) for layer in layers)
    x = plain(x)
    return linears(x, *(layer.cast(x.dtype) for layer in layers), gradients=kept(*layers))


def kept(*layers: Linear) -> tuple[Tensor, ...]:
    """The gradients of their weights to which backward adds; none where it gives them to autograd."""
    return tuple(layer.gradient for layer in layers if layer.gradient is not None)


class Embedding(nn.Embedding):
    """A table of rows by token."""

    gradient: Tensor | None = None  # where backward adds the rows that occur (GPT.keep_gradients)

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, self.gradient)


SMEAR_CHANNELS = 24  # how many channels the smear gate reads
VE_GATE_CHANNELS = 12  # how many channels a value embedding's gate reads


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.c_q = Linear(C, H * D)
        self.c_k = Linear(C, K * D)
        self.c_v = Linear(C, K * D)
        self.c_proj = Linear(C, C)
        self.ve_gate = Linear(VE_GATE_CHANNELS, K) if config.has_value_embed(layer) else None  # of h's first channels

    def forward(
        self, h: Tensor | Quantized, ve: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> Tensor:
        B, T, _ = plain(h).shape
        D, window = self.config.head_dim, self.config.window(self.layer)
        layers = [self.c_q, self.c_k, self.c_v, *([] if self.ve_gate is None else [self.ve_gate])]
        q, k, v, *gates = together(h, *layers)
        q, k, v = (y.view(B, T, -1, D) for y in (q, k, v))  # (B, T, H or K, D)
        if ve is not None:
            gate = 3 * torch.sigmoid(gates[0])  # (B, T, K), range (0, 3)
            v = v + gate[..., None] * ve.view(B, T, -1, D)
        q, k = qk_norm_rotary(q, k, cos, sin, self.config.qk_scale)
        if cache is None:
            y = flash_attention(q, k, v, window=window)
        else:
            y = cache.attend(self.layer, q, k, v, window)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    history: Tensor | None

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.fp8 = False
        self.register_buffer("history", None, persistent=False)

    def forward(self, h: Tensor | Quantized) -> Tensor:
        if self.fp8 and self.training:
            return fp8_mlp_relu2(h, self.c_fc.weight, self.c_proj.weight, self.history)
        h = plain(h)
        return mlp_relu2(h, self.c_fc.cast(h.dtype), self.c_proj.cast(h.dtype), kept(self.c_fc, self.c_proj))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, h: Tensor | Quantized, ve: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """x and what the MLP adds to it: whoever comes next does that in passing."""
        norm = fp8_add_rms_norm if self.mlp.fp8 and self.training else add_rms_norm
        x, h = norm(x, self.attn(h, ve, cos, sin, cache))
        return x, self.mlp(h)


class GPT(nn.Module):
    """May be built on the meta device; call `init_weights()` (or load a state dict and `set_dtype`) before use."""

    cos: Tensor
    sin: Tensor
    transformer: Any  # a ModuleDict of wte and h: names that the state dict needs
    value_embeds: Any

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # of the activations; see set_dtype
        self.fp8 = False  # whether training multiplies in fp8; see set_fp8
        V, C, L = config.padded_vocab_size, config.n_embd, config.n_layer
        self.transformer = nn.ModuleDict(
            {"wte": Embedding(V, C), "h": nn.ModuleList(Block(config, i) for i in range(L))}
        )
        self.lm_head = Linear(C, V)
        if config.residual_mix:
            self.resid_lambdas = nn.Parameter(torch.ones(L))
            self.x0_lambdas = nn.Parameter(torch.zeros(L))
        if config.smear:
            self.smear_gate = Linear(min(SMEAR_CHANNELS, C), 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(V, config.n_kv_head * config.head_dim) for i in range(L) if config.has_value_embed(i)}
        )
        half = (config.sequence_len, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(half), persistent=False)
        self.register_buffer("sin", torch.empty(half), persistent=False)

    # ---- setting up

    @torch.no_grad()
    def init_weights(self, dtype: torch.dtype = torch.float32) -> None:
        """Draws all parameters (from torch's global generator) and sets the dtype of the activations.

        | parameter                  | today                 | original                          |
        |----------------------------|-----------------------|-----------------------------------|
        | wte                        | N(0, 0.8)             | N(0, 1)                           |
        | lm_head                    | N(0, 0.001)           | 0                                 |
        | c_q, c_k, c_v, value embed | U(±s), s = √3/√C      | N(0, min(1, √(out/in))/√in)       |
        | c_fc                       | U(±0.4 s)             | N(0, min(1, √(out/in))/√in)       |
        | both c_proj                | 0                     | 0                                 |
        | smear_gate, ve_gate        | U(0, 0.02)            |                                   |
        | resid, x0 lambdas          | 1.15 → 1.05, 0.2 → 0.05 over the layers |                 |
        | smear, backout lambda      | 0, 0.2                |                                   |
        """
        config = self.config
        L, s = config.n_layer, math.sqrt(3 / config.n_embd)

        def linear_(weight: Tensor, bound: float) -> None:
            if config.original_init:
                out, fan_in = weight.shape
                nn.init.normal_(weight, std=min(1.0, math.sqrt(out / fan_in)) / math.sqrt(fan_in))
            else:
                nn.init.uniform_(weight, -bound, bound)

        nn.init.normal_(self.transformer["wte"].weight, std=1.0 if config.original_init else 0.8)
        nn.init.normal_(self.lm_head.weight, std=0.0 if config.original_init else 0.001)
        for block in self.transformer["h"]:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear_(linear.weight, s)
            linear_(block.mlp.c_fc.weight, 0.4 * s)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -s, s)
        depth = torch.arange(L) / max(L - 1, 1)  # 0 at the first layer, 1 at the last
        if config.residual_mix:
            self.resid_lambdas.copy_(1.15 - 0.10 * depth)
            self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        if config.smear:
            nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
            nn.init.zeros_(self.smear_lambda)
        if config.backout:
            nn.init.constant_(self.backout_lambda, 0.2)
        self.set_dtype(dtype)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Sets the activations' dtype, keeps the embeddings in it (float32 for float16), fills the rotary tables."""
        self.dtype = dtype
        kept = torch.float32 if dtype == torch.float16 else dtype
        for table in self.tables():
            table.to(kept)
        self.set_positions(self.cos.size(0))

    def set_positions(self, count: int) -> None:
        """Fills the rotary tables for so many positions. Training and chat have sequence_len; scoring may want more."""
        device, half = self.lm_head.weight.device, self.config.head_dim // 2
        inv_freq = self.config.rope_base ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(count, device=device, dtype=torch.float32), inv_freq)  # (count, D/2)
        self.cos, self.sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def set_fp8(self, scaling: str) -> None:
        """Multiplies in fp8 while training (not in eval mode): all matrices of the blocks, and the head; no gate.

        scaling: "current" or "delayed" (kernels/fp8/quantize.py). Raises ValueError when the width is no multiple of
        FP8_ROW.
        """
        if scaling not in ("current", "delayed"):
            raise ValueError(f"GPT: fp8 scaling is {scaling!r}, wanted current or delayed")
        if self.config.n_embd % FP8_ROW or self.config.n_kv_head * self.config.head_dim % FP8_ROW:
            raise ValueError(f"GPT: a width of {self.config.n_embd} is no multiple of {FP8_ROW}, which fp8 wants")
        self.fp8 = True
        device = self.lm_head.weight.device
        for block in self.transformer["h"]:
            attn, mlp = block.attn, block.mlp
            for module, rows in ((attn.c_q, 3), (attn.c_k, 3), (attn.c_v, 3), (attn.c_proj, 3), (mlp, 6)):
                module.fp8 = True
                module.history = new_history(rows, device) if scaling == "delayed" else None

    def histories(self) -> dict[str, Tensor]:
        """The maxima that delayed scaling remembers, by name; empty otherwise."""
        return {name: buffer for name, buffer in self.named_buffers() if name.endswith(".history")}

    def setup_optimizer(self, **settings: Any) -> "optim.MuonAdamW":
        """Muon for the blocks' matrices, AdamW for the rest; settings as `nanochat.optim.parameter_groups`."""
        return optim.MuonAdamW(optim.parameter_groups(self, **settings), self.dtype)

    def keep_shadows(self, optimizer: "optim.MuonAdamW") -> None:
        """Has the weights of blocks and head cast once a step, by the optimizer, and not at every use. Call it before
        compiling.

        The same results to the bit, with less memory traffic: predicted to pay on GPUs. Not for fp8, which rounds the
        float32 weights themselves. Where gradients are kept, the products that make those of matrices add to them.
        """
        self.lm_head.shadow = optimizer.shadow(self.lm_head.weight, self.dtype)
        for module in self.transformer["h"].modules():
            if isinstance(module, Linear):
                module.shadow = optimizer.shadow(module.weight, self.dtype)
                if module.in_features > VE_GATE_CHANNELS:  # a gate's are a hundred numbers
                    module.gradient = module.weight.grad

    def keep_gradients(self, optimizer: "optim.MuonAdamW") -> None:
        """Has backward add to gradients that stay where they are: to the head's in one pass, to the tables' only the
        rows that occur.

        As exact as gradients made anew to be added, with less memory traffic: predicted to pay on GPUs. Call it before
        compiling.
        """
        optimizer.keep_gradients()
        self.lm_head.gradient = self.lm_head.weight.grad
        for table in self.tables():
            table.gradient = table.weight.grad

    def tables(self) -> "list[Embedding]":
        """What is looked up by token: the embedding, and the value embeddings."""
        return [self.transformer["wte"], *self.value_embeds.values()]

    # ---- running

    def embedded(self, token: int | Tensor) -> Tensor:
        """(1, C), of N tokens (1, N, C): normed embeddings before the smear, as a cache keeps them for what follows."""
        return rms_norm(self.transformer["wte"].weight[token].to(self.dtype))[None]

    def embed(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Normed token embeddings with the smear: (B, T) ids to (B, T, C)."""
        x = rms_norm(self.transformer["wte"](idx).to(self.dtype))
        if not self.config.smear:
            return x
        before = torch.zeros_like(x[:, :1]) if cache is None else cache.previous
        if cache is not None:
            cache.previous = x[:, -1:]
        before = torch.cat((before, x[:, :-1]), dim=1)  # x of the token before, nothing before the first
        gate = torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))  # (B, T, 1)
        return x + self.smear_lambda.to(x.dtype) * gate * before

    def hidden(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Everything but the head: (B, T) ids to the final normed activations (B, T, C)."""
        T, config = idx.size(1), self.config
        if T > config.sequence_len:
            raise ValueError(f"GPT: {T} tokens are more than the model's sequence_len {config.sequence_len}")
        if cache is None:
            cos, sin = self.cos[:T], self.sin[:T]  # (T, D/2)
        else:
            position = cache.start[:, None] + torch.arange(T, device=idx.device)  # (B, T)
            cos, sin = self.cos[position], self.sin[position]  # (B, T, D/2)
        x = x0 = self.embed(idx, cache)
        middle, delta = x, None  # delta is still to be added to x
        for i, block in enumerate(self.transformer["h"]):
            if config.residual_mix:
                mix = fp8_mix_rms_norm if self.fp8 and self.training else mix_rms_norm
                x, h = mix(x, x0, self.resid_lambdas, self.x0_lambdas, delta, i)
            elif delta is None:
                h = rms_norm(x)
            else:
                x, h = add_rms_norm(x, delta)
            ve = self.value_embeds[str(i)](idx).to(self.dtype) if config.has_value_embed(i) else None
            x, delta = block(x, h, ve, cos, sin, cache)
            if i == config.n_layer // 2 and config.backout:
                x, delta = x + delta, None
                middle = x
        x = x if delta is None else x + delta
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        return rms_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Head and softcap on (..., C) from `hidden`: (..., V) float32."""
        logits = self.lm_head(x)[..., : self.config.vocab_size].float()
        return self.config.softcap * torch.tanh(logits / self.config.softcap)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, loss_reduction: str = "mean"
    ) -> Tensor:
        """idx (B, T) int64 to logits (B, T, V) float32, or with targets (B, T; −1 ignored) to the loss.

        loss_reduction: "mean", "sum", or "none" for (B, T) losses in nats.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        head, words = self.lm_head, self.config.vocab_size  # the padding rows are no words
        loss = linear_cross_entropy(
            x.flatten(0, 1),
            (head.weight if head.shadow is None else head.shadow)[:words],
            targets.flatten(),
            self.config.softcap,
            reduction=loss_reduction,
            fp8=self.fp8 and self.training,
            gradient=None if head.gradient is None else head.gradient[:words],
        )
        return loss.view_as(targets) if loss_reduction == "none" else loss

    @torch.inference_mode()
    def generate(
        self,
        tokens: list[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:
        """Yields up to max_tokens ids that continue `tokens`; the plain way, without a cache (the engine is faster).

        temperature 0 takes the likeliest token; top_k limits the choice. The context is the last sequence_len tokens.
        """
        device = self.lm_head.weight.device
        generator = torch.Generator(device=device).manual_seed(seed)
        tokens = list(tokens)
        for _ in range(max_tokens):
            context = torch.tensor([tokens[-self.config.sequence_len :]], device=device)
            logits = self.logits(self.hidden(context)[:, -1])  # (1, V)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                if top_k is not None:
                    kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kept, -math.inf)
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
            tokens.append(token)
            yield token
