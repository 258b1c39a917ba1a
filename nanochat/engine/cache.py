"""The KV cache: one slot per running request, the running ones always in the first slots.

Keys and values are (L, slots, S, K, D) in the compute dtype. When a request ends, the last running one moves into its
slot, so a step works on a plain slice without holes.
"""

import torch
from torch import Tensor

from nanochat.gpt import GPTConfig


class Slots:
    """Storage for `count` rows of up to sequence_len tokens each."""

    def __init__(self, config: GPTConfig, count: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, count, config.sequence_len, config.n_kv_head, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * count  # tokens in each slot
        self.previous = torch.zeros((count, 1, config.n_embd), device=device, dtype=dtype)

    def clear(self, slot: int) -> None:
        """Makes a slot ready for a new request: what remains beyond its length is never seen."""
        self.lengths[slot] = 0
        self.previous[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Copies a row into another slot."""
        n = self.lengths[source]
        self.k[:, target, :n] = self.k[:, source, :n]
        self.v[:, target, :n] = self.v[:, source, :n]
        self.previous[target] = self.previous[source]
        self.lengths[target] = n

    def view(self, first: int, last: int, tokens: int) -> "View":
        """Slots first … last−1 for a forward pass over `tokens` new tokens each."""
        return View(self, first, last, tokens)


class View:
    """What one forward pass sees; the `Cache` that nanochat/gpt.py asks for. Call `advance` after it."""

    def __init__(self, slots: Slots, first: int, last: int, tokens: int):
        self.slots, self.first, self.last, self.tokens = slots, first, last, tokens
        lengths = slots.lengths[first:last]
        self.start = torch.tensor(lengths, device=slots.k.device)  # (B,)
        self.previous = slots.previous[first:last]  # (B, 1, C)
        self.seen = max(lengths) + tokens  # no row reaches further
        self._rows = torch.arange(last - first, device=slots.k.device)[:, None]  # (B, 1)
        self._columns = self.start[:, None] + torch.arange(tokens, device=slots.k.device)  # (B, T)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, T, K, D) at each row's end; returns everything up to the longest row's end."""
        keys, values = self.slots.k[layer, self.first : self.last], self.slots.v[layer, self.first : self.last]
        keys[self._rows, self._columns] = k
        values[self._rows, self._columns] = v
        return keys[:, : self.seen], values[:, : self.seen]

    def advance(self) -> None:
        """Counts the new tokens in, and keeps the last embedding for the next token's smear."""
        self.slots.previous[self.first : self.last] = self.previous
        for slot in range(self.first, self.last):
            self.slots.lengths[slot] += self.tokens
