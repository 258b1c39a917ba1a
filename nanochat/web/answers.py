"""Answers as OpenAI's clients want them: chat completions and plain ones, whole or in chunks.

The calculator's calls, which have no place in OpenAI's format, go in a field of their own, `events`: a list of {"type":
"python" | "python_output", "text": …}. An assistant message may have the same as parts of its content, so that a client
can send back what the model did. Clients that put a stream together merge the lists in deltas by an `index` (openai for
Python), or keep the last one (openai for Node): so in chunks events have one, and a call comes with its result.
"""

import codecs
import time
from collections.abc import Iterable
from typing import Any, Protocol

from nanochat import chat
from nanochat.chat import Event
from nanochat.engine.sampling import LogProbs
from nanochat.tokenizer import Tokenizer
from nanochat.web.worker import Job

Chunk = dict[str, Any]
Said = tuple[int, LogProbs]


class Form(Protocol):
    """How one kind of completion is written."""

    def opening(self, index: int) -> list[Chunk]: ...
    def piece(self, index: int, event: Event, job: Job) -> list[Chunk]: ...
    def ending(self, index: int, job: Job) -> list[Chunk]: ...
    def usage(self, jobs: list[Job]) -> Chunk: ...
    def whole(self, jobs: list[Job], found: list[list[Event]]) -> Chunk: ...


def counted(jobs: list[Job], n: int = 1) -> dict[str, Any]:
    """OpenAI's usage: every prompt counts once, though it has n answers; every answer's tokens count."""
    prompts = [job.request for job in jobs[::n]]
    prompt, answer = sum(len(one.prompt) for one in prompts), sum(len(job.request.output) for job in jobs)
    return dict(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=dict(cached_tokens=sum(one.cached for one in prompts)),
    )


class ChatForm:
    """together: a call is held back until its result is there; where that takes time, it had better be seen at once."""

    def __init__(self, tokenizer: Tokenizer, id: str, model: str, logprobs: bool, together: bool):
        self.tokenizer, self.logprobs, self.together = tokenizer, logprobs, together
        self.head = dict(id=id, created=int(time.time()), model=model)
        self.sent: dict[int, int] = {}  # of each answer, how many events
        self.held: dict[int, list[dict[str, Any]]] = {}  # of each answer, a call

    def opening(self, index: int) -> list[Chunk]:
        return [self._chunk(index, dict(role="assistant", content=""))]

    def piece(self, index: int, event: Event, job: Job) -> list[Chunk]:
        if event.kind == "text":
            return [*self._let_go(index), self._chunk(index, dict(content=event.text), self._logprobs([event]))]
        before = self._let_go(index) if event.kind == "python" else []
        place = self.sent.get(index, 0)
        self.sent[index] = place + 1
        self.held.setdefault(index, []).append(dict(index=place, type=event.kind, text=event.text))
        return before if event.kind == "python" and self.together else [*before, *self._let_go(index)]

    def _let_go(self, index: int) -> list[Chunk]:
        held = self.held.pop(index, [])
        return [self._chunk(index, dict(events=held))] if held else []

    def ending(self, index: int, job: Job) -> list[Chunk]:
        return [*self._let_go(index), self._chunk(index, {}, reason=job.reason)]

    def usage(self, jobs: list[Job]) -> Chunk:
        return dict(self.head, object="chat.completion.chunk", choices=[], usage=counted(jobs, len(jobs)))

    def whole(self, jobs: list[Job], found: list[list[Event]]) -> Chunk:
        choices = []
        for i, (job, events) in enumerate(zip(jobs, found)):
            message: dict[str, Any] = dict(role="assistant", content=chat.visible_text(events), refusal=None)
            calls = [dict(type=event.kind, text=event.text) for event in events if event.kind != "text"]
            if calls:
                message["events"] = calls
            choices.append(dict(index=i, message=message, logprobs=self._logprobs(events), finish_reason=job.reason))
        return dict(self.head, object="chat.completion", choices=choices, usage=counted(jobs, len(jobs)))

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = dict(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return dict(self.head, object="chat.completion.chunk", choices=[choice])

    def _logprobs(self, events: list[Event]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return dict(
            content=[
                dict(self._token(token, found.chosen), top_logprobs=[self._token(t, p) for t, p in found.top])
                for event in events
                for token, found in event.tokens
            ],
            refusal=None,
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return dict(token=shown(self.tokenizer, token), logprob=finite(logprob), bytes=list(raw(self.tokenizer, token)))


class TextForm:
    """prompts: where they are to be repeated before their answers, as text and as ids. A choice is prompt · n + i."""

    def __init__(
        self, tokenizer: Tokenizer, id: str, model: str, logprobs: bool, n: int,
        prompts: list[tuple[str, list[int]]] | None = None,
    ):  # fmt: skip
        self.tokenizer, self.logprobs, self.n, self.prompts = tokenizer, logprobs, n, prompts
        self.head = dict(id=id, object="text_completion", created=int(time.time()), model=model)
        self.places: dict[int, Place] = {}

    def opening(self, index: int) -> list[Chunk]:
        return []

    def piece(self, index: int, event: Event, job: Job) -> list[Chunk]:
        return [self._chunk(index, job, event.text, event.tokens)]

    def ending(self, index: int, job: Job) -> list[Chunk]:
        return [self._chunk(index, job, "", None, job.reason)]

    def usage(self, jobs: list[Job]) -> Chunk:
        return dict(self.head, choices=[], usage=counted(jobs, self.n))

    def whole(self, jobs: list[Job], found: list[list[Event]]) -> Chunk:
        choices = []
        for i, (job, events) in enumerate(zip(jobs, found)):
            tokens = [token for event in events for token in event.tokens]
            choices += self._chunk(i, job, chat.visible_text(events), tokens, job.reason)["choices"]
        return dict(self.head, choices=choices, usage=counted(jobs, self.n))

    def _chunk(
        self, index: int, job: Job, text: str, tokens: Iterable[Said] | None, reason: str | None = None
    ) -> Chunk:
        """The first of an answer has the prompt before it, where that is to be repeated: it has been read by now."""
        rows = []
        if index not in self.places:
            self.places[index] = Place()
            if self.prompts is not None:
                before, ids = self.prompts[index // self.n]
                said = job.request.echoed[len(job.request.prompt) - len(ids) :]  # not of a bos that was added
                rows = [self._row(index, token, one if i else None) for i, (token, one) in enumerate(zip(ids, said))]
                self.places[index].end()
                text = before + text
        rows += [self._row(index, token, one) for token, one in tokens or ()]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = dict(zip(names, map(list, zip(*rows)))) if rows else {name: [] for name in names}
        shown = logprobs if self.logprobs and (rows or tokens is not None) else None
        return dict(self.head, choices=[dict(index=index, text=text, logprobs=shown, finish_reason=reason)])

    def _row(self, index: int, token: int, said: LogProbs | None) -> tuple[str, float | None, dict | None, int]:
        """(name, its log-probability, those of the likeliest and its own, where it begins)."""
        content = raw(self.tokenizer, token) if token < len(self.tokenizer.merges) else b""
        where = self.places[index].take(content)
        if said is None:
            return named(self.tokenizer, token), None, None, where
        likely = {named(self.tokenizer, t): finite(p) for t, p in [*said.top, (token, said.chosen)]}
        return named(self.tokenizer, token), finite(said.chosen), likely, where


class Place:
    """Where in a text its tokens begin, in characters: one that begins within a character, where that does."""

    def __init__(self) -> None:
        self.at, self.decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, content: bytes) -> int:
        before = self.at
        self.at += len(self.decoder.decode(content))
        return before

    def end(self) -> None:
        """What follows is another text."""
        self.at += len(self.decoder.decode(b"", final=True))
        self.decoder.reset()


def raw(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.decode_bytes([token])


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; half a character is a replacement character, the bytes have the truth."""
    return raw(tokenizer, token).decode("utf-8", "replace")


def named(tokenizer: Tokenizer, token: int) -> str:
    """A token as the only one of its name: its text, or, of half a character, its bytes as OpenAI writes them."""
    content = raw(tokenizer, token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI writes −9999 for it."""
    return max(logprob, -9999.0)
