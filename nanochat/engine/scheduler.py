"""What a step works on: the queue of requests, their slots, and a budget of prompt tokens. It computes nothing.

Rows that run are in the first slots, in order. A step gives each of them one more token, so whoever takes in a long
prompt at once makes them all wait for it. Instead a prompt comes in in chunks, between the steps of the others: at most
`budget` tokens a step while somebody reads along (Sarathi-Serve, arXiv:2403.02310), everything at once while nobody
does. On a CPU, where it can be seen how long reading takes, the budget follows the machine: the largest for which steps
stay within what readers are to wait, as every chunk costs something however short it is. One request enters at a time,
in a slot behind the running ones.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat.engine.cache import Slots
from nanochat.engine.sampling import LogProbs, Sampling

BUDGET = 512  # prompt tokens a step on a GPU: enough to keep it busy
CPU_BUDGET, LEAST, MOST = 64, 16, 512  # on a CPU: at first; fewer are hardly faster than so many; never more
LONGER = 2.4  # times as long as the rest of a step reading is to take: the 99th percentile stays below five steps
DAMPING = 4  # a step that took long for no reason of its own changes little


@dataclass(eq=False)
class Request:
    """One sequence being continued. `output` grows by a token a step until `finished`, for the reason in `ended`."""

    prompt: list[int]
    max_tokens: int  # 0: only the prompt is read
    sampling: Sampling
    stop: frozenset[int] = frozenset()  # a sampled token in here ends the request; it is not in the output
    echo: bool = False  # log-probabilities of the prompt's tokens too; with sampling.logprobs
    output: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)  # of each token of the output: it was not forced
    stopped_by: int | None = None  # the stop token that ended it
    logprobs: list[LogProbs] = field(default_factory=list)  # where asked for: of each of these tokens, that one last
    echoed: list[LogProbs | None] = field(default_factory=list)  # of each token of the prompt; None for the first
    forced: deque[int] = field(default_factory=deque)
    finished: bool = False
    paused: bool = False  # waits for its owner outside of the batch: submit it again when it may go on
    ended: str = ""  # "stop": by a stop token; "length": max_tokens or the context; "" while running, or cancelled
    cached: int = 0  # tokens of the prompt that were in the cache already
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.output]

    def force(self, tokens: list[int]) -> None:
        """The next tokens of the output, whatever the model would say."""
        self.forced.extend(tokens)


class Chunk(NamedTuple):
    """Tokens that a request's slot is to take in next."""

    request: Request
    slot: int
    tokens: list[int]


class Scheduler:
    def __init__(self, slots: Slots, budget: int):
        self.slots, self.budget, self.capacity = slots, budget, len(slots.lengths)
        self.running: list[Request] = []  # the i-th is in slot i
        self.queue: deque[Request] = deque()
        self.entering: Request | None = None  # its prompt is not yet all there
        self._slot = 0  # where it is
        self._room: float = 0  # prompt tokens that this step still takes
        self._cut = False  # whether the entering prompt comes in several steps
        self._held = False  # whether it is all there and runs from the next step on

    @property
    def waiting(self) -> list[Request]:
        return [*([self.entering] if self.entering else []), *self.queue]

    def submit(self, request: Request) -> None:
        """Queues a request, one that was paused before all others."""
        self.queue.appendleft(request) if request.output else self.queue.append(request)

    def learn(self, reading: float, rest: float) -> None:
        """How many seconds the last step read prompts, and how many it did everything else."""
        if self._room == float("inf"):
            return  # nobody waited for it
        most = 1.0 if self._room > 0 else 2.0  # a chunk shorter than the budget does not tell how long that takes
        wanted = self.budget * min(max(LONGER * rest / max(reading, 1e-9), 0.5), most)  # a coarse clock may say 0
        self.budget = min(max(round(self.budget + (wanted - self.budget) / DAMPING), LEAST), MOST)

    def begin_step(self) -> None:
        """Counts the budget anew. Who has said nothing yet is not kept waiting by a prompt: it only makes him later."""
        self._room = self.budget if any(request.output for request in self.running) else float("inf")
        self._held = False

    def next_chunk(self) -> Chunk | None:
        """What this step is to read next; ask again when it has been read. None: nothing more."""
        if self._held or self._room <= 0:
            return None
        if self.entering is None:
            if not self.queue or len(self.running) == self.capacity:
                return None
            self._enter(self.queue.popleft())
        request = self.entering
        assert request
        left = request.tokens[self.slots.lengths[self._slot] : -1]  # the last token goes through the decode step
        size = int(min(len(left), self._room))
        self._cut |= size < len(left)
        self._room -= size
        return Chunk(request, self._slot, left[:size])

    def _enter(self, request: Request) -> None:
        alternatives = request.sampling.logprobs if request.echo else None
        self._slot, found = self.slots.begin(request.tokens, len(self.running), alternatives)
        self.entering, self._cut = request, False
        if not request.output:
            request.cached = found

    def read(self, chunk: Chunk) -> bool:
        """Notes that a chunk is in the cache; a request that is all there runs. Returns whether it does.

        A long one only from the next step on: its first step, slower as it makes all attend further, is not to fall
        together with its last chunk.
        """
        whole = self.slots.lengths[chunk.slot] == len(chunk.request.tokens) - 1
        self._held = whole and self._cut and bool(chunk.tokens) and self._room < float("inf")
        if whole and not self._held:
            self.slots.swap(chunk.slot, len(self.running))
            self.running.append(chunk.request)
            self.entering = None
        return whole and not self._held

    def retire(self) -> None:
        """Frees the slots of finished and paused requests, which keep their tokens for prompts that begin alike; also
        of a prompt that nobody wants any more, so far as it was read. Whoever no longer waits is not read at all.
        """
        for slot in reversed(range(len(self.running))):
            request = self.running[slot]
            if request.finished or request.paused:
                last = len(self.running) - 1
                self.slots.tokens[slot] = request.tokens
                self.slots.swap(slot, last)
                self.running[slot] = self.running[last]
                self.running.pop()
        if self.entering and self.entering.finished:
            self.entering = None
        self.queue = deque(request for request in self.queue if not request.finished)
