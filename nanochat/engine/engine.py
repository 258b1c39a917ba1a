"""Continuous batching: requests join and leave the batch between steps.

`submit` a request, call `step` until `idle`: each step gives every running request one more token, either sampled or,
if its owner has forced some (a tool's answer), the next forced one. Requests wait in a queue until a slot is free.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.engine.cache import Slots, moved
from nanochat.engine.decode import Decoder
from nanochat.engine.graphs import Graphs
from nanochat.engine.sampling import LogProbs, Sampling, log_probabilities, sample
from nanochat.gpt import GPT
from nanochat.hardware import can_compile, compile_cache, mark_compiling

# What `warm` sends: as many new tokens as it takes to have met whatever kernels are specialized for (one, a multiple of
# 16, neither; few and many for attention), and every way of sampling.
PREFILLS = (1, 3, 16, 100, 128)
KINDS = (
    Sampling(), Sampling(temperature=0), Sampling(top_k=None), Sampling(top_k=None, top_p=0.9, min_p=0.01),
    Sampling(repetition_penalty=1.1, logprobs=5), Sampling(top_p=0.9),
)  # fmt: skip


@dataclass(eq=False)
class Request:
    """One sequence being continued. `output` grows by a token a step until `finished`, for the reason in `ended`."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: frozenset[int] = frozenset()  # a sampled token in here ends the request; it is not in the output
    output: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)  # of each token of the output: it was not forced
    stopped_by: int | None = None  # the stop token that ended it
    logprobs: list[LogProbs] = field(default_factory=list)  # where asked for: of each of these tokens, that one last
    forced: deque[int] = field(default_factory=deque)
    finished: bool = False
    paused: bool = False  # waits for its owner outside of the batch: submit it again when it may go on
    ended: str = ""  # "stop": by a stop token; "length": max_tokens or the context; "" while running, or cancelled
    cached: int = 0  # tokens of the prompt that were in the cache already
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
        self._decode = Decoder(self.model, self.slots) if self.device.type == "cpu" else Graphs(self.model, self.slots)
        self._capacity, self._compiling = slots, False
        # Of whoever watches (profiling/record.py): what is called after each step, and what each part of one runs in.
        self.after_step: Callable[[], None] = lambda: None
        self.part: Callable[[str], AbstractContextManager] = nullcontext

    def load(self, weights: dict[str, Tensor]) -> None:
        """Goes on with other weights of the same model: a state dict, cast and packed again here. What is cached is of
        the weights before, and forgotten.

        Raises ValueError while requests are running, and where decoding is compiled: its weights are constants.
        """
        if not self.idle:
            raise ValueError("Engine: other weights while requests are running")
        if self.decoding in ("compiling", "compiled"):
            raise ValueError("Engine: decoding is compiled for the weights that it has; make another engine")
        self.model.load_state_dict(weights)  # in place: captured graphs see it
        if isinstance(self._decode, Decoder):
            self._decode = Decoder(self.model, self.slots)
        self.slots.forget()

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def compile(self) -> str:
        """On a CPU: has decoding compiled, in half a minute, beside running steps if a thread of its own calls.

        Returns why decoding stays as it is, or "". (GPUs replay graphs, which need no such call.)
        """
        if not isinstance(self._decode, Decoder):
            return "not on a CPU"
        self._compiling = True
        works, why = can_compile(self.device)
        if works:
            compiling = mark_compiling(compile_cache())
            try:
                self._decode.compile()
            except Exception as problem:  # whatever the tool chain throws: steps go on as they are
                why = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
            finally:
                compiling.release()
        self._compiling = False
        return why

    def warm(self) -> None:
        """On a GPU: captures all graphs, and answers a request of every kind and length, so that no later one waits
        for a kernel to be compiled or probed, and the longest prompt has found its memory. On a CPU nothing needs it.

        Call it in the thread that will call `step`, before any request. Raises what the device raises.
        """
        if isinstance(self._decode, Decoder):
            return
        self._decode.warm()
        most = self.config.sequence_len - 2  # of a prompt, the last token goes through the decode step
        for i, fresh in enumerate([*(n for n in PREFILLS if n < most), most]):
            prompt = [i % self.config.vocab_size] + [0] * fresh  # no two begin alike
            self.submit(Request(prompt, 2, KINDS[i]))
        while not self.idle:
            self.step()
        self.slots.forget()

    @property
    def decoding(self) -> str:
        """How it decodes now: "graphs" or, without them, "eager" on a GPU; on a CPU "eager", "compiling" (still
        eagerly) or "compiled".
        """
        if isinstance(self._decode, Graphs):
            return "eager" if self._decode.problem else "graphs"
        return "compiled" if self._decode.ready else "compiling" if self._compiling else "eager"

    def submit(self, request: Request) -> Request:
        """Queues a request, one that was paused before all others. Raises ValueError when its prompt is empty or
        leaves no room for a token.
        """
        if not 0 < len(request.prompt) < self.config.sequence_len:
            raise ValueError(
                f"Engine: the prompt has {len(request.prompt)} tokens, wanted 1 to {self.config.sequence_len - 1}"
            )
        if request.output:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free in the next step."""
        request.finished = True

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One more token for every running request: [(request, token)]. A request's stop token is not reported."""
        self.retire()
        while self.waiting and len(self.running) < self._capacity:
            request = self.waiting.popleft()
            if not request.finished:
                with self.part("prefill"):
                    self._prefill(request)
        if not self.running:
            return []
        last = [(request.output or request.prompt)[-1] for request in self.running]
        with self.part("decode"):
            logits = self._decode(last)  # (B, V), raw
        with self.part("sampling"):
            found = self._choose(logits)
        self.after_step()
        return found

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

    def _prefill(self, request: Request) -> None:
        """Takes a request in: its tokens but for the last, which goes through the decode step with all others."""
        slot, tokens = len(self.running), [*request.prompt, *request.output]
        done = self.slots.begin(tokens, slot)
        if not request.output:
            request.cached = done
        self.slots.previous[slot] = self.model.embedded(tokens[done - 1]) if done else 0
        self.running.append(request)
        if fresh := tokens[done:-1]:
            view = self.slots.view(slot, slot + 1, len(fresh))
            self.model.hidden(moved([fresh], torch.int64, self.device), view)
            view.advance()

    def _choose(self, logits: Tensor) -> list[tuple[Request, int]]:
        """Every running request's next token, from raw logits (B, V)."""
        softcap = self.config.softcap
        tokens = sample(logits, softcap, self.running)
        found = []  # (row, token)
        for i, request in enumerate(self.running):
            if request.forced:
                tokens[i] = request.forced.popleft()
                request.drawn.append(False)
            elif tokens[i] in request.stop:
                request.finished, request.ended, request.stopped_by = True, "stop", tokens[i]
                continue
            else:
                request.drawn.append(True)
            found.append((i, tokens[i]))
        told = [(i, tokens[i]) for i, request in enumerate(self.running) if request.sampling.logprobs is not None]
        if told:
            rows, of = zip(*told)
            alternatives = [self.running[i].sampling.logprobs or 0 for i in rows]
            part = logits[moved(rows, torch.int64, logits.device)]
            for i, said in zip(rows, log_probabilities(part, softcap, of, alternatives)):
                self.running[i].logprobs.append(said)
        for i, token in found:
            request = self.running[i]
            request.output.append(token)
            full = len(request.prompt) + len(request.output) >= self.config.sequence_len
            if full or len(request.output) >= request.max_tokens:
                request.finished, request.ended = True, "length"
        return [(self.running[i], token) for i, token in found]

    def retire(self) -> None:
        """Frees the slots of finished and paused requests, which keep their tokens for prompts that begin alike."""
        for slot in reversed(range(len(self.running))):
            request = self.running[slot]
            if request.finished or request.paused:
                last = len(self.running) - 1
                self.slots.tokens[slot] = [*request.prompt, *request.output]
                self.slots.swap(slot, last)
                self.running[slot] = self.running[last]
                self.running.pop()
