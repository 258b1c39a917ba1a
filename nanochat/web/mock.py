"""`--mock`: a parrot instead of a model, to try the page and clients without training.

It answers with one of a few prepared texts that show what the page can do, or repeats what follows "say: ". It has the
engine's interface; everything around it is the real thing.
"""

import math
import time
from collections import deque
from types import SimpleNamespace

from nanochat.data.microworld import Documents
from nanochat.data.source import first_items
from nanochat.engine import Request
from nanochat.engine.sampling import LogProbs
from nanochat.tokenizer import Tokenizer

SECONDS = 0.02  # per step
CONTEXT = 2048
ANSWERS = (
    "I am a parrot: there is **no model** behind this page, only a few prepared answers. Train one with "
    "`bash speedrun.sh`, then start `python -m scripts.chat_web` without `--mock`.",
    "A list, to see how it looks:\n\n1. the first thing\n2. the second, with `code`\n3. a [link](https://github.com)\n\n"
    "> And a quotation.\n\n| city | country |\n|---|---|\n| Paris | France |\n| Rome | Italy |\n",
    "Some Python:\n\n```python\ndef double(x):\n    return 2 * x\n```\n\nThat is all.",
)


def tokenizer() -> Tokenizer:
    """Trained on a little of the embedded text, in a second."""
    return Tokenizer.train(first_items(Documents(), "train", 400), 1024)


class Parrot:
    """As Engine: submit requests, call step until idle."""

    class config:
        sequence_len = CONTEXT

    decoding = "parrot"

    def __init__(self, tokenizer: Tokenizer, slots: int):
        self.tokenizer = tokenizer
        self.slots = SimpleNamespace(lengths=[0] * slots)
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._lines: dict[Request, list[int]] = {}

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def warm(self) -> None:
        pass

    def submit(self, request: Request) -> Request:
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        request.finished = True

    def retire(self) -> None:
        self.running = [request for request in self.running if not request.finished and not request.paused]
        self._lines = {request: line for request, line in self._lines.items() if not request.finished}

    def step(self) -> list[tuple[Request, int]]:
        self.retire()
        while self.waiting and len(self.running) < len(self.slots.lengths):
            request = self.waiting.popleft()
            if not request.finished:
                self.running.append(request)
                if request not in self._lines:  # one that was paused goes on
                    self._lines[request] = self._answer(request)
                if request.echo:
                    request.echoed = [None, *(self._said(request, token) for token in request.prompt[1:])]
                if request.max_tokens == 0:
                    request.finished, request.ended = True, "length"
        self.retire()
        time.sleep(SECONDS)
        found = []
        for request in self.running:
            if not request.forced and not self._lines[request]:
                request.finished, request.ended = True, "stop"
                continue
            token = request.forced.popleft() if request.forced else self._lines[request].pop(0)
            if request.sampling.logprobs is not None:
                request.logprobs.append(self._said(request, token))
            request.output.append(token)
            if len(request.output) >= request.max_tokens:
                request.finished, request.ended = True, "length"
            found.append((request, token))
        return found

    def _said(self, request: Request, token: int) -> LogProbs:
        n = request.sampling.logprobs or 0
        others = [((token + i) % len(self.tokenizer.merges), math.log(0.1 / 2**i)) for i in range(1, n)]
        return LogProbs(math.log(0.9), [(token, math.log(0.9)), *others][:n])

    def _answer(self, request: Request) -> list[int]:
        """What to say, as tokens: after the conversation's last words."""
        special, encode = self.tokenizer.special, self.tokenizer.encode
        ends = [i for i, token in enumerate(request.prompt) if token == special["<|user_start|>"]]
        words = self.tokenizer.decode([t for t in request.prompt[ends[-1] if ends else 0 :] if t < special["<|bos|>"]])
        if words.startswith("say: "):
            return encode(words[5:])
        if any(sign in words for sign in "+*/"):
            sum_ = "".join(c for c in words if c in "0123456789+-*/(). ").strip(" .")
            return [*encode("Let me see. "), special["<|python_start|>"], *encode(sum_), special["<|python_end|>"],
                    *encode(" That is what my calculator says.")]  # fmt: skip
        return encode(ANSWERS[(len(ends) - 1) % len(ANSWERS)])
