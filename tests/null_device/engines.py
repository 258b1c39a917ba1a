"""Run on cards of the computing null device: engines on each, in threads, answer as one on the CPU does."""

import sys
import threading
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import tiny  # noqa: E402

from nanochat.engine import Engine, Request  # noqa: E402
from nanochat.engine.sampling import Sampling  # noqa: E402
from profiling.compiled.null_bindings import used  # noqa: E402

warnings.filterwarnings("error", "decoding without CUDA graphs")  # it would go on without them: not here


devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
models = {device: tiny.model().to(device) for device in ("cpu", *devices)}  # here: a seed is not a thread's own


def answers(device: str) -> list[list[int]]:
    """Tokens of seven requests of several kinds, which join and leave four slots."""
    engine = Engine(models[device], slots=4)
    wishes = [Sampling(temperature=0.0), Sampling(temperature=0.0, logprobs=3), Sampling(temperature=0.8, seed=3)]
    wishes += [Sampling(temperature=1.0, seed=5)]
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9], [10], [3, 4] * 5, [5, 6, 7, 8], [200, 100], [5, 6]]
    requests = [engine.submit(Request(p, 6 + i, wishes[i % 4])) for i, p in enumerate(prompts)]
    requests[1].force([42, 43])
    while not engine.idle:
        engine.step()
    return [request.output for request in requests]


wanted = answers("cpu")
found: dict[str, list[list[int]]] = {}


def run(device: str) -> None:
    torch.cuda.set_device(device)
    found[device] = answers(device)


threads = [threading.Thread(target=run, args=(device,)) for device in devices]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert all(len(tokens) > 1 for tokens in wanted)
for device, tokens in found.items():
    assert tokens == wanted, (device, tokens, wanted)
assert len(found) == len(threads)
captured, replayed = ({index for what, index in used if what == word} for word in ("capture", "replay"))
assert captured == replayed == set(range(len(threads))), (captured, replayed)
print("engines: as wanted")
