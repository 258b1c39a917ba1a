"""The losses of scored tokens under our own model, with nothing computed twice and nothing padded.

The sequences of an example begin alike (examples shown, question). What they share is computed once, what they end
with follows it, and examples follow each other, all in one long row of tokens:

    shared tokens | end of choice 1 | end of choice 2 | … | next example's shared tokens | …

To the model each token is a batch row of one token at a position of its own; `Packed`, the cache it asks, knows what
is before each (the smear) and what each sees (attention). Logits are made for scored positions only, some at a time.
Start reading at `score`.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import flash_attention
from nanochat.evaluate.core_prompts import Example, Ids, shared
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer

LONGEST = 10  # times the context, up to which positions are extended, as nanochat does
LOGITS = 1 << 21  # at a time: 8 MiB in float32, several times that with what becomes of them
MASK = 1 << 23  # (query, key) pairs of choices that one mask may have; beyond it an example's sequences share nothing
# All but cuDNN's, which torch prefers on Hopper and Blackwell: it makes a plan for every new shape, which takes longer
# than the attention, and nearly every example has lengths of its own.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Score:
    """Of one sequence: the scored tokens' losses in nats, and whether each was the likeliest token."""

    nats: list[float]
    right: bool

    @property
    def mean(self) -> float:
        """NaN where no token is scored."""
        return sum(self.nats) / len(self.nats) if self.nats else float("nan")


@dataclass(frozen=True)
class Group:
    """Sequences laid out from token `at` of the row: the `head` that they share, then each one's tail."""

    at: int
    head: int  # tokens
    tails: list[int]  # tokens of each

    @property
    def end(self) -> int:
        return self.at + self.head + sum(self.tails)

    def place(self, sequence: int, position: int) -> int:
        """Where in the row a token of a sequence is."""
        inside = position < self.head
        return self.at + position + (0 if inside else sum(self.tails[:sequence]))


@dataclass
class Layout:
    """A row of tokens under construction: their ids, their positions, and where in the row the one before each is."""

    ids: Ids = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)  # −1: none
    groups: list[Group] = field(default_factory=list)

    def add(self, sequences: list[Ids]) -> Group:
        at, head = len(self.ids), shared(sequences)
        self._append(sequences[0][:head], 0, -1)
        for one in sequences:
            self._append(one[head:], head, at + head - 1 if head else -1)
        self.groups.append(Group(at, head, [len(one) - head for one in sequences]))
        return self.groups[-1]

    def _append(self, ids: Ids, position: int, before: int) -> None:
        at = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.before += [before, *range(at, at + len(ids) - 1)][: len(ids)]


class Packed:
    """The `Cache` (nanochat/gpt.py) of a laid-out row: N rows of one token each. Nothing is kept after the pass."""

    def __init__(self, model: GPT, layout: Layout):
        device = model.lm_head.weight.device
        self.groups, self.context = layout.groups, model.config.sequence_len
        self.ids = torch.tensor(layout.ids, device=device)  # (N,)
        self.start = torch.tensor(layout.positions, device=device)  # (N,)
        before = torch.tensor(layout.before, device=device)
        (now,) = model.embedded(self.ids)  # (N, C)
        self.previous = torch.where(before[:, None] >= 0, now[before], 0)[:, None]  # (N, 1, C)
        self._masks: dict[tuple[int, int], Tensor] = {}

    @sdpa_kernel(ATTENTION)
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (N, 1, H, D) over k, v (N, 1, K, D). No window means one of the context: nothing longer was trained."""
        window = self.context if window is None else window
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (1, N, heads, D)
        y = torch.empty_like(q)
        for group in self.groups:
            head = slice(group.at, group.at + group.head)
            if group.head:
                y[:, head] = flash_attention(q[:, head], k[:, head], v[:, head], window=window)
            if sum(group.tails):
                tails, seen = slice(head.stop, group.end), slice(max(group.at, head.stop - window), group.end)
                mask = self._mask(group, tails, seen, window)
                own, keys, values = (x.transpose(1, 2) for x in (q[:, tails], k[:, seen], v[:, seen]))  # (1, H, …, D)
                grouped = q.size(2) != k.size(2)
                out = F.scaled_dot_product_attention(own, keys, values, mask, enable_gqa=grouped)
                y[:, tails] = out.transpose(1, 2)
        return y.transpose(0, 1)

    def _mask(self, group: Group, tails: slice, seen: slice, window: int) -> Tensor:
        """(tail tokens, seen tokens) bool: a tail sees the head and itself, as far back as the window reaches."""
        key = group.at, window
        if key not in self._masks:
            device = self.start.device
            own = torch.repeat_interleave(torch.arange(len(group.tails)), torch.tensor(group.tails)).to(device)
            whose = torch.cat((own.new_full((tails.start - seen.start,), -1), own))  # −1: the head's
            i, j = self.start[tails][:, None], self.start[seen]
            self._masks[key] = ((whose < 0) | (whose == own[:, None])) & (j <= i) & (j >= i - window)
        return self._masks[key]


class OurModel:
    """One of our models as nanochat/evaluate/core.py asks it. budget: tokens at a time; the more, the more memory."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, budget: int):
        self.model, self.encode, self.budget = model.eval(), tokenizer.encode_documents, budget
        self.limit = LONGEST * model.config.sequence_len
        model.set_positions(self.limit)

    def score(self, examples: Iterable[Example]) -> Iterator[list[Score]]:
        """The scores of each example's sequences, in order; as many examples at a time as the budget allows."""
        counts: deque[int] = deque()  # of sequences of the examples whose scores are not complete

        def parts() -> Iterator[Example]:
            for example in examples:
                counts.append(len(example.ids))
                yield from apart(example)

        scores: list[Score] = []
        for batch in batches(parts(), self.budget):
            scores += [one for found in score(self.model, batch) for one in found]
            while counts and len(scores) >= counts[0]:
                count = counts.popleft()
                yield scores[:count]
                del scores[:count]


def apart(example: Example) -> list[Example]:
    """The example, or one for each of its sequences where sharing would need too large a mask."""
    head = shared(example.ids)
    tails = sum(map(len, example.ids)) - head * len(example.ids)
    if tails * (tails + head) <= MASK:
        return [example]
    return [Example([ids], [span]) for ids, span in zip(example.ids, example.spans)]


def tokens_of(example: Example) -> int:
    """To compute, what the sequences share counted once."""
    head = shared(example.ids)
    return head + sum(len(one) - head for one in example.ids)


def batches(examples: Iterable[Example], budget: int) -> Iterator[list[Example]]:
    """Neighbours that have at most `budget` tokens together; or a single example that has more."""
    batch: list[Example] = []
    full = 0
    for example in examples:
        tokens = tokens_of(example)
        if batch and full + tokens > budget:
            yield batch
            batch, full = [], 0
        batch.append(example)
        full += tokens
    if batch:
        yield batch


@torch.no_grad()
def score(model: GPT, examples: Sequence[Example]) -> list[list[Score]]:
    """The scores of each example's sequences, all in one pass."""
    layout, at, targets = Layout(), [], []  # where in the row the scored tokens are predicted, and their ids
    for example in examples:
        group = layout.add([ids[:-1] for ids in example.ids])  # nothing comes after the last token
        for i, ((start, end), ids) in enumerate(zip(example.spans, example.ids)):
            at += [group.place(i, position - 1) for position in range(start, end)]
            targets += ids[start:end]
    losses, right = _losses(model, layout, at, targets)
    found, taken = [], 0
    for example in examples:
        scores = []
        for start, end in example.spans:
            chosen = slice(taken, taken + end - start)
            scores.append(Score(losses[chosen], all(right[chosen])))
            taken = chosen.stop
        found.append(scores)
    return found


def _losses(model: GPT, layout: Layout, at: list[int], targets: Ids) -> tuple[list[float], list[bool]]:
    """The losses of targets that are predicted at these places of the row, and whether each was the likeliest."""
    cache = Packed(model, layout)
    hidden = model.hidden(cache.ids[:, None], cache)[:, 0]  # (N, C)
    device = hidden.device
    places, wanted = torch.tensor(at, device=device), torch.tensor(targets, device=device)
    losses, right = [], []
    rows = max(1, LOGITS // model.config.vocab_size)
    for place, target in zip(places.split(rows), wanted.split(rows)):
        logits = model.logits(hidden[place])  # (rows, V) float32
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(losses).tolist(), torch.cat(right).tolist()
