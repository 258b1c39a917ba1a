"""Launches, bytes and FLOPs of the compiled training step by part, for any depth and batch. Look at `counted`.

profiling/compiled lowers the step for a card that is not here; a child of it sums up each part. A lowering takes half a
minute, so counts.json keeps those of two depths at the width of depth 24 for each of VARIANTS: what they differ by is
what two layers add. profiling/compiled/count.py writes the file.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from nanochat.cost import attended, parameter_counts
from nanochat.errors import UserError
from nanochat.files import json_of
from nanochat.gpt import GPTConfig
from nanochat.recipe import model_config

FILE = Path(__file__).with_name("counts.json")
ATTENTION, LOSS = "attention", "loss"
PRODUCTS, FP8_PRODUCTS, RELU2, GLUE, TABLES, SUMS, NORMS, OPTIMIZER, ORTHOGONAL = (
    "products", "fp8 products", "relu²", "fp8 glue", "embedding gradients", "weights, gradients", "norms, rotary",
    "optimizer", "optimizer's products",
)  # fmt: skip
# What is counted: name → (setting of the kernels, fp8). Attention is ours in all, so that no difference depends on it;
# relu² inside a product is not in `ours`, because a measurement on the card decides it.
OURS = "auto,flash_attention=triton,mlp_relu2=torch"
VARIANTS = {
    "plain": ("plain", ""),
    "ours": (OURS, ""),
    "relu2": (OURS.replace("mlp_relu2=torch", "mlp_relu2=triton"), ""),
    "template": (OURS.replace("mlp_relu2=torch", "mlp_relu2=inductor"), ""),
    "fp8 loop": ("torch,flash_attention=triton", "current"),
    "fp8 torch-mlp": (f"{OURS},fp8_mlp_relu2=torch", "current"),
    "fp8 ours": (OURS, "current"),
}
DEPTH, LAYERS, ROWS, T, VOCABULARY = 24, (4, 6), 16, 2048, 32768  # lowered: the width of a depth, rows of T tokens
FEW = replace(model_config(DEPTH, VOCABULARY, T), n_layer=LAYERS[0])

Cell = list[float]  # launches, bytes, FLOPs
ZERO = [0.0, 0.0, 0.0]
Sums = dict[str, dict[str, Cell]]  # phase → part → cell; phases: FIRST and LATER micro-batches, UPDATE
FIRST, LATER, UPDATE = "first", "later", "update"


def key(variant: str, layers: int) -> str:
    """Of a lowered step, in the file."""
    return f"{variant}, {layers} layers"


@cache
def table() -> dict[str, Any]:
    """counts.json. Raises UserError where it is missing or damaged."""
    try:
        found = json_of(FILE.read_bytes())
        if not all(isinstance(found[name], dict) for name in ("steps", "code")):
            raise ValueError
        return found
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{FILE} is missing or damaged; write it again: python -m profiling counts") from None


# By what the bytes and the FLOPs of a part grow: (in each layer, in what every model has once), of n tokens and c width
# as shares of what was lowered. Of weights what grows is their size, of activations tokens and width.
Term = Callable[[float, float], float]
ACTIVATIONS: tuple[Term, Term] = (lambda n, c: n * c), (lambda n, c: n * c)
WEIGHTS: tuple[Term, Term] = (lambda n, c: c * c), (lambda n, c: c)
BYTES = {
    LOSS: ((lambda n, c: n), (lambda n, c: n)),
    SUMS: WEIGHTS,
    TABLES: ((lambda n, c: c), (lambda n, c: c)),
    ORTHOGONAL: WEIGHTS,
}
FLOPS = {ORTHOGONAL: ((lambda n, c: c**3), (lambda n, c: c))}
MULTIPLIED: tuple[Term, Term] = (lambda n, c: n * c * c), (lambda n, c: n * c)  # all other products
ALIKE: tuple[Term, Term] = (lambda n, c: 1.0), (lambda n, c: 1.0)


def counted(variant: str, config: GPTConfig, tokens: int) -> Sums:
    """Of a step with micro-batches of so many tokens on one GPU. Raises UserError for another vocabulary.

    Every two layers add what they add between the two depths that were lowered. Exact at the width and the tokens that
    were; elsewhere a part has grown as BYTES and FLOPS say, attention's FLOPs as pairs of query and key, and the
    optimizer's bytes as its tensors: half of the layers have a table too, which grows by one width, not two.
    """
    if config.vocab_size != VOCABULARY:
        raise UserError(f"counts.json is for a vocabulary of {VOCABULARY}, and here it is {config.vocab_size}")
    n, c = tokens / (ROWS * T), config.n_embd / (64 * DEPTH)
    few, more = (lowered(variant, layers) for layers in LAYERS)
    found: Sums = {}
    for phase in few:
        cells = found[phase] = {}
        for name in sorted(few[phase].keys() | more[phase].keys()):
            of_bytes = ALIKE if name == OPTIMIZER else BYTES.get(name, ACTIVATIONS)
            terms = ALIKE, of_bytes, FLOPS.get(name, MULTIPLIED)
            cells[name] = []
            for (of_layer, of_once), a, b in zip(terms, few[phase].get(name, ZERO), more[phase].get(name, ZERO)):
                layer = (b - a) / (LAYERS[1] - LAYERS[0])
                value = config.n_layer * layer * of_layer(n, c) + (a - LAYERS[0] * layer) * of_once(n, c)
                cells[name].append(max(0.0, value))
            if name == ATTENTION:
                cells[name][2] = few[phase][name][2] * n * _scores(config) / _scores(FEW)
            elif name == OPTIMIZER:
                as_wide = replace(FEW, n_layer=config.n_layer)
                cells[name][1] *= updated(config, is_ours(variant)) / updated(as_wide, is_ours(variant))
    return found


def is_ours(variant: str) -> bool:
    """Whether a variant of VARIANTS is our step, and not a plain loop."""
    return VARIANTS[variant][0].startswith("auto")


def updated(config: GPTConfig, ours: bool) -> float:
    """Bytes that an update moves, each tensor read and written once: of Muon's matrices, the head and the tables.

    ours: else matrices are stacked for it, and taken apart.
    """
    counts = parameter_counts(config)
    tables = counts["wte"] + counts["value_embeds"]
    return (40.0 if ours else 64.0) * counts["transformer_matrices"] + 28 * counts["lm_head"] + 12 * tables


def _scores(config: GPTConfig) -> float:
    """Products of attention for a token, all layers."""
    return config.n_embd * attended(config)


def lowered(variant: str, layers: int) -> Sums:
    """What was lowered of a variant with so many layers."""
    try:
        sums: Sums = table()["steps"][key(variant, layers)]["sums"]
    except KeyError as missing:
        raise UserError(f"counts.json has no {missing}; write it again: python -m profiling counts") from None
    return sums
