"""A training step predicted from shapes: `python -m profiling simulate --depth 24 --card H100 --gpus 8`.

Nothing is run. The time of a step is the sum of its parts, each FLOPs or bytes over what the card reaches of its peak
(cards.py; as measured where the card was calibrated): matrix products, attention, passes over activations
and weights, the optimizer, and what of the communication is not hidden. `levers` are the things that can be done about
a part; the table at the end switches them on one after the other: which change saves how much. Every figure is
PREDICTED, ±15% for a step where nothing was measured on the card (see points.py for the comparison with
published steps).
"""

import json
from dataclasses import dataclass, replace

from nanochat.cost import attended, flops_per_token, linear_params, meta_model, parameter_counts, training_bytes
from nanochat.errors import UserError
from nanochat.flags import MANY, flag, number, parse
from nanochat.gpt import GPTConfig
from nanochat.recipe import model_config
from profiling.predicted.cards import Card, all_reduce, card

BAND = 0.15

# Passes over the activations, in units of tokens x width x 2 bytes, forward and backward together, per layer, as
# torch.compile writes them: counted from nanochat's graph at depth 24.
NORMS = 38  # norms, residual mix, rotary, QK norm, and their backwards
RELU2 = 22  # relu² forward and backward as passes of their own, over 4 x width
FP8_GLUE, FP8_GLUE_FUSED = 60, 17  # amax, rounding, transposes: passes of their own, or in the producers

# What no part explains (gaps between kernels, clocks below the data sheet's, the host), as a share of the rest: fitted
# on one published step, nanochat's d24 in bf16 on 8 H100 (points.py).
REST = 0.098

LEVERS = {
    "relu2": "relu² inside the products",
    "norms": "norm kernels at full bandwidth instead of 75% of it",
    "weights": "weights cast once a step, gradients added where they are kept",
    "embeddings": "embedding gradients by the rows that occur",
    "optimizer": "optimizer banks without copies",
    "head": "the head and its loss in chunks",
    "fp8_glue": "fp8's amax, rounding and transposes in the kernels that make the values",
}


@dataclass(frozen=True)
class Job:
    """What is trained on what. batch: rows per GPU at a time; total: tokens of a step, all GPUs together."""

    config: GPTConfig
    card: Card
    gpus: int = 8
    batch: int = 16
    total: int = 524288
    fp8: bool = False
    levers: frozenset[str] = frozenset()
    short: int | None = None  # tokens of a short window, where it is not the config's quarter of the context


def step(job: Job) -> dict[str, float]:
    """Seconds by part of an optimizer step; their sum is the step."""
    config, chip = job.config, job.card
    T, C, L = config.sequence_len, config.n_embd, config.n_layer
    share = job.total // job.gpus  # tokens of a GPU
    micro = max(1, share // (job.batch * T))
    counts = parameter_counts(config)
    linears = linear_params(config)
    stream = chip.stream
    unit = share * C * 2 / stream
    on = job.levers
    tables = counts["wte"] + counts["value_embeds"]
    matrices = counts["transformer_matrices"]
    parts = {"products": 6 * share * linears / chip.products(job.fp8)}
    forward = 4 * config.n_head * config.head_dim * attended(config, job.short) * share
    parts["attention"] = forward / (chip.attention * chip.bf16) * (1 + 2.5 / 0.8)  # backward: 2.5 times the FLOPs
    parts["norms, rotary"] = NORMS * L * unit / (1.0 if "norms" in on else 0.75)
    parts["relu²"] = (4 if "relu2" in on else RELU2) * L * unit
    if job.fp8:
        parts["fp8 glue"] = (FP8_GLUE_FUSED if "fp8_glue" in on else FP8_GLUE) * L * unit
    parts["loss"] = share * config.vocab_size * (6 if "head" in on else 10) / stream
    # Bytes a parameter and micro-step: cast (6), gradient widened (6), added to those before it (12); or one cast a
    # step (6), and the gradient written (6) or added (10) where it is kept.
    casts = (6 + 6 + 10 * (micro - 1)) / micro if "weights" in on else (12 * micro + 12 * (micro - 1)) / micro
    parts["weights, gradients"] = micro * casts * (matrices + counts["lm_head"]) / stream
    # Of a table: zeros and sums in float32 (4 + 4 bytes an entry), cast (2), added to those before (6); or the rows of
    # the incoming gradient once, a third as many again for those that occur, and a table of zeros a step; no sorting.
    looked_up = share * tables / config.padded_vocab_size * 2 * 1.33 + 2 * tables
    dense = tables * (10 * micro + 6 * (micro - 1))
    parts["embedding gradients"] = (looked_up if "embeddings" in on else dense) / stream
    parts["optimizer"] = optimizer(job, matrices, counts["lm_head"], tables)
    if job.gpus > 1:
        wire = sum(all_reduce(chip, size, job.gpus) for size in messages(config))
        parts["communication, exposed"] = 0.7 * wire  # reductions run beside the updates
    parts["gaps, clocks, the rest"] = REST * sum(parts.values())
    return parts


def messages(config: GPTConfig) -> list[int]:
    """Bytes of the gradients that travel at a time, as nanochat/optim.py has them; the new values come back alike.

    Matrices of one shape go together, in float32; the head and the bfloat16 embedding tables each alone.
    """
    stacks: dict[tuple[int, ...], int] = {}
    alone = []
    for name, p in meta_model(config).named_parameters():
        if name.startswith("transformer.h"):
            stacks[tuple(p.shape)] = stacks.get(tuple(p.shape), 0) + 4 * p.numel()
        elif p.ndim > 1:
            alone.append((4 if name.startswith("lm_head") else 2) * p.numel())
    return [*stacks.values(), *alone]


def optimizer(job: Job, matrices: int, head: int, tables: int) -> float:
    """Muon's products (five steps of three products per matrix, shared by the GPUs) and the passes over all state."""
    C = job.config.n_embd
    flops = 5 * 2 * matrices * C * 2 + 5 * 2 * C * matrices / 2  # X·Xᵀ and A·X see every entry; A·A the small side
    passes = 40 * matrices + 28 * head + 12 * tables  # bytes: momentum, variance, weights, products' operands
    copies = 0 if "optimizer" in job.levers else 24 * matrices
    return (flops / job.card.products() + (passes + copies) / job.card.stream) / job.gpus


def seconds(job: Job) -> float:
    return sum(step(job).values())


def mfu(job: Job, took: float) -> float:
    """As nanochat counts, against the bf16 peak."""
    return flops_per_token(job.config) * job.total / took / (job.card.bf16 * job.gpus)


def what_if(job: Job) -> list[tuple[str, float]]:
    """(what, predicted seconds of the step) with the levers switched on one after the other, most saving first."""
    found = [("as torch.compile does it", seconds(job))]
    other = "weights" if job.fp8 else "fp8_glue"  # fp8 rounds the float32 weights themselves
    left = [lever for lever in LEVERS if lever not in job.levers and lever != other]
    while left:
        best = min(left, key=lambda lever: seconds(replace(job, levers=job.levers | {lever})))
        left.remove(best)
        job = replace(job, levers=job.levers | {best})
        found.append((f"+ {LEVERS[best]}", seconds(job)))
    return found


@dataclass
class Flags:
    depth: int = number(24, 1, 1000, "layers of the model; width and heads follow")
    card: str = flag("H100", "which card")
    gpus: int = number(8, 1, 8, "how many of them; links between machines are not modelled")
    device_batch_size: int = number(16, 1, 1 << 16, "rows per GPU at a time")
    total_batch_size: int = number(524288, 1, MANY, "tokens of a step")
    max_seq_len: int = number(2048, 1, 1 << 20, "tokens of context")
    window_pattern: str = flag("SSSL", "attention windows: L full, S a quarter")
    fp8: bool = flag(False, "multiply in fp8")
    levers: str = flag("", f"switched on from the start, comma-separated: {', '.join(LEVERS)}")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    on = frozenset(filter(None, flags.levers.split(",")))
    if unknown := on - set(LEVERS):
        raise UserError(f"--levers: none is called {', '.join(sorted(unknown))}; there are {', '.join(LEVERS)}")
    chip = card(flags.card)
    if flags.fp8 and not chip.fp8:
        raise UserError(f"--fp8: a {chip.name} has no fp8 units")
    rows = flags.device_batch_size * flags.max_seq_len * flags.gpus
    if flags.total_batch_size < rows or flags.total_batch_size % rows:
        raise UserError(
            f"--total-batch-size {flags.total_batch_size} is no multiple of the {rows} tokens run at a time"
        )
    config = model_config(flags.depth, 32768, flags.max_seq_len, window_pattern=flags.window_pattern)
    tokens, fp8 = flags.device_batch_size * flags.max_seq_len, "current" if flags.fp8 else ""
    needed = training_bytes(config, tokens, flags.gpus, fp8=fp8)
    if needed > chip.capacity:
        raise UserError(
            f"--device-batch-size {flags.device_batch_size} at depth {flags.depth} is predicted to need "
            f"{needed / 2**30:.0f} GiB, and a {chip.name} has {chip.capacity / 2**30:.0f}; take fewer rows or layers"
        )
    job = Job(config, chip, flags.gpus, flags.device_batch_size, flags.total_batch_size, flags.fp8, on)
    parts = step(job)
    took = sum(parts.values())
    print(
        f"PREDICTED, ±{BAND:.0%}: d{flags.depth} on {flags.gpus} x {chip.name}, {'fp8' if flags.fp8 else 'bf16'}, "
        f"{job.total // rows} x {flags.device_batch_size} rows a GPU; {chip.constants}\n"
    )
    for name, part in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {name:24} {1e3 * part:8.1f} ms  {part / took:6.1%}  {'#' * round(50 * part / took)}")
    print(f"  {'step':24} {1e3 * took:8.1f} ms, {job.total / took:,.0f} tokens/s, MFU {mfu(job, took):.1%}\n")
    changes = what_if(job)
    for (name, now), (_, before) in zip(changes, [changes[0], *changes]):
        print(f"  {name:78} {1e3 * now:8.1f} ms  {1e3 * (now - before):+7.1f}")
    steps = [dict(what=name, seconds=value) for name, value in changes]
    print(
        json.dumps(
            dict(
                vars(flags),
                predicted=True,
                calibrated=chip.calibrated,
                band=BAND,
                step_s=took,
                parts_s=parts,
                what_if=steps,
            )
        )
    )
