"""Captures a call as a CUDA graph: a decode step (nanochat/engine/graphs.py), a micro-batch (nanochat/replay.py).

Source: torch's notes on CUDA graphs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

CAPTURING = threading.Lock()  # torch captures one graph at a time, whichever thread and card it is for
T = TypeVar("T")
# Whether a graph whose capture failed keeps its hold on the pool's memory for ever: torch's issue 190348, mended since,
# and in ROCm's builds. What is let go twice would be taken from other graphs.
KEEPS_POOL = torch.__version__.startswith(("2.11.", "2.12.", "2.13.0")) and not torch.version.hip


class _Streams(threading.local):
    """A thread's streams to capture on, by card."""

    def __init__(self) -> None:
        self.of: dict[int, torch.cuda.Stream] = {}


_STREAMS = _Streams()


def stream_of(card: int) -> torch.cuda.Stream:
    """This thread's to capture on. torch.cuda.graph's own is one for the whole process, on the card that came first.

    Kept, as torch keeps cuBLAS's workspace, some 32 MiB, for each stream that it was ever used on; a thread's own, as
    what another launches on a stream that captures would be captured too.
    """
    if card not in _STREAMS.of:
        _STREAMS.of[card] = torch.cuda.Stream(torch.device("cuda", card))
    return _STREAMS.of[card]


@contextmanager
def on_this_stream() -> Iterator[None]:
    """Within it autograd runs nodes that an earlier backward has left on the stream that captures, not on their own,
    which would be an error (from torch 2.13 on). For the whole process: within CAPTURING.

    Not those of parameters that get no gradient in backward, as where it adds to one that is kept (torch's issue
    189977): of these no node may outlive a step, so nobody keeps a loss.
    """
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", lambda enabled: None)
    override(True)
    try:
        yield
    finally:
        override(False)


def empty_cache() -> None:
    """As torch's, after a failure that one of its own must not hide."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def captured(prepare: Callable[[], Callable[[], T]], pool: Any, warm: int) -> tuple[torch.cuda.CUDAGraph, T]:
    """(the graph of a call, what it returned) on the current card, captured after `warm` runs on the same stream.

    `prepare` does what shall not be in the graph and returns the call. Raises what capturing raises; then too the
    thread's stream is the one before, the allocator is not left capturing, and `empty_cache` frees what was reserved,
    as soon as the exception is gone.
    """
    held = False  # whether the graph has a hold on the pool
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    stream = stream_of(torch.cuda.current_device())
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # torch.cuda.graph leaves its own behind when a capture fails
        for _ in range(warm):  # a graph must not be the first to run it
            prepare()()
        call = prepare()
        try:
            mode = "thread_local"  # others allocate meanwhile
            with CAPTURING, on_this_stream(), torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
                held = True
                result = call()
        except BaseException:
            card = torch.cuda.current_device()
            # Where ending a capture fails, torch (2.11, 2.13) goes before it tells its allocator, which from then on
            # asserts in empty_cache. It raises where it was told.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(card, pool)
                held = True
            with suppress(Exception):
                graph.pool()  # raises unless the capture ended well: only the call failed, and the graph lets go itself
                held = False
            if held and KEEPS_POOL:
                with suppress(Exception):
                    torch._C._cuda_releasePool(card, pool)
            _STREAMS.of.clear()  # it may be capturing still
            raise
    before.wait_stream(stream)
    return graph, result
