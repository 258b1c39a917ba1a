"""Names and sizes of a model here and in Hugging Face's folders, each way.

The original architecture is transformers' own NanoChatForCausalLM; any other goes out with
modeling_nanochat_kernels.py. Tables have no padding rows there, as many rows as the tokenizer has tokens.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPTConfig

EPS = 2.0**-23  # of the norms
STOCK, OWN = "nanochat", "nanochat_kernels"  # model types
CLASSES = {STOCK: "NanoChatForCausalLM", OWN: "NanochatKernelsForCausalLM"}
MODULES = {
    "transformer.wte": "model.embed_tokens",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.ve_gate": "self_attn.ve_gate",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAYER, THEIR_LAYER = (
    re.compile(r"transformer\.h\.(\d+)\.(.+)\.weight"),
    re.compile(r"model\.layers\.(\d+)\.(.+)\.weight"),
)


def is_original(config: GPTConfig) -> bool:
    """Whether it computes what NanoChatForCausalLM does, whatever its rotary base and softcap."""
    tricks = config.smear or config.residual_mix or config.value_embeds or config.backout
    windows = any(config.window(i) is not None for i in range(config.n_layer))
    return not tricks and not windows and config.qk_scale == 1


def to_hf(config: GPTConfig) -> dict[str, Any]:
    """What a config.json says of the architecture."""
    sizes = dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.sequence_len, tie_word_embeddings=False,
    )  # fmt: skip
    if is_original(config):
        return dict(
            model_type=STOCK, architectures=[CLASSES[STOCK]], **sizes, intermediate_size=4 * config.n_embd,
            head_dim=config.head_dim, hidden_act="relu2", rms_norm_eps=EPS, attention_bias=False,
            attention_dropout=0.0, final_logit_softcapping=config.softcap,
            rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
        )  # fmt: skip
    windows = [config.window(i) for i in range(config.n_layer)]
    window = next((w for w in windows if w is not None), None)
    module = "modeling_nanochat_kernels"
    return dict(
        model_type=OWN, architectures=[CLASSES[OWN]], **sizes,
        auto_map={
            "AutoConfig": f"{module}.NanochatKernelsConfig", "AutoModel": f"{module}.NanochatKernelsModel",
            "AutoModelForCausalLM": f"{module}.{CLASSES[OWN]}",
        },
        layer_types=["full_attention" if w is None else "sliding_attention" for w in windows],
        sliding_window=None if window is None else window + 1,  # there it counts the query itself
        rope_base=config.rope_base, qk_scale=config.qk_scale, softcap=config.softcap, smear=config.smear,
        residual_mix=config.residual_mix, value_embeds=config.value_embeds, backout=config.backout,
    )  # fmt: skip


def their_name(name: str) -> str:
    """A parameter's name in a Hugging Face folder."""
    if match := LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{MODULES[match[2]]}.weight"
    if name.startswith("lm_head."):
        return name
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    return f"model.scalars.{name}" if is_scalar(name) else f"model.{name}"


def our_name(name: str) -> str:
    """The inverse. Raises KeyError for a layer's parameter that ours have not."""
    if match := THEIR_LAYER.fullmatch(name):
        ours = {theirs: ours for ours, theirs in MODULES.items()}
        return f"transformer.h.{match[1]}.{ours[match[2]]}.weight"
    if name == "model.embed_tokens.weight":
        return "transformer.wte.weight"
    return name.removeprefix("model.").removeprefix("scalars.")


def is_table(name: str) -> bool:
    """Whether a parameter (our name) has a row for each token."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")


def cut(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """A table (V_pad, …) without the rows that pad it (V, …); anything else as it is."""
    return tensor[: config.vocab_size] if is_table(name) else tensor


def pad(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """A table with at least V rows with as many as ours have, V_pad; new ones are zero."""
    if not is_table(name):
        return tensor
    kept = tensor[: config.padded_vocab_size]
    return F.pad(kept, (0, 0, 0, config.padded_vocab_size - kept.size(0))) if kept.dim() == 2 else kept


def is_scalar(name: str) -> bool:
    """Whether a parameter stays in float32 whatever the others are in."""
    return name.endswith("_lambdas") or name.endswith("_lambda")


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(torch.float32 if is_scalar(name) else dtype)
