"""The nanochat architecture of 2026 for transformers (5.0 or newer): rotary positions, QK norm, norms without weights,
squared-ReLU MLP, sliding windows, softcapped logits, and smear, residual mixing, value embeddings and backout.

One file without other dependencies than torch and transformers: an exported folder carries it, and it is loaded with
trust_remote_code=True. Letters: B batch, T new tokens, S tokens that a query may see, C width, H heads, K key/value
heads, D head dim, V vocabulary, L layers.

The smear mixes in the embedding of the token before, which with a cache is a token of the last call: the first layer's
cache keeps it beside the keys, C / K more channels a head, so beam search and all else that edits a cache is right.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

EPS = 2.0**-23  # of the norms, in every dtype
SMEAR_CHANNELS, VE_GATE_CHANNELS = 24, 12  # how many channels the two gates read
# The cache's name in calls and outputs; newer versions of transformers say "cache".
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanochatKernelsConfig(PretrainedConfig):
    """sliding_window counts the query itself, as everywhere in transformers; layer_types has one word a layer."""

    model_type = "nanochat_kernels"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self, vocab_size=32768, hidden_size=768, num_hidden_layers=12, num_attention_heads=6, num_key_value_heads=6,
        max_position_embeddings=2048, layer_types=None, sliding_window=None, rope_base=100_000.0, qk_scale=1.2,
        softcap=15.0, smear=True, residual_mix=True, value_embeds=True, backout=True, use_cache=True, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.intermediate_size = hidden_size // num_attention_heads, 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.rope_base, self.qk_scale, self.softcap = rope_base, qk_scale, softcap
        self.smear, self.residual_mix, self.value_embeds, self.backout = smear, residual_mix, value_embeds, backout
        self.use_cache = use_cache
        for derived in ("head_dim", "intermediate_size", "tie_word_embeddings"):
            kwargs.pop(derived, None)
        super().__init__(tie_word_embeddings=False, **kwargs)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D), cos and sin (B, 1, T, D/2); nanochat turns the other way round than most."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos + two * sin, two * cos - one * sin), dim=-1)


class NanochatKernelsAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = linear(C, H * D), linear(C, K * D), linear(C, K * D)
        self.o_proj = linear(C, C)
        if has_value_embed(config, layer):
            self.ve_gate = linear(VE_GATE_CHANNELS, K)

    def forward(self, h, ve, kept, cos, sin, mask, cache):
        """h (B, T, C) normed, ve (B, T, K·D) or None, kept (B, T, C) for the next call or None; mask (…, 1, T, S)."""
        (B, T, _), D, config = h.shape, self.config.head_dim, self.config
        q, k, v = (project(h).view(B, T, -1, D) for project in (self.q_proj, self.k_proj, self.v_proj))
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(h[..., :VE_GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * ve.view(B, T, -1, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
        q, k = (config.qk_scale * norm(rotate(x, cos, sin)) for x in (q, k))
        if cache is not None:
            if kept is not None:  # (B, T, C) to (B, K, T, C/K), beside the keys
                k = torch.cat((k, kept.view(B, T, k.size(1), -1).transpose(1, 2)), dim=-1)
            k, v = cache.update(k, v, self.layer)
            k = k[..., :D]  # (B, K, S, D)
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class NanochatKernelsMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class NanochatKernelsLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = NanochatKernelsAttention(config, layer)
        self.mlp = NanochatKernelsMLP(config)

    def forward(self, x, ve, kept, cos, sin, mask, cache):
        x = x + self.self_attn(norm(x), ve, kept, cos, sin, mask, cache)
        return x + self.mlp(norm(x))


class NanochatKernelsScalars(nn.Module):
    """Kept in float32. A module of their own, since a model's dtype is that of its first parameter."""

    def __init__(self, config):
        super().__init__()
        if config.residual_mix:
            self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if config.smear:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))


class NanochatKernelsPreTrainedModel(PreTrainedModel):
    config_class = NanochatKernelsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanochatKernelsLayer"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["scalars"]


class NanochatKernelsModel(NanochatKernelsPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        V, C, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(V, C)
        self.layers = nn.ModuleList(NanochatKernelsLayer(config, i) for i in range(L))
        if config.smear:
            self.smear_gate = linear(min(SMEAR_CHANNELS, C), 1)
        width = config.num_key_value_heads * config.head_dim
        own = [i for i in range(L) if has_value_embed(config, i)]
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, width) for i in own})
        self.scalars = NanochatKernelsScalars(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        """input_ids (B, T); attention_mask (B, tokens so far), 0 for padding, which may be on the left."""
        if input_ids is None:
            raise ValueError("this model wants input_ids: its value embeddings are looked up by token")
        config, T = self.config, input_ids.size(1)
        cache = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = None if self.gradient_checkpointing and self.training else DynamicCache(config=config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"this model wants a DynamicCache, the default, not a {type(cache).__name__}")
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("this model wants an attention_mask of shape (batch, tokens)")
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)[None]
        embedded = norm(self.embed_tokens(input_ids))  # (B, T, C)
        x = x0 = self._smeared(embedded, attention_mask, past, cache) if config.smear else embedded
        cos, sin = self._rotary(position_ids, x.dtype)
        masks = {None: self._mask(None, attention_mask, past, T)}
        if "sliding_attention" in config.layer_types:
            masks[config.sliding_window] = self._mask(config.sliding_window, attention_mask, past, T)
        middle = x
        for i, layer in enumerate(self.layers):
            if config.residual_mix:
                x = (self.scalars.resid_lambdas[i] * x + self.scalars.x0_lambdas[i] * x0).to(x.dtype)
            ve = self.value_embeds[str(i)](input_ids) if has_value_embed(config, i) else None
            kept = embedded if config.smear and i == 0 else None
            mask = masks[config.sliding_window if config.layer_types[i] == "sliding_attention" else None]
            x = layer(x, ve, kept, cos, sin, mask, cache)
            if i == config.num_hidden_layers // 2:
                middle = x
        if config.backout:
            x = x - self.scalars.backout_lambda.to(x.dtype) * middle
        return BaseModelOutputWithPast(last_hidden_state=norm(x), **{CACHE: cache})

    def _smeared(self, embedded, attention_mask, past, cache):
        """embedded (B, T, C) with a share of the token before: none at the beginning and after padding."""
        B, T, C = embedded.shape
        before = torch.zeros_like(embedded[:, :1])
        if past:
            kept = cache.layers[0].keys[:, :, -1, self.config.head_dim :]  # (B, K, C/K)
            before = kept.reshape(B, 1, C).to(embedded.device)
        before = torch.cat((before, embedded[:, :-1]), dim=1)
        if attention_mask is not None:
            real = F.pad(attention_mask, (1, 0))[:, past : past + T]  # of the tokens before
            before = before * real[..., None].to(before.dtype)
        gate = torch.sigmoid(self.smear_gate(embedded[..., : self.smear_gate.in_features]))  # (B, T, 1)
        return embedded + self.scalars.smear_lambda.to(embedded.dtype) * gate * before

    def _rotary(self, position_ids, dtype):
        half = self.config.head_dim // 2
        steps = torch.arange(half, device=position_ids.device, dtype=torch.float32) / half
        angle = position_ids[:, None, :, None].float() * self.config.rope_base**-steps  # (B, 1, T, D/2)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _mask(self, window, attention_mask, past, T):
        """(B or 1, 1, T, S) bool: what each of T queries sees of the keys that its layer's cache gives."""
        device = self.embed_tokens.weight.device
        first = max(past - window + 1, 0) if window else 0
        keys = torch.arange(first, past + T, device=device)
        queries = torch.arange(past, past + T, device=device)[:, None]
        seen = keys <= queries
        if window:
            seen = seen & (keys > queries - window)
        seen = seen[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, first : past + T].bool().to(device)
        return seen | (keys == queries)  # padding sees itself: a row of nothing would be NaN


class NanochatKernelsForCausalLM(NanochatKernelsPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatKernelsModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None, labels=None,
        use_cache=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        """logits (B, T, V) float32; with labels (B, T; −100 ignored) the loss too."""
        given = past_key_values if cache is None else cache
        out = self.model(input_ids, attention_mask, position_ids, use_cache, cache=given)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept]).float()
        logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: out[CACHE] if CACHE in out else None})


def has_value_embed(config, layer: int) -> bool:
    """Every second layer, the last among them."""
    return config.value_embeds and layer % 2 == (config.num_hidden_layers - 1) % 2
