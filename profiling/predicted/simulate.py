"""A training step predicted: `python -m profiling simulate --depth 24 --card H100 --gpus 8`.

Nothing is run. Each part's launches, bytes and FLOPs are those of the compiled step (counts.py); its time is bytes or
FLOPs over what the card reaches of its peak (cards.py; as measured where the card was calibrated). Attention's is of
the pairs that a window leaves; communication is what is not hidden. The table at the end goes from a plain nanochat to
our step. Every time is PREDICTED, ±15% for a step where nothing was measured on the card (points.py has the comparison
with published steps).
"""

import json
from dataclasses import dataclass, replace

from nanochat.cost import attended, flops_per_token, meta_model, training_bytes
from nanochat.errors import UserError
from nanochat.flags import MANY, flag, number, parse
from nanochat.gpt import GPTConfig
from nanochat.recipe import model_config
from profiling.predicted import by_hand, counts
from profiling.predicted.cards import Card, all_reduce, card
from profiling.predicted.counts import (
    ATTENTION,
    FIRST,
    FP8_PRODUCTS,
    LATER,
    ORTHOGONAL,
    PRODUCTS,
    UPDATE,
    VARIANTS,
    Sums,
    counted,
)
from profiling.predicted.predict import BACKWARD

BAND = 0.15

# What no part explains (gaps between kernels, clocks below the data sheet's, the host), as a share of the rest: fitted
# on one published step, nanochat's d24 in bf16 on 8 H100 (points.py).
REST = 0.105

# Variant → what its step has beyond another's, and which that is.
STEPS = {
    "plain": ("a plain nanochat under torch.compile", ""),
    "ours": ("+ our training loop and kernels, but relu² in passes of its own", "plain"),
    "relu2": ("+ relu² inside our products, if they are as fast as the library's", "ours"),
    "template": ("or relu² inside Inductor's templates, if those are", "ours"),
    "fp8 loop": ("our training loop in fp8, with PyTorch's ops under torch.compile", ""),
    "fp8 torch-mlp": ("+ our kernels, but the MLP's", "fp8 loop"),
    "fp8 ours": ("+ the MLP's: relu² made where it is rounded, in fp8 only", "fp8 torch-mlp"),
}


@dataclass(frozen=True)
class Job:
    """What is trained on what. batch: rows per GPU at a time; total: tokens of a step, all GPUs together."""

    config: GPTConfig
    card: Card
    gpus: int = 8
    batch: int = 16
    total: int = 524288
    variant: str = "plain"  # of counts.VARIANTS
    short: int | None = None  # tokens of a short window, where it is not the config's quarter of the context

    @property
    def fp8(self) -> bool:
        return bool(VARIANTS[self.variant][1])

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a GPU."""
        return self.batch * self.config.sequence_len

    @property
    def micro(self) -> int:
        """Micro-batches of a step."""
        return max(1, self.total // self.gpus // self.tokens)

    @property
    def sums(self) -> Sums:
        return counted(self.variant, self.config, self.tokens)

    @property
    def times(self) -> dict[str, float]:
        """How often a step has each phase of `sums`; the update is shared by the GPUs."""
        return {FIRST: 1, LATER: self.micro - 1, UPDATE: 1 / self.gpus}


def step(job: Job) -> dict[str, float]:
    """Seconds by part of an optimizer step; their sum is the step."""
    config, chip = job.config, job.card
    parts: dict[str, float] = {}
    for phase, cells in job.sums.items():
        for name, (_, moved, flops) in cells.items():
            shown = {FP8_PRODUCTS: PRODUCTS, ORTHOGONAL: counts.OPTIMIZER}.get(name, name)
            took = max(moved / chip.stream, flops / chip.products(name == FP8_PRODUCTS))
            parts[shown] = parts.get(shown, 0.0) + job.times[phase] * took
    forward = 4 * config.n_head * config.head_dim * attended(config, job.short) * job.tokens * job.micro
    parts[ATTENTION] = forward / (chip.attention * chip.bf16) * (1 + 2.5 / BACKWARD)  # with 2.5 times its FLOPs
    if job.gpus > 1:
        wire = sum(all_reduce(chip, size, job.gpus) for size in messages(config))
        parts["communication, exposed"] = 0.7 * wire  # reductions run beside the updates
    parts["gaps, clocks, the rest"] = REST * sum(parts.values())
    return parts


def moved(job: Job) -> dict[str, float]:
    """Bytes by part of a step on one GPU, with the update of all parameters."""
    found: dict[str, float] = {}
    for phase, cells in job.sums.items():
        for name, (_, size, _) in cells.items():
            found[name] = found.get(name, 0.0) + (1 if phase == UPDATE else job.times[phase]) * size
    return found


def streamed(job: Job) -> tuple[float, float]:
    """(bytes, launches) of a micro-batch; bytes of what is no product or attention."""
    cells = job.sums[LATER]
    skip = (PRODUCTS, FP8_PRODUCTS, ATTENTION)
    return sum(cell[1] for name, cell in cells.items() if name not in skip), sum(cell[0] for cell in cells.values())


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


def seconds(job: Job) -> float:
    return sum(step(job).values())


def mfu(job: Job, took: float) -> float:
    """As nanochat counts, against the bf16 peak."""
    return flops_per_token(job.config) * job.total / took / (job.card.bf16 * job.gpus)


def what_if(job: Job) -> list[tuple[str, Job]]:
    """(what a step has beyond the one before it, the step) of all variants in the job's precision."""
    same = [name for name in STEPS if bool(VARIANTS[name][1]) == job.fp8]
    return [(STEPS[name][0], replace(job, variant=name)) for name in same]


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
    variant: str = flag("ours", f"which step: {', '.join(name for name in VARIANTS if name[:3] != 'fp8')}")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    variant = f"fp8 {flags.variant}" if flags.fp8 else flags.variant
    if variant not in VARIANTS:
        raise UserError(f"--variant {flags.variant!r}: there is no {variant!r}; there are {', '.join(VARIANTS)}")
    chip = card(flags.card)
    if flags.fp8 and not chip.fp8:
        raise UserError(f"--fp8: the {chip.name} has no fp8 units")
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
    job = Job(config, chip, flags.gpus, flags.device_batch_size, flags.total_batch_size, variant)
    parts = step(job)
    took = sum(parts.values())
    print(
        f"PREDICTED, ±{BAND:.0%}: d{flags.depth} on {flags.gpus} x {chip.name}, {'fp8' if flags.fp8 else 'bf16'}, "
        f"{variant}, {job.micro} x {flags.device_batch_size} rows a GPU; {chip.constants}\n"
    )
    for name, part in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {name:24} {1e3 * part:8.1f} ms  {part / took:6.1%}  {'#' * round(50 * part / took)}")
    print(f"  {'step':24} {1e3 * took:8.1f} ms, {job.total / took:,.0f} tokens/s, MFU {mfu(job, took):.1%}\n")
    checked = by_hand.against(variant, config, tokens, job.micro, moved(job))
    print("\n".join(checked), "\n")
    table = [(what, seconds(other), *streamed(other)) for what, other in what_if(job)]
    print(f"  {'':74} {'step':>11}  of a micro-batch: streamed, launches")
    for what, now, size, launches in table:
        print(f"  {what:74} {1e3 * now:8.1f} ms  {size / 1e9:8.2f} GB  {launches:6.0f}")
    steps = [dict(what=what, seconds=now, streamed_bytes=size) for what, now, size, _ in table]
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
