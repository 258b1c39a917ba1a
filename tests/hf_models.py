"""Small models of transformers' with all weights drawn, and tokenizers for them; for tests that have that package."""

import torch

from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer


class Wrapped:
    """Our tokenizer, called as transformers' are."""

    eos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.bos_token_id = tokenizer, tokenizer.bos

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return dict(input_ids=[self.tokenizer.encode(text) for text in texts])


def drawn(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def gpt2(vocab_size=300, positions=600):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=vocab_size, n_positions=positions, n_embd=32, n_layer=2, n_head=2)
    return drawn(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=vocab_size - 9, eos_token_id=vocab_size - 9)))


def nanochat(model: GPT):
    """One of ours, of the original architecture, as transformers has it."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = model.config
    made = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.padded_vocab_size, hidden_size=config.n_embd, intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len, rms_norm_eps=torch.finfo(torch.float32).eps,
            rope_parameters=dict(rope_type="default", rope_theta=config.rope_base),
        )
    )  # fmt: skip
    names = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
             "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    state = {"model.embed_tokens.weight": model.transformer["wte"].weight, "lm_head.weight": model.lm_head.weight}
    for i in range(config.n_layer):
        for ours, theirs in names.items():
            state[f"model.layers.{i}.{theirs}.weight"] = model.state_dict()[f"transformer.h.{i}.{ours}.weight"]
    made.load_state_dict(state)
    return made.eval()
