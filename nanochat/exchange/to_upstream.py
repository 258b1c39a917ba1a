"""A model as a folder that nanochat's own commands work on: `NANOCHAT_BASE_DIR=FOLDER python -m scripts.chat_cli`.

The original architecture is for nanochat's code of October 2025, today's for today's; neither reads the other's.
"""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from nanochat import complete
from nanochat.checkpoint import Checkpoint, same_version
from nanochat.cost import meta_model
from nanochat.errors import UserError
from nanochat.exchange import layout, moments
from nanochat.exchange.whole import new_folder
from nanochat.gpt import SMEAR_CHANNELS, GPTConfig
from nanochat.recipe import REFERENCE_BATCH
from nanochat.tokenizer import Tokenizer

FOLDERS = dict(base="base_checkpoints", mid="mid_checkpoints", sft="chatsft_checkpoints", rl="chatrl_checkpoints")
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def generation(config: GPTConfig) -> str:
    """Which of nanochat's code computes this: "October 2025" or "today". Raises UserError when none does."""
    if layout.is_original(config) and (config.rope_base, config.softcap) == (10_000, 15):
        return "October 2025"
    tricks = (config.smear, config.residual_mix, config.value_embeds, config.backout)
    if all(tricks) and (config.rope_base, config.qk_scale, config.softcap) == (100_000, 1.2, 15):
        if config.n_embd >= SMEAR_CHANNELS:
            return "today"
    raise UserError("nanochat has no code for this architecture (its tricks are all there, or none is); --to hf has")


def export(found: Checkpoint, tokenizer: Tokenizer, out: Path) -> str:
    """Writes the folder; returns a sentence on how to use it. Raises UserError, leaving nothing."""
    config, meta = found.config, found.meta
    code = generation(config)
    stage = "sft" if meta["stage"] == "mid" and code == "today" else meta["stage"]  # today's code knows no mid
    weights = found.weights(meta_model(config))
    settings, rates = meta.get("settings", {}), meta.get("rates", {})
    sizes: dict[str, Any] = {name: getattr(config, name) for name in SIZES}
    batch = settings.get("total_batch_size", REFERENCE_BATCH)
    scale = 1.0
    if code == "today":
        sizes["window_pattern"] = config.window_pattern
        scale = math.sqrt(batch / REFERENCE_BATCH)  # theirs are written down before they are scaled
    else:
        weights = {name: layout.cut(name, tensor, config).contiguous() for name, tensor in weights.items()}
    described = dict(
        step=found.step, val_bpb=meta.get("state", {}).get("val_bpb"), model_config=sizes,
        user_config={"depth": config.n_layer, **{name: rate / scale for name, rate in rates.items()}},
        device_batch_size=settings.get("device_batch_size", 1),
        max_seq_len=settings.get("max_seq_len", config.sequence_len), total_batch_size=batch,
    )  # fmt: skip
    with new_folder(out) as folder:
        place, words = folder / FOLDERS[stage] / f"d{config.n_layer}", folder / "tokenizer"
        place.mkdir(parents=True)
        words.mkdir()
        torch.save(weights, place / f"model_{found.step:06d}.pt")
        (place / f"meta_{found.step:06d}.json").write_text(json.dumps(described, indent=2))
        if code == "today" and "optimizer" in complete.parts(meta):
            with same_version(found.folder):
                saved = moments.to_upstream(found.tensors("optimizer"), config, rates)
            torch.save(saved, place / f"optim_{found.step:06d}_rank0.pt")
        (words / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
        torch.save(tokenizer.token_bytes().int(), words / "token_bytes.pt")
    return f"{out} is for nanochat's code of {code}; in its clone: NANOCHAT_BASE_DIR={out} python -m scripts." + (
        "base_eval" if stage == "base" else f"chat_cli -i {stage}"
    )
