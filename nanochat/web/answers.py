"""Answers as OpenAI's clients want them: chat completions and plain ones, whole or in chunks.

The calculator's calls, which have no place in OpenAI's format, go in a field of their own, `events`: a list of {"type":
"python" | "python_output", "text": …}. An assistant message may have the same as parts of its content, so that a client
can send back what the model did. Clients that put a stream together merge the lists in deltas by an `index` (openai for
Python), or keep the last one (openai for Node): so one delta, after the text, has them all, with indices. Who wants to
see them as they come finds each in `event`, beside the delta of its chunk.
"""

import codecs
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from nanochat import chat
from nanochat.chat import Event
from nanochat.engine.sampling import LogProbs
from nanochat.tokenizer import Tokenizer
from nanochat.web.worker import Job

Chunk = dict[str, Any]
Said = tuple[int, LogProbs]
SLICE = 100  # entries of a list that are written at once


class Form(Protocol):
    """How one kind of completion is written."""

    def opening(self, index: int) -> list[Chunk]: ...
    def delta(self, index: int, event: Event, job: Job) -> list[Chunk]: ...
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
    def __init__(self, tokenizer: Tokenizer, id: str, model: str, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self.head = dict(id=id, created=int(time.time()), model=model)
        self.calls: dict[int, list[dict[str, Any]]] = {}  # of each answer, what its tool was asked and said

    def opening(self, index: int) -> list[Chunk]:
        return [self._chunk(index, dict(role="assistant", content=""))]

    def delta(self, index: int, event: Event, job: Job) -> list[Chunk]:
        if event.kind == "text":
            return [self._chunk(index, dict(content=event.text), logprobs=self._logprobs([event]))]
        calls = self.calls.setdefault(index, [])
        calls.append(dict(index=len(calls), type=event.kind, text=event.text))
        return [self._chunk(index, {}, event=called(event))]

    def ending(self, index: int, job: Job) -> list[Chunk]:
        calls = [self._chunk(index, dict(events=self.calls[index]))] if index in self.calls else []
        return [*calls, self._chunk(index, {}, finish_reason=job.reason)]

    def usage(self, jobs: list[Job]) -> Chunk:
        return dict(self.head, object="chat.completion.chunk", choices=[], usage=counted(jobs, len(jobs)))

    def whole(self, jobs: list[Job], found: list[list[Event]]) -> Chunk:
        choices = []
        for i, (job, events) in enumerate(zip(jobs, found)):
            message: dict[str, Any] = dict(role="assistant", content=chat.visible_text(events), refusal=None)
            calls = [called(event) for event in events if event.kind != "text"]
            if calls:
                message["events"] = calls
            choices.append(dict(index=i, message=message, logprobs=self._logprobs(events), finish_reason=job.reason))
        return dict(self.head, object="chat.completion", choices=choices, usage=counted(jobs, len(jobs)))

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = dict(index=index, delta=delta, logprobs=None, finish_reason=None) | more
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


def called(event: Event) -> dict[str, str]:
    """A call of the tool, or its result, as clients are told of it."""
    return dict(type=event.kind, text=event.text)


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

    def delta(self, index: int, event: Event, job: Job) -> list[Chunk]:
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


def dumped(value: Any) -> Iterator[str]:
    """JSON in chunks: json.dumps lets no other thread run, and takes tenths of a second of long log-probabilities."""
    if isinstance(value, dict):
        yield "{"
        for i, (name, inner) in enumerate(value.items()):
            yield f"{',' if i else ''}{json.dumps(name, ensure_ascii=False)}:"
            yield from dumped(inner)
        yield "}"
    elif isinstance(value, list) and len(value) > SLICE:
        for i in range(0, len(value), SLICE):
            yield ("," if i else "[") + json.dumps(value[i : i + SLICE], ensure_ascii=False, allow_nan=False)[1:-1]
        yield "]"
    elif isinstance(value, list):
        yield "["
        for i, inner in enumerate(value):
            yield "," if i else ""
            yield from dumped(inner)
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False)
