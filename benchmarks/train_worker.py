"""Trains one implementation, ours or upstream's, in a process of its own: a number of steps a line in, a JSON line out.

Called by benchmarks/vs_upstream.py with the folder from which `nanochat` is imported, and the settings as JSON. Both
start from the same weights (the names in the state dict are the same), read the same tokens and use the same learning
rates; each takes the step as its own training script does.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from our_step import WARMUP, our_evaluation, our_step, rows
from safetensors.torch import load_file
from worker import serve, sizes

folder, settings = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = folder  # not this file's own folder
if settings["dtype"]:
    os.environ["NANOCHAT_DTYPE"] = settings["dtype"]
if settings["threads"]:
    torch.set_num_threads(settings["threads"])
B, T, V = settings["batch"], settings["sequence_len"], settings["vocab_size"]
DATA = B, T, V, settings["steps"] + 3  # those that warm up


def ours() -> tuple[Callable[[], float], str]:
    from nanochat.hardware import can_compile, setup

    hardware = setup()
    compiled = settings["compile"] and can_compile(hardware.device)[0]
    weights = load_file(settings["weights_file"])
    if settings.get("evaluate"):
        step = our_evaluation(sizes(settings), weights, hardware, rows(*DATA))
        return step, f"{str(hardware.dtype)[6:]}, eager"
    step = our_step(sizes(settings), weights, hardware, rows(*DATA), B, compiled)
    return step, f"{str(hardware.dtype)[6:]}, {'compiled' if compiled else 'eager'}"


def upstream() -> tuple[Callable[[], float], str]:
    from nanochat.common import COMPUTE_DTYPE
    from nanochat.flash_attention import USE_FA3

    from nanochat.gpt import GPT, GPTConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes(settings)))
    model.to_empty(device=device)
    model.init_weights()
    model.load_state_dict(load_file(settings["weights_file"]))
    optimizer = model.setup_optimizer()
    runs = torch.compile(model, dynamic=False) if settings["compile"] else model
    data = rows(*DATA)
    numbers = itertools.count(1)

    def step() -> float:
        x, y = (part.to(device, non_blocking=True) for part in next(data))
        loss = runs(x, y)
        loss.backward()
        warm = min(1.0, next(numbers) / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * warm
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    attention = "FA3" if USE_FA3 else "SDPA"
    return step, f"{str(COMPUTE_DTYPE)[6:]}, {'compiled' if settings['compile'] else 'eager'}, {attention}"


def measure(step: Callable[[], float], count: int) -> dict[str, Any]:
    """So many steps; each ends with its loss on the CPU, the last with all work done: ours tells a loss before that."""
    started, losses = time.perf_counter(), [step() for _ in range(count)]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return dict(tok_per_s=count * B * T / (time.perf_counter() - started), losses=losses)


if __name__ == "__main__":
    serve(folder, ours, upstream, measure)
