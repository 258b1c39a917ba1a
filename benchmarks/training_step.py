"""A training step end to end with our kernels on and off, both under torch.compile, in one process, in turns.

    python -m benchmarks.training_step --depth 12 --batch 16

Both start from the same weights and read the same tokens. The losses of every step are compared first; where they part,
no speed is printed. On a CPU no kernel of ours runs, so there is nothing to switch: eager is compared with compiled.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import timer
from benchmarks.environment import environment
from benchmarks.our_step import our_step, rows
from kernels import use
from nanochat.errors import UserError
from nanochat.flags import number, parse, run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import Hardware, can_compile, setup
from nanochat.presets import SHARE, predicted
from nanochat.recipe import model_config
from nanochat.replay import PLAIN

SMALL = dict(depth=4, vocab_size=4096, sequence_len=256, batch=4)  # the defaults on a CPU
WARM = PLAIN + 1  # steps that are not timed: the last is captured as a graph, on a GPU
MOST_ROWS = 16
PARTED = 0.02  # relative difference of two losses at the same step that rounding does not explain


@dataclass
class Flags:
    depth: int = number(12, 1, 1000, "layers of the model; 64 channels each, rounded up to whole heads of 128")
    vocab_size: int = number(32768, 1, 1 << 24, "words of the vocabulary")
    sequence_len: int = number(2048, 1, 1 << 20, "tokens of context")
    batch: int = number(0, 0, 1 << 16, f"rows of a step; 0: {MOST_ROWS}, or as many as fit, as predicted")
    steps: int = number(15, 3, 10_000, "steps that are timed, after three that compile, warm up and are captured")
    minutes: float = number(60.0, 0.01, 1e5, "time for all of it: what is late takes fewer steps, but at least 3")


def config(flags: Flags) -> dict[str, Any]:
    """The arguments of a GPTConfig: a training's of this depth."""
    return asdict(model_config(flags.depth, flags.vocab_size, flags.sequence_len))


def fitting(flags: Flags, hardware: Hardware, settings: Iterable[str]) -> int:
    """Rows of a step for which models of all these settings of the kernels have room at once, with their graphs.

    As predicted; at least 1.
    """
    sizes, dtype, room = GPTConfig(**config(flags)), str(hardware.dtype)[6:], SHARE * hardware.memory / 2**30
    needed = lambda rows: sum(predicted(sizes, rows, 1, dtype, setting) for setting in settings)
    found = MOST_ROWS
    while found > 1 and needed(found) > room:
        found //= 2
    return found


def contenders(hardware: Hardware) -> tuple[dict[str, tuple[str, bool]], str]:
    """(name → (setting of kernels.use, compiled), what is compared). The first is what the others are measured by."""
    able, why = can_compile(hardware.device)
    if hardware.device.type == "cuda":
        how = "compiled" if able else f"eager ({why})"
        return {"kernels off": ("torch", able), "kernels on": ("auto", able)}, f"our kernels on and off, both {how}"
    if not able:
        raise UserError(f"on a CPU eager is compared with compiled, but {why}")
    said = "no kernel of ours runs on a CPU, so nothing is switched: eager beside compiled"
    return {"eager": ("torch", False), "compiled": ("torch", True)}, said


def turns(steps: dict[str, Callable[[], float]], flags: Flags, hardware: Hardware) -> dict[str, dict[str, list[float]]]:
    """Loss, seconds and memory (MB above what lay there before; empty on a CPU) of every step, in turns."""
    found = {name: dict(losses=[], seconds=[], extra_mb=[]) for name in steps}  # type: dict[str, dict[str, list[float]]]
    ends = time.perf_counter() + 60 * flags.minutes
    for turn in range(flags.steps + WARM):
        for name, step in steps.items():
            before = 0
            if hardware.device.type == "cuda":
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            found[name]["losses"].append(step())
            hardware.synchronize()  # the loss is known before the backward is done
            found[name]["seconds"].append(time.perf_counter() - started)
            if hardware.device.type == "cuda":
                found[name]["extra_mb"].append((torch.cuda.max_memory_allocated() - before) / 2**20)
        if turn >= WARM + 2 and time.perf_counter() > ends:
            break
    return found


def parity(losses: dict[str, list[float]]) -> tuple[float, bool]:
    """(largest relative difference of the losses at the same step, whether all are as near as rounding explains).

    The difference is of losses that are finite; one that is not is never near.
    """
    usual, *others = losses.values()
    pairs = [(a, b) for other in others for a, b in zip(other, usual)]
    finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    together = len(finite) == len(pairs) and all(abs(a - b) <= PARTED * abs(b) for a, b in pairs)
    return max((abs(a - b) / abs(b) for a, b in finite if b), default=0.0), together


def run(flags: Flags, hardware: Hardware) -> dict[str, Any]:
    """The result as JSON-ready data; without speeds when the losses part."""
    names, what = contenders(hardware)
    batch = flags.batch or fitting(flags, hardware, [setting for setting, _ in names.values()])
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(**config(flags)))
    model.to_empty(device="cpu")
    model.init_weights()
    weights = model.state_dict()
    data = lambda: rows(batch, flags.sequence_len, flags.vocab_size, flags.steps + WARM)
    steps = {
        name: use(setting)(our_step(config(flags), weights, hardware, data(), batch, compiled))
        for name, (setting, compiled) in names.items()
    }
    del model, weights
    found = turns(steps, flags, hardware)
    apart, together = parity({name: part["losses"] for name, part in found.items()})
    parted = f"the losses part by up to {apart:.2%}" if apart > PARTED else "a loss is not finite"
    result: dict[str, Any] = dict(
        what=what, sizes=config(flags), batch=batch, dtype=str(hardware.dtype)[6:], loss_difference=apart,
        allowed_difference=PARTED, status="timed" if together else "failed", why="" if together else parted, rows=[],
    )  # fmt: skip
    usual = statistics.median(next(iter(found.values()))["seconds"][WARM:])
    for name, part in found.items():
        losses = [loss if math.isfinite(loss) else None for loss in part["losses"]]  # JSON has no NaN
        row: dict[str, Any] = dict(contender=name, losses=losses)
        if together:
            low, middle, high = timer.quartiles(part["seconds"][WARM:])
            tokens = batch * flags.sequence_len
            row.update(step_ms=1e3 * middle, q1_ms=1e3 * low, q3_ms=1e3 * high, tok_per_s=tokens / middle)
            row.update(times_first=usual / middle, first_step_s=part["seconds"][0])
            if part["extra_mb"]:
                row["extra_mb"] = max(part["extra_mb"][1:])
        result["rows"].append(row)
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """For the terminal and the report."""
    if result["status"] == "failed":
        return [f"Training step: no speed is given, {result['why']}."]
    said = f"losses differ by at most {result['loss_difference']:.2%} (allowed {result['allowed_difference']:.0%})"
    found = [f"Training step of {result['batch']} rows, {result['what']}; {said}."]
    for row in result["rows"]:
        memory = f", {row['extra_mb']:,.0f} MB beyond what lies there between steps" if "extra_mb" in row else ""
        found.append(
            f"{row['contender']}: {row['tok_per_s']:,.0f} tok/s, {row['step_ms']:.1f} ms a step, "
            f"{row['times_first']:.2f} times {result['rows'][0]['contender']}{memory}"
        )
    return found


def main() -> None:
    flags = parse(Flags, __doc__ or "", defaults=Flags() if torch.cuda.is_available() else Flags(**SMALL))
    result = run(flags, setup())
    print("\n".join(lines(result)))
    print(json.dumps(dict(environment=environment(), **result)))


if __name__ == "__main__":
    run_script(main)
