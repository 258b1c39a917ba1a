"""One more token for every running row on a GPU: the model of gpt.py, captured once as a CUDA graph and replayed.

A step of a small model is a thousand launches of a few microseconds each; replayed as one graph they cost one launch.
A graph is for a fixed number of rows and fixed memory, so there is one for each power of two of rows, made when it is
first needed; rows beyond the running ones are idle. Attention reads the whole cache's length of keys, of which each
row's length says how many count.

Source: CUDA graphs for decoding as in gpt-fast and vLLM.
"""

import warnings

import torch
from torch import Tensor

from nanochat.engine.cache import Slots
from nanochat.gpt import GPT

WARM = 3  # runs before a capture: kernels are compiled and probed in them


class Static:
    """The `Cache` of a captured step: what changes from step to step lies in tensors that stay where they are."""

    def __init__(self, slots: Slots, rows: int):
        device = slots.k.device
        self.slots, self.rows = slots, rows
        self.start = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,)
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.previous = slots.previous[:rows]  # (B, 1, C)
        self._rows = torch.arange(rows, device=device)[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.slots.k[layer, : self.rows], self.slots.v[layer, : self.rows]
        keys[self._rows, self.start[:, None]] = k
        values[self._rows, self.start[:, None]] = v
        return keys, values


class Graphs:
    """Decode steps over the first rows of the slots."""

    def __init__(self, model: GPT, slots: Slots):
        self.model, self.slots = model, slots
        self._made: dict[int, tuple[Static, torch.cuda.CUDAGraph | None, Tensor]] = {}

    def __call__(self, tokens: list[int]) -> Tensor:
        """Raw logits (B, V), before the softcap, after one more token for each of the first B slots; they advance."""
        B = len(tokens)
        rows = min(1 << (B - 1).bit_length(), self.slots.k.size(1))
        if rows not in self._made:
            self._made[rows] = self._make(rows)
        static, graph, logits = self._made[rows]
        lengths = self.slots.lengths[:B]
        idle = [self.slots.k.size(2) - 1] * (rows - B)  # an idle row writes where nothing is ever kept
        kept = self.slots.previous[B:rows].clone()
        static.tokens.copy_(torch.tensor([*tokens, *[0] * (rows - B)])[:, None])
        static.start.copy_(torch.tensor([*lengths, *idle]))
        if graph is None:
            logits = self._run(static)
        else:
            graph.replay()
        self.slots.previous[B:rows] = kept
        self.slots.lengths[:B] = [length + 1 for length in lengths]
        return logits[:B]

    def _run(self, static: Static) -> Tensor:
        static.previous = self.slots.previous[: static.rows]
        hidden = self.model.hidden(static.tokens, static)[:, -1]
        self.slots.previous[: static.rows] = static.previous
        return self.model.lm_head(hidden)[:, : self.model.config.vocab_size]

    def _make(self, rows: int) -> tuple[Static, torch.cuda.CUDAGraph | None, Tensor]:
        """A graph for so many rows; None, said aloud, where it cannot be captured (or there is no CUDA: MPS)."""
        static = Static(self.slots, rows)
        static.start.fill_(self.slots.k.size(2) - 1)
        kept = self.slots.previous[:rows].clone()
        logits, graph = self._run(static), None
        if self.slots.k.is_cuda:
            try:
                for _ in range(WARM):
                    self._run(static)
                torch.cuda.synchronize()
                made = torch.cuda.CUDAGraph()
                with torch.cuda.graph(made, capture_error_mode="thread_local"):  # other replicas allocate meanwhile
                    logits = self._run(static)
                graph = made
            except RuntimeError as problem:
                warnings.warn(f"decoding without CUDA graphs: {str(problem).splitlines()[0]}", stacklevel=2)
        self.slots.previous[:rows] = kept
        return static, graph, logits
