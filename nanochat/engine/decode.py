"""One more token for every running row on a CPU, or more of a prompt: the model of gpt.py, written out for that alone.

A step of a small model is bound by reading the weights once and by the cost of starting operations, a few microseconds
each. So here: products for few rows (weights.py; q, k, v and the gate as one), residual additions and ReLU inside of
them, scalars as numbers, one mask a step; and attention in float32 over a float32 cache: for one query a row, PyTorch's
takes three times as long in bfloat16. `compile` has the same code fused by torch.compile: half the time of a step,
after half a minute. Prompts come in short chunks (scheduler.py), whose time is for a good part the same costs: they
gain as much, eagerly.

tests/test_engine.py holds all of it to gpt.py's answers; GPUs run gpt.py itself.
"""

import math
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rms_norm import default_eps
from nanochat.engine.cache import Slots
from nanochat.engine.weights import Int8, alone, joined
from nanochat.gpt import GPT, VE_GATE_CHANNELS

SEVERAL = 8  # rows: where there is more than one, a compiled step has its weights laid out for so many
# Loops over fewer elements (at SEVERAL rows) are one thread's: to begin and end one together costs as much as it saves,
# and twice that beside another program.
ALONE = 16384
EPS = default_eps(torch.float32)  # gpt.py's for all dtypes that come here


def normed(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension of (B, C).

    Where nothing fuses it: as the first half of LayerNorm of (x, −x), whose mean is 0. That is one operation with
    float32 inside; RMSNorm on a CPU is seven.
    """
    C = x.size(-1)
    if torch.compiler.is_compiling():
        return F.rms_norm(x, (C,), None, EPS)
    return F.layer_norm(torch.cat((x, -x), -1), (2 * C,), None, None, EPS)[:, :C]


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """q (B, H, D) over keys, values (B, K, S, D), with mask (B, 1, 1, S) added to the scores; gives (B, H, D)."""
    B, H, D = q.shape
    K = keys.size(1)
    if torch.compiler.is_compiling():
        q = q.view(B, K, H // K, 1, D)
        scores = (q * keys[:, :, None]).sum(-1) * D**-0.5 + mask  # (B, K, H/K, S)
        p = torch.softmax(scores, -1)
        return (p[..., None] * values[:, :, None]).sum(3).view(B, H, D)
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, enable_gqa=H != K)[:, :, 0]


def causal_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, window: int | None) -> Tensor:
    """q (T, H, D) of a prompt's last T tokens over its slot's keys, values (sequence_len, K, D), with mask (T, S) added
    to the scores; gives (T, H, D). Keys that no token's window reaches are not read.
    """
    T, S = mask.shape
    begin = 0 if window is None else max(0, S - T - window)
    keys, values = (x[None, begin:S].transpose(1, 2) for x in (keys, values))  # (1, K, S − begin, D)
    gqa, mask, q = q.size(1) != keys.size(1), mask[None, None, :, begin:], q.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=gqa)[0].transpose(0, 1)


class Layer(nn.Module):
    """What a step needs of a block."""

    def __init__(self, model: GPT, i: int, pack: bool):
        super().__init__()
        config, block = model.config, model.transformer["h"][i]
        attn, mlp = block.attn, block.mlp
        self.ve = gate = None
        if config.has_value_embed(i):
            self.ve = model.value_embeds[str(i)]
            gate = attn.ve_gate.weight.detach()
            gate = F.pad(gate, (0, config.n_embd - VE_GATE_CHANNELS))  # (K, C): zero for the other channels
        self.qkv = joined((attn.c_q, attn.c_k, attn.c_v), gate, pack)
        self.out, self.fc, self.proj = (alone(linear, pack) for linear in (attn.c_proj, mlp.c_fc, mlp.c_proj))
        self.window = config.window(i)
        self.a, self.b = 1.0, 0.0
        if config.residual_mix:
            self.a, self.b = model.resid_lambdas[i].item(), model.x0_lambdas[i].item()


class Step(nn.Module):
    """The step as a function of tensors, on the model's own weights. pack: for several rows; what oneDNN then keeps of
    them is a copy: change the weights, and make another.
    """

    def __init__(self, model: GPT, pack: bool):
        super().__init__()
        self.config, self.dtype = model.config, model.dtype
        self.layers: Any = nn.ModuleList(Layer(model, i, pack) for i in range(model.config.n_layer))
        self.head = alone(model.lm_head, pack)
        self.wte = model.transformer["wte"]
        if model.config.smear:
            self.smear_gate, self.smear = model.smear_gate.weight.detach(), model.smear_lambda.item()
        self.backout = model.backout_lambda.item() if model.config.backout else 0.0

    def forward(
        self, idx: Tensor, start: Tensor, rows: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, previous: Tensor,
        k: list[Tensor], v: list[Tensor], prompt: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """idx, start, rows (B,); keys (S,): the positions that any row sees; cos, sin (sequence_len, D); previous
        (B, C); k and v of each layer (slots, sequence_len, K, D), which get one more key and value a row. Returns raw
        logits (B, V) and the next previous.

        prompt: all B tokens are of this slot, one after the other, and previous (1, C) is of the token before them.
        Returns what the head would get, (B, C), and the embeddings.
        """
        config, dtype, wide = self.config, self.dtype, k[0].dtype
        H, K, D = config.n_head, config.n_kv_head, config.head_dim
        masks, cos, sin = self._masks(keys, start, wide), cos[start][:, None], sin[start][:, None]
        x = now = normed(self.wte(idx).to(dtype))  # (B, C)
        if config.smear:
            gate = torch.sigmoid(F.linear(x[:, : self.smear_gate.size(1)], self.smear_gate))  # (B, 1)
            before = previous if prompt is None else torch.cat((previous, now[:-1]))
            x = torch.addcmul(x, gate, before, value=self.smear)
        x0 = middle = x
        for i, layer in enumerate(self.layers):
            if config.residual_mix:
                x = torch.add(x * layer.a, x0, alpha=layer.b)
            made = layer.qkv(normed(x)).to(wide)  # (B, (H + 2·K)·D, and K gates where there is a value embedding)
            heads = made[:, : (H + 2 * K) * D].unflatten(1, (-1, D))
            qk, value = heads[:, : H + K], heads[:, H + K :]
            if layer.ve is not None:
                gate = torch.sigmoid(made[:, (H + 2 * K) * D :])[..., None]  # (B, K, 1)
                value = torch.addcmul(value, gate, layer.ve(idx).to(wide).unflatten(1, (K, D)), value=3)
            qk = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + EPS)
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
            k[i][rows, start], v[i][rows, start] = qk[:, H:], value
            mask = masks[layer.window]
            if prompt is None:
                keys, values = (c[i][: idx.size(0), : mask.size(-1)].transpose(1, 2) for c in (k, v))  # (B, K, S, D)
                y = attention(qk[:, :H], keys, values, mask)
            else:
                y = causal_attention(qk[:, :H], k[i][prompt], v[i][prompt], mask[:, 0, 0], layer.window)
            x = layer.out.plus(y.flatten(1).to(dtype), x)
            hidden = layer.fc(normed(x), relu=True)
            x = layer.proj.plus(hidden * hidden, x)
            if i == config.n_layer // 2:
                middle = x
        if config.backout:
            x = torch.sub(x, middle, alpha=self.backout)
        x = normed(x)
        return x if prompt is not None else self.head(x)[:, : config.vocab_size], now

    def alone(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """`forward` under a code object of its own. Compiled code is kept by code object, and found by the guards on
        tensors alone, which tell neither one row from several nor one model from another.
        """
        forward = Step.forward
        return MethodType(FunctionType(forward.__code__.replace(), globals(), argdefs=forward.__defaults__), self)

    def _masks(self, keys: Tensor, start: Tensor, dtype: torch.dtype) -> dict[int | None, Tensor]:
        """By window, (B, 1, 1, S): 0 for the keys that a row's new token sees, −∞ for the others."""
        j, i = keys, start[:, None]
        masks = {}
        for window in {layer.window for layer in self.layers}:
            visible = j <= i if window is None else (j <= i) & (j >= i - window)
            masks[window] = torch.where(visible, 0.0, -math.inf).to(dtype)[:, None, None]
        return masks


class Decoder:
    """Decode steps over the first rows of the slots."""

    @torch.no_grad()
    def __init__(self, model: GPT, slots: Slots):
        self.model, self.slots = model, slots
        self.step = Step(model, pack=slots.k.size(1) > 1)
        self.compiled: dict[bool, Callable[..., tuple[Tensor, Tensor]]] = {}  # by whether there are several rows
        self.rows = torch.arange(slots.k.size(1))
        self.positions = torch.arange(model.config.sequence_len)
        # x·cos + (halves swapped)·sin turns a head; both tables hold the factor that a head gets after its norm.
        scale, wide = model.config.qk_scale, slots.k.dtype
        self.cos = scale * torch.cat((model.cos, model.cos), -1).to(wide)  # (S, D)
        self.sin = scale * torch.cat((model.sin, -model.sin), -1).to(wide)

    def __call__(self, tokens: list[int]) -> Tensor:
        """Raw logits (B, V), before the softcap, after one more token for each of the first B slots; they advance."""
        slots, B = self.slots, len(tokens)
        step = self.compiled.get(B > 1, self.step)
        logits, now = step(*self._inputs(slots, tokens))
        slots.previous[:B, 0] = now
        slots.lengths[:B] = [length + 1 for length in slots.lengths[:B]]
        return logits

    def read(self, slot: int, tokens: list[int]) -> Tensor:
        """Takes more tokens of a prompt into a slot, eagerly. Returns what the head would get, (T, C)."""
        slots, T, done = self.slots, len(tokens), self.slots.lengths[slot]
        idx, start, rows = torch.tensor(tokens), done + torch.arange(T), self.rows[slot].expand(T)
        keys, caches = self.positions[: done + T], (list(slots.k), list(slots.v))
        hidden, now = self.step(idx, start, rows, keys, self.cos, self.sin, slots.previous[slot], *caches, slot)
        slots.previous[slot], slots.lengths[slot] = now[-1], done + T
        return hidden

    def _inputs(self, slots: Slots, tokens: list[int]) -> tuple[Any, ...]:
        B = len(tokens)
        idx, start = torch.tensor(tokens), torch.tensor(slots.lengths[:B])
        keys = self.positions[: max(slots.lengths[:B]) + 1]
        return (
            idx, start, self.rows[:B], keys, self.cos, self.sin, slots.previous[:B, 0], list(slots.k), list(slots.v)
        )  # fmt: skip

    @torch.inference_mode()
    def compile(self) -> None:
        """Compiles the step, first for one row; steps of so many rows go over to it as soon as it is ready.

        May be called in a thread of its own, beside running steps. Needs torch.compile to work
        (nanochat.hardware.can_compile), and memory for a little of another cache; matrices in float32 are packed for
        several rows, as those in bfloat16 are already.
        """
        most = self.slots.k.size(1)
        with torch.inference_mode(False), torch.no_grad():  # tensors of the kind that those in use are
            room = Slots(self.model.config, most, self.slots.k.device, self.model.dtype)
        length = self.slots.k.size(2) // 2
        # Frozen, weights are constants, as oneDNN's layout has to be, and no call hands them over.
        # But int8 would be turned back once and for all.
        freezing = not isinstance(self.model.lm_head, Int8)
        for rows in dict.fromkeys((1, min(SEVERAL, most))):
            chunk = max(torch._inductor.config.cpp.min_chunk_size, ALONE // torch.get_num_threads())
            with torch._inductor.config.patch(
                {"freezing": freezing, "size_asserts": False, "cpp.min_chunk_size": chunk}
            ):
                # Only the sizes of tensors change from call to call: nothing else needs to be looked at.
                options: dict[str, Any] = dict(guard_filter_fn=torch.compiler.keep_tensor_guards_unsafe)
                made = torch.compile(self.step.alone(), options=options)
                room.lengths = [length] * most
                made(*self._dynamic(self._inputs(room, [0] * rows)))
            self.compiled[rows > 1] = made

    @property
    def ready(self) -> bool:
        """Whether every step is a compiled one."""
        return len(self.compiled) == min(2, self.slots.k.size(1))

    def _dynamic(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Marks what may change from step to step without compiling again: the rows, but for one, and the keys."""
        idx, start, rows, keys, _, _, previous, _, _ = inputs
        for tensor in (idx, start, rows, previous):
            if tensor.size(0) > 1 and self.slots.k.size(1) > 2:  # of two slots, several rows are always two
                torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(keys, 0)
        return inputs
