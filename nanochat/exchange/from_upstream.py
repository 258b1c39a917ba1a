"""nanochat's own checkpoints, of its code of October 2025 and of today: model_*.pt, meta_*.json, tokenizer.pkl.

torch.load gets weights_only=True, and the pickled tokenizer an unpickler that allows nothing else (pickled.py).
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.exchange import layout, moments, pickled
from nanochat.exchange.incoming import Incoming, checked, whole_numbers
from nanochat.exchange.to_upstream import FOLDERS, SIZES
from nanochat.exchange.whole import inside, read_json
from nanochat.gpt import GPTConfig
from nanochat.recipe import REFERENCE_BATCH

MODEL = re.compile(r"model_(\d+)\.pt")
TRICKS = dict(smear="smear_gate.weight", residual_mix="resid_lambdas", backout="backout_lambda")
TABLES = "value_embeds."
OCTOBER_RATES = dict(embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02)  # that code's defaults


def steps(folder: Path) -> dict[int, str]:
    """Names of the models in a folder, by step."""
    found = {path.name: MODEL.fullmatch(path.name) for path in folder.iterdir()} if folder.is_dir() else {}
    return {int(match[1]): name for name, match in sorted(found.items()) if match}


def read(folder: Path, stage: str, step: int | None, tokenizer: Path | None) -> Incoming:
    """stage: "" is guessed from the folder's name, else sft; step: None takes the last; tokenizer: the pickle, None
    looks for it beside the model, and where nanochat keeps it. Raises UserError.
    """
    there = steps(folder)
    at = max(there) if step is None else step
    if at not in there:
        raise UserError(f"{folder} has no model of step {step}; there are {', '.join(map(str, sorted(there)))}")
    digits = MODEL.fullmatch(there[at])[1]  # type: ignore[index]
    meta = read_json(inside(folder, f"meta_{digits}.json"))
    words = pickled.read(tokenizer_file(folder, tokenizer))
    weights = {name.removeprefix("_orig_mod."): one for name, one in load(inside(folder, there[at])).items()}
    config = configuration(meta, weights, folder)
    if config.vocab_size != words.vocab_size:
        raise UserError(f"{folder}: its model has {config.vocab_size:,} tokens, and the tokenizer {words.vocab_size:,}")
    october = layout.is_original(config)
    table = weights.get("transformer.wte.weight")
    rows = len(table) if table is not None and table.dim() else 0
    if rows not in (config.vocab_size, config.padded_vocab_size):
        raise UserError(f"{folder}: wte has {rows:,} rows, and the configuration says {config.vocab_size:,} tokens")
    places = {name: stage for stage, name in FOLDERS.items()}
    incoming = Incoming(
        origin=f"Imported from a checkpoint of nanochat ({'October 2025' if october else '2026'}), step {at}.",
        stage=stage or places.get(folder.resolve().parent.name, "sft"), step=at, config=config,
        weights=checked(weights, config, rows, str(folder)), tokenizer=words,
        settings={name: value for name in ("device_batch_size", "max_seq_len", "total_batch_size")
                  if isinstance(value := meta.get(name), int) and value > 0},
        val_bpb=float(meta["val_bpb"]) if isinstance(meta.get("val_bpb"), int | float) else None,
        lost=["the place in the data and the loss curve: a stage that follows starts at its own beginning"],
    )  # fmt: skip
    incoming.rates = rates(meta, october, incoming.settings)
    if october:
        incoming.lost.append("rotary tables in bfloat16: they are in the compute dtype here, so logits differ a little")
    optimizer(folder, digits, incoming)
    return incoming


def tokenizer_file(folder: Path, given: Path | None) -> Path:
    if given is not None:
        return inside(given.parent, given.name)
    own, kept = folder, folder.resolve().parent.parent / "tokenizer"
    for place in (own, own / "tokenizer", kept):
        if (place / "tokenizer.pkl").exists() or (place / "tokenizer.pkl").is_symlink():
            return inside(place, "tokenizer.pkl")
    raise UserError(f"there is no tokenizer.pkl in {own} or {kept}; give --tokenizer PATH")


def load(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises UserError for anything else."""
    found = unpickled(path)
    plain = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(one, Tensor) and one.layout == torch.strided and not one.is_meta
        for name, one in found.items()
    )
    if not plain or not found:
        raise UserError(f"{path} holds no tensors by name, as a model of nanochat's does")
    return found


def unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged or hostile file raises what it likes
        said = " ".join(str(problem).split())
        asks = re.search(r"(?:GLOBAL|global) ([\w.]+)", said)
        why = f"asks for {asks[1]}, which is not allowed" if asks else f"{type(problem).__name__}"
        raise UserError(f"{path} is not read ({why}): it is damaged, or more than weights; nothing was run") from None


def configuration(meta: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> GPTConfig:
    """By the sizes in its metadata, and the parameters that are there. Raises UserError."""
    has = {name: key in weights for name, key in TRICKS.items()}
    has["value_embeds"] = any(key.startswith(TABLES) for key in weights)
    if any(has.values()) and not all(has.values()):
        lacking = ", ".join(name for name, there in has.items() if not there)
        raise UserError(
            f"{folder} has some parameters of today's nanochat but not all (no {lacking}): it is of code in between, "
            "whose other numbers are not written down in it; only October 2025 and today are known here"
        )
    try:
        sizes = whole_numbers({name: meta["model_config"][name] for name in SIZES})
        if not any(has.values()):
            return GPTConfig.original(**sizes)
        return GPTConfig(**sizes, window_pattern=str(meta["model_config"].get("window_pattern", "L")).upper())
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{folder}: its meta_*.json has no model_config that fits ({problem})") from None


def rates(meta: dict[str, Any], october: bool, settings: dict[str, int]) -> dict[str, float]:
    """Learning rates of its base training as ours are kept: scaled for the batch, which October's code did not."""
    given = meta.get("user_config") if isinstance(meta.get("user_config"), dict) else {}
    assert isinstance(given, dict)
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
    known = {name: float(given[name]) for name in names if isinstance(given.get(name), int | float)}
    if october:
        return {**OCTOBER_RATES, **known}
    return {
        name: rate * math.sqrt(settings.get("total_batch_size", REFERENCE_BATCH) / REFERENCE_BATCH)
        for name, rate in known.items()
    }


def optimizer(folder: Path, digits: str, incoming: Incoming) -> None:
    """Sets its moments where they are there and fit, else says why not."""
    by_rank = {path.name: re.fullmatch(rf"optim_{digits}(?:_rank(\d+))?\.pt", path.name) for path in folder.iterdir()}
    names = [name for _, name in sorted((int(match[1] or 0), name) for name, match in by_rank.items() if match)]
    if not names:
        incoming.lost.append("the optimizer's moments, which are not there: training goes on with new ones")
        return
    try:
        incoming.optimizer = moments.from_upstream([unpickled(inside(folder, name)) for name in names], incoming.config)
    except moments.Unfit as why:
        incoming.lost.append(f"the optimizer's moments: {why}; training goes on with new ones")
