"""One more token for every running row on a CPU: the model of gpt.py, written out for T = 1 and for little else.

A step of a small model is bound by reading the weights once and by the cost of starting operations, a few microseconds
each. So here: weights packed once for oneDNN (in bfloat16; q, k and v as one), scalars as numbers, one mask a step, no
mask at all for a single row, no module in between. tests/test_engine.py holds it to gpt.py's answers; prefill and GPUs
run gpt.py itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import default_eps
from nanochat.engine.cache import Slots
from nanochat.gpt import GPT


class Packed:
    """x·weightᵀ for few rows: oneDNN's own layout where it has one for the dtype, else as it is."""

    def __init__(self, weight: Tensor):
        weight = weight.detach().contiguous()
        self.packed = weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


def normed(x: Tensor, root: float, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, statistics in float32 at least; root = √(its size)."""
    wide = torch.float32 if x.dtype != torch.float64 else torch.float64
    length = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide)
    return (x * (root / (length + root * eps))).to(x.dtype)


class Layer:
    """What a step needs of a block."""

    def __init__(self, model: GPT, i: int):
        config, block = model.config, model.transformer["h"][i]
        attn, mlp = block.attn, block.mlp
        self.qkv = Packed(torch.cat([attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]))
        self.out, self.fc, self.proj = (Packed(linear.weight) for linear in (attn.c_proj, mlp.c_fc, mlp.c_proj))
        self.window = config.window(i)
        self.ve = self.gate = None
        if config.has_value_embed(i):
            self.ve, self.gate = model.value_embeds[str(i)].weight.detach(), attn.ve_gate.weight.detach()
        self.a, self.b = 1.0, 0.0
        if config.residual_mix:
            self.a, self.b = model.resid_lambdas[i].item(), model.x0_lambdas[i].item()


class Decoder:
    """Decode steps over the first rows of the slots. Copies the model's weights: change them, and make another."""

    @torch.inference_mode()
    def __init__(self, model: GPT, slots: Slots):
        self.config, self.slots, self.model = model.config, slots, model
        self.layers = [Layer(model, i) for i in range(model.config.n_layer)]
        self.head = Packed(model.lm_head.weight)
        self.eps = math.sqrt(default_eps(model.dtype)) * 1e-3  # added to the rms, not under its root
        self.rows = torch.arange(slots.k.size(1))
        self.positions = torch.arange(model.config.sequence_len)
        if model.config.smear:
            self.smear = model.smear_lambda.item()

    def __call__(self, tokens: list[int]) -> Tensor:
        """Raw logits (B, V), before the softcap, after one more token for each of the first B slots; they advance."""
        config, slots, model, eps = self.config, self.slots, self.model, self.eps
        B, H, K, D = len(tokens), config.n_head, config.n_kv_head, config.head_dim
        C, dtype = math.sqrt(config.n_embd), model.dtype
        idx, start = torch.tensor(tokens), torch.tensor(slots.lengths[:B])
        rows, seen = self.rows[:B], max(slots.lengths[:B]) + 1
        cos, sin = model.cos[start][:, None], model.sin[start][:, None]  # (B, 1, D/2)
        masks = self._masks(start, seen) if B > 1 else {}
        x = normed(model.transformer["wte"].weight[idx].to(dtype), C, eps)  # (B, C)
        if config.smear:
            gate = torch.sigmoid(F.linear(x[:, : model.smear_gate.in_features], model.smear_gate.weight))  # (B, 1)
            x, slots.previous[:B, 0] = torch.addcmul(x, gate, slots.previous[:B, 0], value=self.smear), x
        x0 = middle = x
        for i, layer in enumerate(self.layers):
            if config.residual_mix:
                x = torch.add(x * layer.a, x0, alpha=layer.b)
            h = normed(x, C, eps)
            qkv = layer.qkv(h).view(B, H + 2 * K, D)
            qk, v = qkv[:, : H + K], qkv[:, H + K :]
            if layer.gate is not None and layer.ve is not None:
                gate = 3 * torch.sigmoid(F.linear(h[:, : layer.gate.size(1)], layer.gate))  # (B, K)
                v = torch.addcmul(v, gate[..., None], layer.ve[idx].to(dtype).view(B, K, D))
            x1, x2 = qk.chunk(2, dim=-1)  # turning a head does not change its length: norm and turn may swap
            qk = torch.cat((torch.addcmul(x1 * cos, x2, sin), torch.addcmul(x2 * cos, x1, sin, value=-1)), -1)
            qk = normed(qk, math.sqrt(D) * config.qk_scale, eps)
            keys, values = slots.k[i], slots.v[i]  # (slots, S, K, D)
            keys[rows, start], values[rows, start] = qk[:, H:], v
            first = 0 if B > 1 or layer.window is None else max(0, seen - 1 - layer.window)
            y = F.scaled_dot_product_attention(
                qk[:, :H, None],  # (B, H, 1, D)
                keys[:B, first:seen].transpose(1, 2),
                values[:B, first:seen].transpose(1, 2),
                masks.get(layer.window),
                enable_gqa=H != K,
            )
            x = x + layer.out(y.reshape(B, H * D))
            x = x + layer.proj(F.relu(layer.fc(normed(x, C, eps))).square_())
            if i == config.n_layer // 2:
                middle = x
        if config.backout:
            x = torch.sub(x, middle, alpha=model.backout_lambda.item())
        slots.lengths[:B] = [length + 1 for length in slots.lengths[:B]]
        return self.head(normed(x, C, eps))[:, : config.vocab_size]

    def _masks(self, start: Tensor, seen: int) -> dict[int | None, Tensor]:
        """By window, (B, 1, 1, S): which keys each row's new token sees."""
        j, i = self.positions[:seen], start[:, None]
        whole = j <= i
        masks: dict[int | None, Tensor] = {None: whole[:, None, None]}
        for window in {layer.window for layer in self.layers}:
            if window is not None:
                masks[window] = (whole & (j >= i - window))[:, None, None]
        return masks
