"""A model that came from elsewhere, and the run that is made of it.

Readers (from_hf.py, from_upstream.py) check everything before the run is touched; what cannot carry over is in `lost`.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanochat import checkpoint
from nanochat.checkpoint import Checkpoint
from nanochat.cost import meta_model
from nanochat.errors import UserError
from nanochat.exchange import layout
from nanochat.gpt import GPTConfig
from nanochat.recipe import RATES, REFERENCE_BATCH, WEIGHT_DECAY, horizon
from nanochat.run import TRAINED, Run
from nanochat.tokenizer import Tokenizer

LARGEST_SIZE = 1 << 24  # tokens, channels or layers
DEVICE_BATCH = 32  # rows at a time, where nothing else is known


@dataclass
class Incoming:
    """Checked, and not yet anywhere. weights: by our names, tables padded; rates: of base training, or {}."""

    origin: str  # a sentence: what it was
    stage: str
    step: int
    config: GPTConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    rates: dict[str, float] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)
    val_bpb: float | None = None
    optimizer: dict[str, Tensor] | None = None
    lost: list[str] = field(default_factory=list)


def whole_numbers(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a model as they are. Raises ValueError for one that is no whole number, or beyond any model's."""
    for name, size in sizes.items():
        if type(size) is not int or size > LARGEST_SIZE:
            raise ValueError(f"{name} is {size!r}, wanted a whole number of at most {LARGEST_SIZE:,}")
    return sizes


def checked(weights: Mapping[str, Tensor], config: GPTConfig, rows: int, where: str) -> dict[str, Tensor]:
    """The weights (our names) as our model has them, tables of `rows` rows padded. Raises UserError for any that is
    missing, too many, or of another shape.
    """
    layers = sum(name.endswith(".attn.c_q.weight") for name in weights)
    table = weights.get("transformer.wte.weight")
    width = table.shape[-1] if table is not None and table.dim() else 0
    if (layers, width) != (config.n_layer, config.n_embd):  # before a model of a claimed size is built
        said = f"{config.n_layer} layers of width {config.n_embd}"
        raise UserError(f"{where} has weights of {layers} layers of width {width}, and its configuration says {said}")
    wanted = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    if odd := sorted(set(wanted) ^ set(weights)):
        kind = "lacks" if odd[0] in wanted else "has a weight too many,"
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(f"{where} {kind} {odd[0]}{more} (by the names here): it is another architecture, or not whole")
    found = {}
    for name, shape in wanted.items():
        shape = (rows, *shape[1:]) if layout.is_table(name) else shape
        tensor = weights[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            has = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise UserError(f"{where}: {name} is {has}, and the configuration wants {shape}")
        found[name] = layout.pad(name, tensor, config).float().contiguous()
    return found


def learning(incoming: Incoming) -> tuple[dict[str, float], dict[str, int]]:
    """(learning rates, batch sizes) that training goes on with: what came along, and the recipe's for what did not."""
    config, given = incoming.config, incoming.settings
    length = given.get("max_seq_len") or config.sequence_len
    total = given.get("total_batch_size") or horizon(config, WEIGHT_DECAY).total_batch_size
    rows = given.get("device_batch_size") or DEVICE_BATCH
    rows = max(1, min(rows, total // length))
    total = max(1, total // (rows * length)) * rows * length
    scale = math.sqrt(total / REFERENCE_BATCH)
    rates = {**{name: rate * scale for name, rate in RATES.items()}, **incoming.rates}
    return rates, dict(device_batch_size=rows, max_seq_len=length, total_batch_size=total)


def store(incoming: Incoming, run: Run) -> Checkpoint:
    """Makes it the finished model of its stage. Raises UserError where the run has that stage, or another tokenizer."""
    if incoming.stage not in TRAINED:
        raise UserError(f"--stage is {incoming.stage!r}; a model here is of {', '.join(TRAINED)}")
    if checkpoint.steps(run.stage(incoming.stage)):
        raise UserError(
            f"run {run.name!r} has a {incoming.stage} model already; give another --run, or another --stage"
        )
    words = run.stage("tokenizer")
    if (has := words.is_dir()) and run.tokenizer().fingerprint != incoming.tokenizer.fingerprint:
        raise UserError(f"run {run.name!r} has another tokenizer, {run.tokenizer().fingerprint}; give another --run")
    made = [place for place in (run.folder, run.stage(incoming.stage), words) if not place.exists()]
    rates, settings = learning(incoming)
    meta = dict(
        stage=incoming.stage, step=incoming.step, finished=True, config=asdict(incoming.config),
        tokenizer=incoming.tokenizer.fingerprint, data="imported", plan={}, dtype=str(torch.float32), rates=rates,
        settings=settings, state=dict(step=incoming.step, val_bpb=incoming.val_bpb), loader={},
        imported=incoming.origin,
    )  # fmt: skip
    parts = dict(model=incoming.weights, **({"optimizer": incoming.optimizer} if incoming.optimizer else {}))
    try:
        if not has:
            incoming.tokenizer.save(words)
        return checkpoint.write(run.stage(incoming.stage), meta, parts)
    except BaseException:
        for place in made:
            shutil.rmtree(place, ignore_errors=True)
        raise
