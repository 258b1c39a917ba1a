"""Bytes of a training step's parts as counted by hand from nanochat's graph: a cross-check of counts.py.

Passes are of tokens x width x 2 bytes, forward and backward together, per layer. DIFFERENCES says why the two differ;
what times are predicted from is counts.py's.
"""

from nanochat.cost import parameter_counts
from nanochat.gpt import GPTConfig
from profiling.predicted.counts import GLUE, LOSS, NORMS, OPTIMIZER, RELU2, SUMS, TABLES, VARIANTS, is_ours, updated

# Norms, residual mix, rotary and QK norm, and their backwards: of plain nanochat as Inductor fuses them; of our kernels
# reads and writes of mix (5 and 7), add (4 and 4), rotary (4 and 6).
NORM_PASSES = {False: 38, True: 30}
RELU2_PASSES = 22  # relu² forward and backward as passes of their own, over 4 x width
# What is rounded to fp8 is read for its largest value, read again, and written in two layouts of half a pass. relu² (4
# wide): its input twice, both copies; backward its gradient and its input twice each, both copies. Then the gradients
# of q, k, v and of both outputs, and the inputs of three products, of which ours are made with their norm where they
# have one (5 and 4 passes forward, which are then not the norms', and the copies).
FP8_RELU2_PASSES, FP8_GRADIENTS = 12 + 20, 3 * 5
FP8_INPUTS = {False: 3 * 3, True: 3 + (5 + 1) + (4 + 1)}
FP8_WEIGHT = 4 + 4 + 2  # bytes of a weight and micro-batch: read twice in float32, written twice

DIFFERENCES = {
    NORMS: "by hand without gates, smear, backout and the sums of the streams' gradients",
    LOSS: "by hand with what products write and read of the logits, or with a second pass over them",
    SUMS: "by hand without fills, and with the cast once a step, which compiled is the optimizer's; of fp8 no weight "
    "is cast, and the head's gradient is added in chunks",
    TABLES: "compiled: the forward's reading too, and tables counted whole",
    OPTIMIZER: "by hand each tensor once; compiled also whether gradients are finite and their zeros, and plain's Muon "
    "in several passes over stacks",
    RELU2: "compiled without the pass that a neighbour's kernel saves",
    GLUE: "relu² and rounding to fp8; compiled with sums that Inductor fuses with them, which by hand are the norms'",
}
COUNTED = ("plain", "ours", "fp8 loop", "fp8 ours")  # variants of counts.py
Row = tuple[str, float, float | None, str]


def moved(config: GPTConfig, tokens: int, micro: int, ours: bool, fp8: bool) -> dict[str, float]:
    """Bytes by part of a step on one GPU: `micro` micro-batches of so many tokens, and the update of all parameters.

    ours: of our step, else of a plain nanochat's under torch.compile; as counts.VARIANTS has them.
    """
    counts = parameter_counts(config)
    matrices, head, tables = counts["transformer_matrices"], counts["lm_head"], counts["wte"] + counts["value_embeds"]
    layers = config.n_layer * micro * tokens * config.n_embd * 2  # one pass in each layer
    # Bytes a parameter and micro-batch: cast (6), gradient widened (6), added to those before it (12); or one cast a
    # step (6), and the gradient added where it is kept: of the head in a pass (12), of matrices in their products. fp8
    # rounds the float32 weights themselves; its loop too adds to the head's gradient where that is kept.
    usual = 12 * micro + 12 * (micro - 1)
    casts = (usual, 12 * micro) if fp8 else (6, 6 + 12 * micro) if ours else (usual, usual)
    # Of a table: zeros and sums in float32 (4 + 4 bytes an entry), cast (2), added to those before (6); or the rows of
    # the incoming gradient once, a third as many again for those that occur, and a table of zeros a step; no sorting.
    looked_up = micro * tokens * tables / config.padded_vocab_size * 2 * 1.33 + 2 * tables
    found = {
        NORMS: (NORM_PASSES[ours] - (9 if ours and fp8 else 0)) * layers,
        LOSS: micro * tokens * config.vocab_size * (6 if ours else 10),
        SUMS: casts[0] * matrices + casts[1] * head,
        TABLES: looked_up if ours else tables * (10 * micro + 6 * (micro - 1)),
        OPTIMIZER: updated(config, ours),
    }  # fmt: skip
    if fp8:
        passes = FP8_RELU2_PASSES + FP8_GRADIENTS + FP8_INPUTS[ours]
        found[GLUE] = passes * layers + FP8_WEIGHT * micro * matrices
    else:
        found[RELU2] = RELU2_PASSES * layers
    return {name: float(size) for name, size in found.items()}


def compared(variant: str, config: GPTConfig, tokens: int, micro: int, counted: dict[str, float]) -> list[Row]:
    """(part, bytes as counted, bytes by hand or None, why the two differ) of a step.

    counted: simulate.moved; of fp8 relu² is counted with what rounds it, where it is made.
    """
    fp8 = bool(VARIANTS[variant][1])
    mine = moved(config, tokens, micro, is_ours(variant), fp8)
    if fp8:
        rest = {name: size for name, size in counted.items() if name not in (RELU2, GLUE)}
        counted = rest | {GLUE: counted.get(RELU2, 0.0) + counted.get(GLUE, 0.0)}
    return [(name, size, mine.get(name), DIFFERENCES[name] if name in mine else "") for name, size in counted.items()]


def against(variant: str, config: GPTConfig, tokens: int, micro: int, counted: dict[str, float]) -> list[str]:
    """Lines of a table of `compared`; none of a variant that was not counted by hand."""
    if variant not in COUNTED:
        return []
    lines = ["  GB of a step on one GPU   compiled  by hand"]
    for name, size, hand, why in compared(variant, config, tokens, micro, counted):
        if hand is not None:
            lines.append(f"  {name:24} {size / 1e9:9.1f} {hand / 1e9:8.1f}  {why}")
    return lines
