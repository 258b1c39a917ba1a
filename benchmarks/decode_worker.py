"""Measures one engine, ours or upstream's, in a process of its own: a batch size a line in, a JSON line out.
A negative one has ours recorded at that size by the profiler, and not measured; why it was not, is an answer too.

Called by scripts/infer_bench.py with the folder from which `nanochat` is imported, and the settings as JSON. Only what
both have in common is asked of them: a model of given sizes, and tokens for a batch of equal prompts.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from worker import serve, sizes

folder, settings = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = folder  # not this file's own folder
if settings["dtype"]:
    os.environ["NANOCHAT_DTYPE"] = settings["dtype"]


def ours() -> tuple[Any, str]:
    from nanochat.engine import Engine, Request, Sampling
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.hardware import can_compile, setup

    hardware = setup()
    compiled = hardware.device.type == "cpu" and can_compile(hardware.device)[0]
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes(settings))).to(hardware.dtype)  # no more memory than the engine wants
    model.to_empty(device=hardware.device)
    model.init_weights(hardware.dtype)
    engines: dict[int, Engine] = {}

    def steps(order: int) -> Any:
        batch = abs(order)
        if batch not in engines:
            engines[batch] = Engine(model, slots=batch, weights=settings["weights"])
            if compiled and (why := engines[batch].compile()):
                raise RuntimeError(f"decoding was not compiled: {why}")
        if order < 0:  # imported only now: it is no part of the memory that was measured
            from nanochat.files import base_dir
            from profiling.recorded.record import engine_recorder

            folder = base_dir() / "infer_bench" / f"batch-{batch}"
            recorder = engine_recorder(
                engines[batch], settings["profile"], f"infer_bench, batch {batch}", folder, hardware
            )
            return recorded(recorder, run(engines[batch], batch))
        return run(engines[batch], batch)

    def recorded(recorder: Any, steps: Any) -> Any:
        yield from steps
        recorder.end()

    def run(engine: Engine, batch: int) -> Any:
        engine.slots.tokens = [[] for _ in range(batch)]  # nothing of the run before
        for i in range(batch):
            prompt = [(7 * j) % 1000 for j in range(settings["prompt_tokens"])]  # one for all, as upstream's can
            engine.submit(Request(prompt, settings["new_tokens"], Sampling(1.0, 50, i)))
        while not engine.idle:
            yield len(engine.step())

    how = ", compiled" if compiled else ""
    weights = settings["weights"] and f", {settings['weights']} weights"
    size = lambda batch: engines[batch].model.lm_head.weight.itemsize
    return (steps, size), f"{hardware.device.type}, {str(hardware.dtype)[6:]}{weights}{how}"


def upstream() -> tuple[Any, str]:
    from nanochat.common import COMPUTE_DTYPE

    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    class Tokenizer:  # special tokens that are never drawn
        encode_special = staticmethod(lambda name: settings["vocab_size"] + 100)
        get_bos_token_id = staticmethod(lambda: settings["vocab_size"] + 100)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes(settings)))
    model.to_empty(device=device)
    model.init_weights()
    engine = Engine(model.eval(), Tokenizer())

    def steps(batch: int) -> Any:
        prompt = [(7 * j) % 1000 for j in range(settings["prompt_tokens"])]
        for column, _ in engine.generate(
            prompt, num_samples=batch, max_tokens=settings["new_tokens"], temperature=1.0, top_k=50
        ):
            yield len(column)

    return (steps, lambda batch: COMPUTE_DTYPE.itemsize), f"{device}, {str(COMPUTE_DTYPE)[6:]}"


def measure(built: tuple[Callable[[int], Any], Callable[[int], int]], batch: int) -> dict[str, Any]:
    """One run: the first token's time, and the rate of the others. Of a recorded one: what was said about it."""
    steps, size = built
    if batch < 0:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                for _ in steps(batch):
                    pass
            except Exception as problem:  # the recorder's own are said by it; what was measured must not be lost
                print(f"infer_bench, batch {-batch}: not recorded: {type(problem).__name__}: {problem}")
        return dict(said=said.getvalue().strip())
    run = steps(batch)  # the engine is made before the clock starts; the work begins with the first step
    started, made, first, first_count = time.perf_counter(), 0, 0.0, 0
    for count in run:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        made += count
        if not first:
            first, first_count = time.perf_counter() - started, count
    rate = (made - first_count) / (time.perf_counter() - started - first)
    return dict(first_ms=1e3 * first, tok_per_s=rate, token_ms=1e3 * batch / rate, weight_bytes=size(batch))


if __name__ == "__main__":
    serve(folder, ours, upstream, measure)
