"""Bytes of a training step's parts as counted by hand from nanochat's graph: a cross-check of counts.py.

Passes are of tokens x width x 2 bytes, forward and backward together, per layer. DIFFERENCES says why the two differ;
what times are predicted from is counts.py's.
"""

from nanochat.cost import parameter_counts
from nanochat.gpt import GPTConfig
from profiling.predicted.counts import GLUE, LOSS, NORMS, OPTIMIZER, RELU2, SUMS, TABLES, VARIANTS, is_ours, updated

NORM_PASSES = 38  # norms, residual mix, rotary, QK norm, and their backwards
RELU2_PASSES = 22  # relu² forward and backward as passes of their own, over 4 x width
GLUE_PASSES, GLUE_FUSED = 60, 17  # amax, rounding, transposes: passes of their own, or in the producers


DIFFERENCES = {
    NORMS: "by hand without gates, smear and the sums of the streams' gradients",
    LOSS: "by hand with what products write and read of the logits, or with a second pass over them",
    SUMS: "by hand without fills, and with the cast once a step, which compiled is the optimizer's; of fp8 no weight "
    "is cast, and the head's gradient is added in chunks",
    TABLES: "compiled: the forward's reading too, and tables counted whole",
    OPTIMIZER: "by hand each tensor once; compiled: reductions read again, and plain's stacks are copied",
    RELU2: "by hand 22 passes, compiled 20",
    GLUE: "compiled with relu² and what rounds weights; of the rest the difference is not explained yet",
}


def moved(config: GPTConfig, tokens: int, micro: int, ours: bool, fp8: bool) -> dict[str, float]:
    """Bytes by part of a step on one GPU: `micro` micro-batches of so many tokens, and the update of all parameters.

    ours: of our step, else of a plain nanochat's under torch.compile; as counts.VARIANTS has them.
    """
    counts = parameter_counts(config)
    matrices, head, tables = counts["transformer_matrices"], counts["lm_head"], counts["wte"] + counts["value_embeds"]
    layers = config.n_layer * micro * tokens * config.n_embd * 2  # one pass in each layer
    # Bytes a parameter and micro-batch: cast (6), gradient widened (6), added to those before it (12); or one cast a
    # step (6), and the gradient added where it is kept: of the head in a pass (10), of matrices in their products. fp8
    # rounds the float32 weights themselves.
    usual = 12 * micro + 12 * (micro - 1)
    casts = (6, 6 + 10 * micro) if ours and not fp8 else (usual, usual)
    # Of a table: zeros and sums in float32 (4 + 4 bytes an entry), cast (2), added to those before (6); or the rows of
    # the incoming gradient once, a third as many again for those that occur, and a table of zeros a step; no sorting.
    looked_up = micro * tokens * tables / config.padded_vocab_size * 2 * 1.33 + 2 * tables
    found = {
        NORMS: NORM_PASSES * layers,
        LOSS: micro * tokens * config.vocab_size * (6 if ours else 10),
        SUMS: casts[0] * matrices + casts[1] * head,
        TABLES: looked_up if ours else tables * (10 * micro + 6 * (micro - 1)),
        OPTIMIZER: updated(config, ours),
    }  # fmt: skip
    if fp8:
        found[GLUE] = (GLUE_FUSED if ours else GLUE_PASSES) * layers
    if not (ours and fp8):
        found[RELU2] = RELU2_PASSES * layers
    return {name: float(size) for name, size in found.items()}


def against(variant: str, config: GPTConfig, tokens: int, micro: int, counted: dict[str, float]) -> list[str]:
    """Lines of a table: what is counted of a step (simulate.moved) and what was by hand, and why the two differ."""
    if variant not in ("plain", "ours", "fp8 loop", "fp8 ours"):
        return []
    mine = moved(config, tokens, micro, is_ours(variant), fp8=bool(VARIANTS[variant][1]))
    lines = ["  GB of a step on one GPU   compiled  by hand"]
    for name, size in mine.items():
        lines.append(f"  {name:24} {counted.get(name, 0.0) / 1e9:9.1f} {size / 1e9:8.1f}  {DIFFERENCES.get(name, '')}")
    return lines
