"""A model as a folder that transformers loads: weights, configuration, tokenizer, chat template, model card.

`AutoModelForCausalLM.from_pretrained(folder)` for the original architecture; any other wants trust_remote_code=True,
which runs the one file modeling_nanochat_kernels.py out of the folder. Transformers 5.0 or newer.
"""

import json
from pathlib import Path

import torch

from nanochat import checkpoint
from nanochat.checkpoint import Checkpoint
from nanochat.cost import meta_model
from nanochat.exchange import card, hf_tokenizer, layout
from nanochat.exchange.whole import new_folder
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)
MODELING = Path(__file__).with_name("modeling_nanochat_kernels.py")


def export(found: Checkpoint, tokenizer: Tokenizer, run: Run, out: Path, dtype: str) -> None:
    """Writes the folder. dtype: of the weights, "float32" or "bfloat16". Raises UserError, leaving nothing."""
    config, stage = found.config, found.meta["stage"]
    architecture = layout.to_hf(config)
    eos = "<|bos|>" if stage == "base" else "<|assistant_end|>"
    stops = [tokenizer.special[eos]] if stage == "base" else [tokenizer.special[eos], tokenizer.bos]
    # pad is null: an embedding that transformers takes for padding gets no gradient, and bos needs one
    tokens = dict(bos_token_id=tokenizer.bos, eos_token_id=stops[0], pad_token_id=None)
    described = dict(**architecture, **tokens, dtype=dtype, nanochat_stage=stage)
    generation = dict(
        bos_token_id=tokenizer.bos, eos_token_id=stops, pad_token_id=tokenizer.bos,
        max_new_tokens=256, do_sample=True, temperature=0.6, top_k=50,
    )  # fmt: skip
    weights = {
        layout.their_name(name): layout.cast(name, layout.cut(name, tensor, config), DTYPES[dtype])
        for name, tensor in found.weights(meta_model(config)).items()
    }
    with new_folder(out) as folder:
        checkpoint.write_tensors(folder / "model.safetensors", weights, dict(format="pt"))
        written = hf_tokenizer.files(tokenizer, config.sequence_len, eos)
        written["config.json"] = json.dumps(described, indent=1).encode()
        written["generation_config.json"] = json.dumps(generation, indent=1).encode()
        written["README.md"] = card.text(run, found, architecture["model_type"], dtype).encode(
            "utf-8", "backslashreplace"
        )
        if architecture["model_type"] == layout.OWN:
            written[MODELING.name] = MODELING.read_bytes()
        for name, content in written.items():
            (folder / name).write_bytes(content)
