"""How long do readers wait for a token while others' long prompts are read? In the engine, without a server.

    python -m benchmarks.prefill          # a minute on two cores

Some requests are being written all the time. `quiet`: nothing else happens. `chunks`: long prompts come in between, as
the scheduler takes them in; `at_once`: the same, each read whole in one step. A gap is the time between two tokens of
the same request; the work of the last two is the same, so their tokens per second can be compared. They take turns.
"""

import json
import os
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.load import percentile
from nanochat.engine import Engine, Request, Sampling
from nanochat.flags import flag, number, parse, run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import device_name
from nanochat.hardware import setup as look_at_hardware


@dataclass
class Flags:
    depth: int = number(6, 1, 256, "layers of the model, of random weights")
    width: int = number(384, 128, 1 << 16, "channels; heads are of 128", multiple=128)
    vocab_size: int = number(32768, 2, 1 << 20, "words of the vocabulary")
    streams: int = number(8, 1, 1024, "requests that are being written")
    new_tokens: int = number(200, 2, 1 << 16, "tokens of each")
    prompts: int = number(3, 1, 1024, "long prompts that come in between, of which each makes 8 tokens")
    prompt_tokens: int = number(1000, 2, 1 << 16, "length of each")
    rounds: int = number(3, 1, 1000, "times that each is measured, in turns")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")


def engine_of(flags: Flags) -> Engine:
    hardware = look_at_hardware(flags.device_type)
    torch.manual_seed(0)
    heads = flags.width // 128
    sizes = dict(n_layer=flags.depth, n_head=heads, n_kv_head=heads, n_embd=flags.width)
    length = flags.prompt_tokens + flags.new_tokens + 64
    with hardware.device:
        model = GPT(GPTConfig(sequence_len=length, vocab_size=flags.vocab_size, **sizes))
        model.init_weights(hardware.dtype)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # it begins with zeros: every draw would be a tie
    engine = Engine(model, flags.streams + 2)
    engine.warm()
    return engine


def scene(engine: Engine, flags: Flags, long: int, at_once: bool) -> dict[str, Any]:
    """Gaps in seconds, and tokens read and made per second."""
    engine.slots.forget()
    scheduler = engine.scheduler
    budget, learn = scheduler.budget, scheduler.learn
    if at_once:
        scheduler.budget, scheduler.learn = 1 << 30, lambda *seconds: None  # type: ignore[method-assign]
    draw = lambda length, i: torch.randint(
        flags.vocab_size, (length,), generator=torch.Generator().manual_seed(i)
    ).tolist()
    readers = [engine.submit(Request(draw(8, i), flags.new_tokens, Sampling(1.0, 50, i))) for i in range(flags.streams)]
    due = [flags.new_tokens * (i + 1) // (long + 1) for i in range(long)]  # after so many tokens of the first reader
    engine.step()
    last, gaps, tokens = time.perf_counter(), [], 0
    started = last
    while not engine.idle:
        if due and len(readers[0].output) >= due[0]:
            engine.submit(Request(draw(flags.prompt_tokens, 100 + len(due)), 8, Sampling(1.0, 50, 9)))
            due.pop(0)
        said = engine.step()
        now = time.perf_counter()
        gaps += [now - last] * sum(request in readers for request, _ in said)
        tokens, last = tokens + len(said) + engine.read, now
    if at_once:
        scheduler.budget, scheduler.learn = budget, learn  # type: ignore[method-assign]
    return dict(p50_ms=1e3 * median(gaps), p99_ms=1e3 * percentile(gaps, 0.99), max_ms=1e3 * max(gaps),
                tok_per_s=tokens / (last - started))  # fmt: skip


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    engine = engine_of(flags)
    kinds = dict(quiet=(0, False), at_once=(flags.prompts, True), chunks=(flags.prompts, False))
    scene(engine, flags, *kinds["chunks"])  # so that the budget has found its place
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(flags.rounds):
        for name, kind in kinds.items():
            found[name].append(scene(engine, flags, *kind))
    medians = {name: {key: median(one[key] for one in rounds) for key in rounds[0]} for name, rounds in found.items()}
    for name, row in medians.items():
        print(f"{name}: {', '.join(f'{key} {value:.1f}' for key, value in row.items())}")
    usual = medians["quiet"]["p50_ms"]
    ratios = {f"{name}_p99_over_quiet_p50": medians[name]["p99_ms"] / usual for name in ("at_once", "chunks")}
    machine = device_name(engine.device)
    print(json.dumps(dict(machine=machine, cores=os.cpu_count(), torch=torch.__version__, **vars(flags), **ratios,
                          budget=engine.scheduler.budget, decoding=engine.decoding, found=medians)))  # fmt: skip


if __name__ == "__main__":
    run_script(main)
