"""A folder of transformers' NanoChatForCausalLM, or of our own class, read without running any of it."""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat.errors import UserError
from nanochat.exchange import hf_tokenizer, layout
from nanochat.exchange.incoming import Incoming, checked, whole_numbers
from nanochat.exchange.whole import inside, read_json
from nanochat.gpt import GPTConfig

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
THETA = 10_000.0  # the rotary base of a folder that names none (transformers' default_theta)
FIXED = dict(hidden_act="relu2", attention_bias=False, tie_word_embeddings=False)  # of the stock class


def read(folder: Path, stage: str) -> Incoming:
    """stage: "" takes what the folder says, else sft. Raises UserError."""
    described = read_json(inside(folder, "config.json"))
    words = inside(folder, "tokenizer.json")
    tokenizer = hf_tokenizer.read(words, read_json(words))
    rows = described.get("vocab_size")
    most = -(-tokenizer.vocab_size // 64) * 64
    if not isinstance(rows, int) or not tokenizer.vocab_size <= rows <= most:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, and its model {rows}")
    config = configuration(described, tokenizer.vocab_size, folder)
    weights = {}
    for name, tensor in tensors(folder).items():
        try:
            weights[layout.our_name(name)] = tensor
        except KeyError:
            raise UserError(f"{folder} has a weight {name}, which is none of this architecture's") from None
    lost = ["the optimizer's moments, learning rates and batch sizes: training goes on with the recipe's for this size"]
    eps = described.get("rms_norm_eps", layout.EPS)
    if not isinstance(eps, float) or abs(eps / layout.EPS - 1) > 1e-3:
        lost.append(f"rms_norm_eps {eps}: it is {layout.EPS:.3g} here, so logits differ a little")
    return Incoming(
        origin=f"Imported from a folder of {described['architectures'][0]} ({folder.resolve().name}).",
        stage=stage or str(described.get("nanochat_stage", "sft")), step=0, config=config,
        weights=checked(weights, config, rows, str(folder)), tokenizer=tokenizer, lost=lost,
    )  # fmt: skip


def configuration(described: dict[str, Any], vocab_size: int, folder: Path) -> GPTConfig:
    """Ours. Raises UserError for what our model does not compute."""
    kind, classes = described.get("model_type"), described.get("architectures")
    if not isinstance(kind, str) or not isinstance(classes, list) or layout.CLASSES.get(kind, "") not in classes:
        raise UserError(f"{folder} holds a {kind!r} model ({classes}); wanted " + " or ".join(layout.CLASSES.values()))
    try:
        sizes = whole_numbers(dict(
            vocab_size=vocab_size, sequence_len=described["max_position_embeddings"], n_embd=described["hidden_size"],
            n_layer=described["num_hidden_layers"], n_head=described["num_attention_heads"],
            n_kv_head=described.get("num_key_value_heads") or described["num_attention_heads"],
        ))  # fmt: skip
        if kind == layout.OWN:
            return _own(described, sizes)
        wanted = dict(FIXED, intermediate_size=4 * sizes["n_embd"])
        for key, value in wanted.items():
            if described.get(key, value) != value:
                raise ValueError(f"{key} is {described[key]!r}, and here it is {value!r}")
        if described.get("head_dim") not in (None, sizes["n_embd"] // sizes["n_head"]):
            raise ValueError("head_dim is not hidden_size / num_attention_heads")
        rope = described.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type is {rope['rope_type']!r}, and here it is 'default'")
        base, cap = rope.get("rope_theta", described.get("rope_theta", THETA)), described["final_logit_softcapping"]
        return GPTConfig.original(**sizes, **_positive(rope_base=base, softcap=cap))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, OverflowError) as problem:
        raise UserError(f"{folder / 'config.json'} is of no model of this architecture ({problem})") from None


def _positive(**numbers: Any) -> dict[str, float]:
    for name, number in numbers.items():
        if not 0 < float(number) < math.inf:
            raise ValueError(f"{name} is {number!r}, wanted a number above 0")
    return {name: float(number) for name, number in numbers.items()}


def _own(described: dict[str, Any], sizes: dict[str, int]) -> GPTConfig:
    letters = dict(full_attention="L", sliding_attention="S")
    pattern = "".join(letters[word] for word in described["layer_types"])
    if len(pattern) != sizes["n_layer"] or pattern[-1] != "L":
        raise ValueError("layer_types has not one word a layer, full_attention the last")
    tricks = {name: bool(described[name]) for name in ("smear", "residual_mix", "value_embeds", "backout")}
    numbers = _positive(**{name: described[name] for name in ("rope_base", "qk_scale", "softcap")})
    config = GPTConfig(**sizes, window_pattern=pattern, **tricks, **numbers)  # type: ignore[arg-type]
    windows = {config.window(i) for i in range(config.n_layer)} - {None}
    if windows and windows != {described["sliding_window"] - 1}:
        raise ValueError(f"sliding_window is {described['sliding_window']}, and here it follows from the context")
    return config


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights by their names, of one file or of shards. Raises UserError where one is missing or damaged."""
    names = [WHOLE]
    index: dict[str, str] = {}
    if (folder / INDEX).exists():
        index = read_json(inside(folder, INDEX)).get("weight_map") or {}
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{folder / INDEX} is damaged: it has no weight_map; fetch it again")
        names = sorted(set(index.values()))
    elif not (folder / WHOLE).exists() and (pickled := sorted(folder.glob("*.bin"))):
        raise UserError(f"{pickled[0]} is a pickle, which is not read; convert the folder to safetensors first")
    found: dict[str, Tensor] = {}
    for name in names:
        path = inside(folder, name)
        try:
            found.update(load_file(path))
        except (SafetensorError, OSError, ValueError) as problem:
            raise UserError(f"{path} cannot be read ({problem}); fetch it again") from None
    if missing := sorted(set(index) - set(found)):
        raise UserError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch the folder again, whole")
    return found
