"""The KV cache: one slot per running request, the running ones always in the first slots.

Keys and values are (L, slots, S, K, D) in the compute dtype; on a CPU in float32 and with each head's contiguous, which
decode.py reads much faster. The slots behind the running ones keep what ended requests left: a new request whose prompt
begins like one of them, or like a running one's, starts from there. A chat sends its history again with each turn, and
a server's system prompt is the same for everybody, so most prompts do. Where a prompt's log-probabilities were asked
for, they stay beside its keys and values, which alone could not give them again.
"""

import math
import mmap

import torch
from torch import Tensor

from kernels import flash_attention_decode
from nanochat.engine.sampling import LogProbs, moved
from nanochat.gpt import GPTConfig


class Slots:
    """Storage for `count` rows of up to sequence_len tokens each."""

    def __init__(self, config: GPTConfig, count: int, device: torch.device, dtype: torch.dtype):
        L, S, K, D = config.n_layer, config.sequence_len, config.n_kv_head, config.head_dim

        def store() -> Tensor:  # (L, slots, S, K, D)
            if device.type == "cpu":
                wide = torch.promote_types(dtype, torch.float32)
                return late_zeros((L, count, K, S, D), wide).transpose(2, 3)
            return torch.zeros((L, count, S, K, D), device=device, dtype=dtype)

        self.k, self.v = store(), store()
        self.lengths = [0] * count  # tokens in each slot
        self.previous = torch.zeros((count, 1, config.n_embd), device=device, dtype=dtype)
        self.tokens: list[list[int]] = [[] for _ in range(count)]  # what ended or begun requests left in each slot
        self.logprobs: list[list[LogProbs | None]] = [[] for _ in range(count)]  # of the first of these tokens
        self._used = [0] * count  # when a slot was last begun, for choosing what to forget
        self._clock = 0

    def swap(self, a: int, b: int) -> None:
        """Exchanges two slots."""
        if a == b:
            return
        n = max(self.lengths[a], self.lengths[b])
        for store in (self.k[:, :, :n], self.v[:, :, :n], self.previous[None]):
            kept = store[:, a].clone()
            store[:, a] = store[:, b]
            store[:, b] = kept
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]
        self.tokens[a], self.tokens[b] = self.tokens[b], self.tokens[a]
        self.logprobs[a], self.logprobs[b] = self.logprobs[b], self.logprobs[a]
        self._used[a], self._used[b] = self._used[b], self._used[a]

    def begin(self, prompt: list[int], first: int, alternatives: int | None = None) -> tuple[int, int]:
        """Makes one of the slots from `first` on ready for a prompt: (which, how many tokens are there already).

        At least the last token is left to do: its logits are wanted. With `alternatives`, `logprobs` then holds the
        log-probabilities of those tokens and of the next, each with so many alternatives or more. The caller sets
        `previous` for what is left.
        """
        shared = [self._shared(prompt, i, alternatives) for i in range(len(self.lengths))]
        best = max(range(len(shared)), key=shared.__getitem__)
        n = shared[best]
        if best >= first and 2 * n > self.lengths[best]:
            slot = best  # a chat goes on: what else is in its slot is worth nothing
        else:
            slot = min(range(first, len(self.lengths)), key=self._used.__getitem__)  # the oldest
        if best != slot:
            self.k[:, slot, :n], self.v[:, slot, :n] = self.k[:, best, :n], self.v[:, best, :n]
        said = self.logprobs[best]
        self.logprobs[slot] = said[:n] if alternatives is None else said[: n + 1] or [None]
        self.lengths[slot], self.tokens[slot] = n, list(prompt)
        self._clock += 1
        self._used[slot] = self._clock
        return slot, n

    def forget(self) -> None:
        """Nothing is kept for later prompts. Nothing may be running."""
        count = len(self.lengths)
        self.lengths, self.tokens, self._used = [0] * count, [[] for _ in range(count)], [0] * count
        self.logprobs = [[] for _ in range(count)]

    def _shared(self, prompt: list[int], slot: int, alternatives: int | None) -> int:
        """How many of a prompt's first tokens, but for its last, a slot holds with all that is asked of them."""
        held = self.tokens[slot]
        same = next((i for i, (a, b) in enumerate(zip(prompt, held)) if a != b), min(len(prompt), len(held)))
        n = min(same, len(prompt) - 1, self.lengths[slot])
        if alternatives is None:
            return n
        said = self.logprobs[slot][:same]
        known = next((i for i, one in enumerate(said) if one and len(one.top) < alternatives), len(said))
        return max(0, min(n, known - 1))  # the last one is run again: what it says of the next token is not kept

    def view(self, first: int, last: int, tokens: int) -> "View":
        """Slots first … last−1 for a forward pass over `tokens` new tokens each."""
        return View(self, first, last, tokens)


def late_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU whose memory is only taken, page by page, when they are written: few contexts get full."""
    own = dict(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **own), dtype=dtype).view(shape)


class View:
    """What one forward pass sees; the `Cache` that nanochat/gpt.py asks for. Call `advance` after it."""

    def __init__(self, slots: Slots, first: int, last: int, tokens: int):
        self.slots, self.first, self.last, self.tokens = slots, first, last, tokens
        lengths = slots.lengths[first:last]
        self.start = moved(lengths, torch.int64, slots.k.device)  # (B,)
        self.previous = slots.previous[first:last]  # (B, 1, C)
        self.seen = max(lengths) + tokens  # no row reaches further
        self._rows = torch.arange(last - first, device=slots.k.device)[:, None]  # (B, 1)
        self._columns = self.start[:, None] + torch.arange(tokens, device=slots.k.device)  # (B, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Stores k, v (B, T, K, D) at each row's end; reads everything up to the longest row's end."""
        keys, values = self.slots.k[layer, self.first : self.last], self.slots.v[layer, self.first : self.last]
        keys[self._rows, self._columns] = k.to(keys.dtype)
        values[self._rows, self._columns] = v.to(keys.dtype)
        keys, values = (cached[:, : self.seen].to(k.dtype) for cached in (keys, values))
        return flash_attention_decode(q, keys, values, self.start, window=window)

    def advance(self) -> None:
        """Counts the new tokens in, and keeps the last embedding for the next token's smear."""
        self.slots.previous[self.first : self.last] = self.previous
        for slot in range(self.first, self.last):
            self.slots.lengths[slot] += self.tokens
