"""A frozen plain nanochat: the step that ours is set against (`python -m profiling compiled --against plain`).

The model and the optimizer as a plain PyTorch author writes them for torch.compile: every weight is cast where it is
used, norms, rotary positions and residual mixing are left to Inductor, the MLP is relu().square(), and the loss is
taken of all logits in float32. Only attention is our kernel, on both sides, so that no ratio depends on it.

It follows nothing of nanochat/ or kernels/, so that a ratio changes only when our step does: do not change it. The
mathematics is nanochat's (github.com/karpathy/nanochat), as in gpt.py. Letters as there.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import flash_attention

SMEAR_CHANNELS, GATE_CHANNELS = 24, 12
COEFFICIENTS = [  # of Polar Express, arXiv:2505.16932, for five iterations
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """The float32 weight is cast where it is used."""

    def __init__(self, fan_in: int, out: int):
        super().__init__(fan_in, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D); cos, sin (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, C: int, H: int, K: int, D: int, window: int | None, gated: bool):
        super().__init__()
        self.D, self.window = D, window
        self.q, self.k, self.v, self.o = Linear(C, H * D), Linear(C, K * D), Linear(C, K * D), Linear(C, C)
        self.gate = Linear(GATE_CHANNELS, K) if gated else None

    def forward(self, h: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = h.shape
        q, k, v = (linear(h).view(B, T, -1, self.D) for linear in (self.q, self.k, self.v))
        if self.gate is not None and ve is not None:
            gate = 3 * torch.sigmoid(self.gate(h[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * ve.view(B, T, -1, self.D)
        q, k = (norm(rotary(x, cos, sin)) * 1.2 for x in (q, k))
        return self.o(flash_attention(q, k, v, window=self.window).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.up, self.down = Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.relu(self.up(h)).square())


class Block(nn.Module):
    def __init__(self, C: int, H: int, K: int, D: int, window: int | None, gated: bool):
        super().__init__()
        self.attn, self.mlp = Attention(C, H, K, D, window, gated), MLP(C)

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Of the sizes of a GPTConfig's fields; all its tricks are on. Tables and activations have `dtype`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Mapping[str, Any], dtype: torch.dtype):
        super().__init__()
        T, V, L, C = (sizes[name] for name in ("sequence_len", "vocab_size", "n_layer", "n_embd"))
        H, K = sizes["n_head"], sizes["n_kv_head"]
        D, padded, pattern = C // H, -(-V // 64) * 64, sizes["window_pattern"]
        short = -(-T // 4 // 128) * 128
        windows = [None if pattern[i % len(pattern)] == "L" or i == L - 1 else short for i in range(L)]
        gated = [i % 2 == (L - 1) % 2 for i in range(L)]
        self.V = V
        self.wte = nn.Embedding(padded, C, dtype=dtype)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(padded, K * D, dtype=dtype) for i in range(L) if gated[i]}
        )
        self.blocks = nn.ModuleList(Block(C, H, K, D, windows[i], gated[i]) for i in range(L))
        self.lm_head = Linear(C, padded)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(L)), nn.Parameter(torch.zeros(L))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(T, 1, D // 2, dtype=dtype))

    def embed(self, idx: Tensor) -> Tensor:
        x = norm(self.wte(idx))  # (B, T, C)
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        return torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)

    def hidden(self, idx: Tensor) -> Tensor:
        x = x0 = middle = self.embed(idx)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, ve, self.cos, self.sin)
            if i == len(self.blocks) // 2:
                middle = x
        return norm(x - self.backout_lambda.to(x.dtype) * middle)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Ids and targets (B, T) to the summed loss in nats."""
        logits = self.lm_head(self.hidden(idx))[..., : self.V].float()  # (B, T, V)
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


class MuonAdamW:
    """AdamW for tables and scalars, Muon for the blocks' matrices, stacked by shape. Rates are constants: of what is
    learnt nothing is asked.
    """

    def __init__(self, model: GPT):
        matrices = list(model.blocks.parameters())
        self.matrices = [
            [p for p in matrices if p.shape == shape] for shape in dict.fromkeys(p.shape for p in matrices)
        ]
        ours = {id(p) for p in matrices}
        self.others = [p for p in model.parameters() if id(p) not in ours]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.adamw = torch.compile(adamw_, dynamic=False, fullgraph=True)
        self.muon = torch.compile(muon_, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        for p in self.others:
            state = self.state.setdefault(p, {name: torch.zeros_like(p) for name in ("first", "second")})
            assert p.grad is not None
            self.adamw(p, p.grad, state["first"], state["second"])
        for group in self.matrices:
            stacked = torch.stack(list(group))  # (n, rows, columns)
            n, rows, columns = stacked.shape
            shape = (n, rows, 1) if rows >= columns else (n, 1, columns)
            state = self.state.setdefault(
                group[0], dict(momentum=torch.zeros_like(stacked), second=stacked.new_zeros(shape))
            )
            self.muon(stacked, torch.stack([p.grad for p in group]), state["momentum"], state["second"])  # type: ignore
            torch._foreach_copy_(list(group), list(stacked.unbind()))

    def zero_grad(self) -> None:
        for p in [*self.others, *sum(self.matrices, [])]:
            p.grad = None


def adamw_(p: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> None:
    wide, g = p.float() * (1 - 1e-3), grad.float()
    m, v = first.float().lerp(g, 0.2), second.float().lerp(g.square(), 0.05)
    p.copy_(wide - 1e-3 * m / (v.sqrt() + 1e-10))
    first.copy_(m)
    second.copy_(v)


def muon_(p: Tensor, grad: Tensor, momentum: Tensor, second: Tensor) -> None:
    """Nesterov momentum, Polar Express, NorMuon (arXiv:2510.05491), cautious decay; p and grad (n, rows, columns)."""
    momentum.lerp_(grad, 0.05)
    x = grad.lerp(momentum, 0.95).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in COEFFICIENTS:
        square = x.mT @ x if tall else x @ x.mT
        poly = b * square + c * (square @ square)
        x = a * x + (x @ poly if tall else poly @ x)
    g = x.float()
    axis = -1 if second.size(-1) == 1 else -2
    mean = g.square().mean(dim=axis, keepdim=True)
    second.lerp_(mean, 0.1)
    scale = second.clamp_min(1e-10).rsqrt()
    before, after = mean.sum(dim=(-2, -1), keepdim=True), (mean * scale.square()).sum(dim=(-2, -1), keepdim=True)
    g = g * (scale * (before / after.clamp_min(1e-20)).sqrt())
    p.sub_(1e-2 * (g + 1e-2 * p * (g * p >= 0)))
