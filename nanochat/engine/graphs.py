"""One more token for every running row on a GPU: the model of gpt.py, captured once as a CUDA graph and replayed.

A step of a small model is a thousand launches of a few microseconds each; replayed as one graph they cost one launch.
A graph is for a fixed number of rows and fixed memory, so there is one for each power of two of rows, made by `warm` or
when it is first needed; rows beyond the running ones are idle. Attention is given the whole cache, of which each row's
start says how many keys it sees: an idle row only its first one.

Source: CUDA graphs for decoding as in gpt-fast and vLLM; how to capture: torch's notes on CUDA graphs.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kernels import flash_attention_decode
from nanochat.capture import captured, empty_cache
from nanochat.engine.cache import Slots
from nanochat.engine.sampling import moved
from nanochat.gpt import GPT

WARM = 3  # runs before a capture: kernels are compiled and probed in them


class Static:
    """The `Cache` of a captured step: what changes from step to step lies in tensors that stay where they are.

    `start` is where a row's new token stands, `at` where its key and value are written: for an idle row 0, so that it
    sees one key, and the cache's end, where nothing is ever kept.
    """

    def __init__(self, slots: Slots, rows: int):
        device, self.end = slots.k.device, slots.k.size(2) - 1
        self.slots, self.rows = slots, rows
        self._inputs = torch.zeros((3, rows + rows % 2), dtype=torch.int64, device=device)  # each 16-byte aligned
        self.start, self.at = self._inputs[1, :rows], self._inputs[2, :rows]  # (B,)
        self.tokens = self._inputs[0, :rows, None]  # (B, 1)
        self.previous = slots.previous[:rows]  # (B, 1, C)
        self._rows = torch.arange(rows, device=device)
        self.set_inputs([], [])

    def set_inputs(self, tokens: list[int], lengths: list[int]) -> None:
        """The first rows' next tokens, and how many they have; the other rows are idle."""
        idle = self._inputs.size(1) - len(tokens)
        inputs = [[*tokens, *[0] * idle], [*lengths, *[0] * idle], [*lengths, *[self.end] * idle]]
        self._inputs.copy_(moved(inputs, torch.int64, self._inputs.device))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        keys, values = self.slots.k[layer, : self.rows], self.slots.v[layer, : self.rows]
        keys[self._rows, self.at] = k[:, 0]
        values[self._rows, self.at] = v[:, 0]
        return flash_attention_decode(q, keys, values, self.start, window=window)


class Graphs:
    """Decode steps over the first rows of the slots. `problem` says why they run without graphs, where they do."""

    def __init__(self, model: GPT, slots: Slots):
        self.model, self.slots, self.device = model, slots, slots.k.device
        self.problem = "" if self.device.type == "cuda" else "not on CUDA"
        self._made: dict[int, tuple[Static, torch.cuda.CUDAGraph | None, Tensor | None]] = {}

    @cached_property
    def pool(self) -> Any:
        """Memory that the graphs share: no two run at the same time."""
        return torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def warm(self) -> None:
        """Makes all graphs that can be needed, the largest first: the others then find memory that it has left."""
        most = self.slots.k.size(1)
        for rows in sorted({self._bucket(running) for running in range(1, most + 1)}, reverse=True):
            self._get(rows)

    def __call__(self, tokens: list[int]) -> Tensor:
        """Raw logits (B, V), before the softcap, after one more token for each of the first B slots; they advance.

        They are only there until the next call.
        """
        B = len(tokens)
        rows = self._bucket(B)
        static, graph, logits = self._get(rows)
        lengths = self.slots.lengths[:B]
        kept = self.slots.previous[B:rows].clone()
        static.set_inputs(tokens, lengths)
        if graph is None or logits is None:
            logits = self._run(static)
        else:
            with self._on_device():
                graph.replay()
        self.slots.previous[B:rows] = kept
        self.slots.lengths[:B] = [length + 1 for length in lengths]
        return logits[:B]

    def _bucket(self, running: int) -> int:
        return min(1 << (running - 1).bit_length(), self.slots.k.size(1))

    def _on_device(self) -> AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run(self, static: Static) -> Tensor:
        static.previous = self.slots.previous[: static.rows]
        hidden = self.model.hidden(static.tokens, static)[:, -1]
        self.slots.previous[: static.rows] = static.previous
        return self.model.lm_head(hidden)[:, : self.model.config.vocab_size]

    def _get(self, rows: int) -> tuple[Static, torch.cuda.CUDAGraph | None, Tensor | None]:
        """A graph for so many rows; None, said aloud once, where it cannot be captured."""
        if rows in self._made:
            return self._made[rows]
        static = Static(self.slots, rows)
        kept = self.slots.previous[:rows].clone()
        made: tuple[Static, torch.cuda.CUDAGraph | None, Tensor | None] = (static, None, None)
        with self._on_device():
            if not self.problem:
                try:
                    made = (static, *self._capture(static))
                except RuntimeError as problem:
                    self.problem = str(problem).splitlines()[0]
                    warnings.warn(f"decoding on {self.device} without CUDA graphs: {self.problem}", stacklevel=2)
                    torch.cuda.synchronize()
            if made[1] is None and self.device.type == "cuda":
                empty_cache()  # only now: the exception held what was captured
            if made[1] is None:
                self._run(static)  # kernels are compiled and probed now, and not when somebody waits
        self.slots.previous[:rows] = kept
        self._made[rows] = made
        return made

    def _capture(self, static: Static) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Raises RuntimeError where it cannot be done."""
        return captured(lambda: lambda: self._run(static), self.pool, WARM)
