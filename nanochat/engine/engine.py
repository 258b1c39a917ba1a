"""Continuous batching: requests join and leave the batch between steps.

`submit` a request, call `step` until `idle`: each step gives every running request one more token, either sampled or,
if its owner has forced some (a tool's answer), the next forced one. What else a step reads, scheduler.py says.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from nanochat.engine.cache import Slots
from nanochat.engine.decode import Decoder
from nanochat.engine.graphs import Graphs
from nanochat.engine.sampling import LogProbs, Sampling, log_probabilities, moved, sample
from nanochat.engine.scheduler import BUDGET, CPU_BUDGET, Chunk, Request, Scheduler
from nanochat.engine.weights import check, quantize, quantized_before
from nanochat.gpt import GPT
from nanochat.hardware import can_compile, compile_cache, mark_compiling

# What `warm` sends: as many new tokens as it takes to have met whatever kernels are specialized for (one, a multiple of
# 16, neither; few and many for attention), and every way of sampling.
PREFILLS = (1, 3, 16, 100, 128)
KINDS = (
    Sampling(), Sampling(temperature=0), Sampling(top_k=None), Sampling(top_k=None, top_p=0.9, min_p=0.01),
    Sampling(repetition_penalty=1.1, logprobs=5), Sampling(top_p=0.9),
)  # fmt: skip


HEAD_ROWS = 128  # positions whose logits are there at a time while a prompt's log-probabilities are made


class Engine:
    """Runs requests on a model. Single-threaded: call from one thread."""

    def __init__(self, model: GPT, slots: int = 16, weights: str = ""):
        """The weights are cast to the compute dtype once, in the model given; do not train it afterwards.

        weights: "int8" rounds them (weights.py), on a CPU; raises UserError elsewhere, and for any other word but "".
        """
        check(weights, model.lm_head.weight.device)
        self.model = model.eval().to(model.dtype)
        if weights and not quantized_before(model):  # by another engine
            quantize(model, slots)
        self.config = model.config
        self.device = model.lm_head.weight.device
        self.slots = Slots(model.config, slots, self.device, model.dtype)
        self.scheduler = Scheduler(self.slots, CPU_BUDGET if self.device.type == "cpu" else BUDGET)
        self.read = 0  # prompt tokens that the last step took in
        self._decode = Decoder(self.model, self.slots) if self.device.type == "cpu" else Graphs(self.model, self.slots)
        self._compiling = False
        # Of whoever watches (profiling/recorded/record.py): what is called after each step, and what each part of one
        # runs in.
        self.after_step: Callable[[], None] = lambda: None
        self.part: Callable[[str], AbstractContextManager] = nullcontext

    def load(self, weights: dict[str, Tensor]) -> None:
        """Goes on with other weights of the same model: a state dict, cast and packed again here. What is cached is of
        the weights before, and forgotten.

        Raises ValueError while requests are running, and where weights are int8 or decoding is compiled for them.
        """
        if not self.idle:
            raise ValueError("Engine: other weights while requests are running")
        if self.decoding in ("compiling", "compiled"):
            raise ValueError("Engine: decoding is compiled for the weights that it has; make another engine")
        if quantized_before(self.model):
            raise ValueError("Engine: its weights are int8; make another engine")
        self.model.load_state_dict(weights)  # in place: captured graphs see it
        if isinstance(self._decode, Decoder):
            self._decode = Decoder(self.model, self.slots)
        self.slots.forget()

    @property
    def running(self) -> list[Request]:
        """The i-th is in slot i."""
        return self.scheduler.running

    @property
    def waiting(self) -> list[Request]:
        """The first may be half read."""
        return self.scheduler.waiting

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
        leaves no room for a token that is asked for.
        """
        most = self.config.sequence_len - (request.max_tokens > 0)
        if not 0 < len(request.prompt) <= most:
            raise ValueError(f"Engine: the prompt has {len(request.prompt)} tokens, wanted 1 to {most}")
        self.scheduler.submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free in the next step."""
        request.finished = True

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, int]]:
        """One more token for every running request: [(request, token)]. A request's stop token is not reported."""
        self.retire()
        self.read = 0
        self.scheduler.begin_step()
        started = time.perf_counter()
        while chunk := self.scheduler.next_chunk():
            with self.part("prefill"):
                self._prefill(chunk)
            if self.scheduler.read(chunk):
                self._begin(chunk.request)
        if not self.running:
            return []
        reading = time.perf_counter() - started
        last = [(request.output or request.prompt)[-1] for request in self.running]
        with self.part("decode"):
            logits = self._decode(last)  # (B, V), raw
        with self.part("sampling"):
            found = self._choose(logits)
        if self.read and self.device.type == "cpu":
            self.scheduler.learn(reading, time.perf_counter() - started - reading)
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

    def _prefill(self, chunk: Chunk) -> None:
        """Takes a chunk of a prompt into its slot. The last token goes through the decode step with all others."""
        request, slot, fresh = chunk
        done, tokens = self.slots.lengths[slot], request.tokens
        self.slots.previous[slot] = self.model.embedded(tokens[done - 1]) if done else 0
        if not fresh:
            return
        if isinstance(self._decode, Decoder):
            hidden = self._decode.read(slot, fresh)  # (T, C)
        else:
            view = self.slots.view(slot, slot + 1, len(fresh))
            hidden = self.model.hidden(moved([fresh], torch.int64, self.device), view)[0]
            view.advance()
        self.read += len(fresh)
        if request.echo:
            following = tokens[done + 1 : done + 1 + len(fresh)]
            for start in range(0, len(fresh), HEAD_ROWS):
                said = following[start : start + HEAD_ROWS]
                logits = self.model.lm_head(hidden[start : start + HEAD_ROWS])[:, : self.config.vocab_size]
                alternatives = [request.sampling.logprobs or 0] * len(said)
                self.slots.logprobs[slot] += log_probabilities(logits, self.config.softcap, said, alternatives)

    def _begin(self, request: Request) -> None:
        """Its prompt is all there: what was said of it is the request's."""
        if request.echo:
            n = request.sampling.logprobs or 0
            said = self.slots.logprobs[len(self.running) - 1]
            request.echoed = [one and LogProbs(one.chosen, one.top[:n]) for one in said]
        if request.max_tokens == 0:
            request.finished, request.ended = True, "length"
            self.retire()

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
        wanted = [(i, tokens[i]) for i, request in enumerate(self.running) if request.sampling.logprobs is not None]
        if wanted:
            rows, of = zip(*wanted)
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
        self.scheduler.retire()
