"""Times several things against each other: in turns, with cold caches, and without the host's part on a GPU.

The clock and the turns are the tuner's (kernels/tuning.py). A clock that drifts by a fifth while a card warms up meets
all contenders alike, so their ratio holds although no single time does. `replayed` is the other way to time: a CUDA
graph replayed back to back, no launch cost at all, and the L2 cache warm from the replay before.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kernels import tuning
from nanochat.capture import captured

WARMUP = 1  # turns that are not counted; everything has run before
LEAST = 3  # turns that are counted however late it is
REPLAYS = 20

Prepared = Callable[[], Callable[[], Any]]  # does what is not timed, returns what is


def in_turns(prepared: dict[str, Prepared], seconds: float, most: int, clock: tuning.Clock) -> dict[str, list[float]]:
    """Milliseconds of each by name: `most` turns, fewer when `seconds` are over, at least LEAST."""
    taken: dict[str, list[float]] = {name: [] for name in prepared}
    ends = time.perf_counter() + seconds
    rounds = itertools.islice(tuning.turns(list(prepared.values()), clock), WARMUP, None)
    for count, times in enumerate(rounds, 1):
        for samples, ms in zip(taken.values(), times):
            samples.append(ms)
        if count >= most or (count >= LEAST and time.perf_counter() >= ends):
            break
    return taken


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """(lower, median, upper)."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def replayed(prepare: Prepared) -> float:
    """Milliseconds of one of many replays of the call as a CUDA graph, L2 warm. Raises what capturing raises."""
    graph, _ = captured(prepare, torch.cuda.graph_pool_handle(), 1)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPLAYS
