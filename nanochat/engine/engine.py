"""Continuous batching: requests join and leave the batch between steps.

`submit` a request, call `step` until `idle`: each step gives every running request one more token, either sampled or,
if its owner has forced some (a tool's answer), the next forced one. Requests wait in a queue until a slot is free.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nanochat.engine.cache import Slots
from nanochat.engine.sampling import Sampling, sample
from nanochat.gpt import GPT


@dataclass(eq=False)
class Request:
    """One sequence being continued. `output` grows by a token a step until `finished`."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: frozenset[int] = frozenset()  # a sampled token in here ends the request; it is not in the output
    output: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    finished: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    def force(self, tokens: list[int]) -> None:
        """The next tokens of the output, whatever the model would say."""
        self.forced.extend(tokens)


class Engine:
    """Runs requests on a model. Single-threaded: call from one thread."""

    def __init__(self, model: GPT, slots: int = 16):
        """The weights are cast to the compute dtype once, in the model given; do not train it afterwards."""
        self.model = model.eval().to(model.dtype)
        self.config = model.config
        self.device = model.lm_head.weight.device
        self.slots = Slots(model.config, slots, self.device, model.dtype)
        self.running: list[Request] = []  # the i-th is in slot i
        self.waiting: deque[Request] = deque()
        self._capacity = slots

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def submit(self, request: Request) -> Request:
        """Queues a request. Raises ValueError when its prompt is empty or leaves no room for a token."""
        if not 0 < len(request.prompt) < self.config.sequence_len:
            raise ValueError(
                f"Engine: the prompt has {len(request.prompt)} tokens, wanted 1 to {self.config.sequence_len - 1}"
            )
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free in the next step."""
        request.finished = True

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One more token for every running request: [(request, token)]. A request's stop token is not reported."""
        self.retire()
        fresh = []
        while self.waiting and len(self.running) < self._capacity:
            request = self.waiting.popleft()
            if not request.finished:
                fresh.append(self._prefill(request))
        older = self.running[: len(self.running) - len(fresh)]
        if older:
            tokens = torch.tensor([[request.output[-1]] for request in older], device=self.device)  # (B, 1)
            logits = [*self._forward(tokens, 0), *fresh]
        else:
            logits = fresh
        return [(r, t) for r, row in zip(self.running, logits) if (t := self._next(r, row)) is not None]

    def stream(self, request: Request) -> Iterator[int]:
        """Submits one request and yields its tokens; closing the iterator cancels it."""
        self.submit(request)
        try:
            while not request.finished:
                for owner, token in self.step():
                    if owner is request:
                        yield token
        finally:
            self.cancel(request)
            self.retire()

    def _forward(self, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Logits (B, V) float32 on the CPU after tokens (B, T) in the slots from `first` on."""
        view = self.slots.view(first, first + tokens.size(0), tokens.size(1))
        hidden = self.model.hidden(tokens, view)[:, -1]
        view.advance()
        return self.model.logits(hidden).float().cpu()

    def _prefill(self, request: Request) -> torch.Tensor:
        slot = len(self.running)
        self.slots.clear(slot)
        self.running.append(request)
        return self._forward(torch.tensor([request.prompt], device=self.device), slot)[0]

    def _next(self, request: Request, logits: torch.Tensor) -> int | None:
        """The request's next token, or None when it ended with a stop token."""
        if request.forced:
            token = request.forced.popleft()
        else:
            token = sample(logits, request.sampling, request.generator)
            if token in request.stop:
                request.finished = True
                return None
        request.output.append(token)
        full = len(request.prompt) + len(request.output) >= self.config.sequence_len
        request.finished = full or len(request.output) >= request.max_tokens
        return token

    def retire(self) -> None:
        """Frees the slots of finished requests; the last running request moves into each hole."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finished:
                last = len(self.running) - 1
                if slot != last:
                    self.slots.move(last, slot)
                    self.running[slot] = self.running[last]
                self.running.pop()
