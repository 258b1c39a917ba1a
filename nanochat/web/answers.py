"""Answers as OpenAI's clients want them: chat completions and plain ones, whole or in chunks.

The calculator's calls, which have no place in OpenAI's format, go in a field of their own, `events`: a list of {"type":
"python" | "python_output", "text": …}. An assistant message may have the same as parts of its content, so that a client
can send back what the model did.
"""

import time
from typing import Any, Protocol

from nanochat import chat
from nanochat.chat import Event
from nanochat.tokenizer import Tokenizer
from nanochat.web.worker import Job


class Form(Protocol):
    """How one kind of completion is written."""

    def opening(self, index: int) -> dict[str, Any] | None: ...
    def piece(self, index: int, event: Event) -> dict[str, Any]: ...
    def ending(self, index: int, job: Job) -> dict[str, Any]: ...
    def usage(self, jobs: list[Job]) -> dict[str, Any]: ...
    def whole(self, jobs: list[Job], found: list[list[Event]]) -> dict[str, Any]: ...


def counted(jobs: list[Job]) -> dict[str, Any]:
    """OpenAI's usage: the prompt counts once, every answer's tokens count."""
    prompt, answer = len(jobs[0].request.prompt), sum(len(job.request.output) for job in jobs)
    return dict(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=dict(cached_tokens=jobs[0].request.cached),
    )


class ChatForm:
    def __init__(self, tokenizer: Tokenizer, id: str, model: str, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self.head = dict(id=id, created=int(time.time()), model=model)

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, dict(role="assistant", content=""))

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        if event.kind != "text":
            return self._chunk(index, dict(events=[dict(type=event.kind, text=event.text)]))
        return self._chunk(index, dict(content=event.text), self._logprobs([event]))

    def ending(self, index: int, job: Job) -> dict[str, Any]:
        return self._chunk(index, {}, reason=job.reason)

    def usage(self, jobs: list[Job]) -> dict[str, Any]:
        return dict(self.head, object="chat.completion.chunk", choices=[], usage=counted(jobs))

    def whole(self, jobs: list[Job], found: list[list[Event]]) -> dict[str, Any]:
        choices = []
        for i, (job, events) in enumerate(zip(jobs, found)):
            message: dict[str, Any] = dict(role="assistant", content=chat.visible_text(events), refusal=None)
            calls = [dict(type=event.kind, text=event.text) for event in events if event.kind != "text"]
            if calls:
                message["events"] = calls
            choices.append(dict(index=i, message=message, logprobs=self._logprobs(events), finish_reason=job.reason))
        return dict(self.head, object="chat.completion", choices=choices, usage=counted(jobs))

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
    def __init__(self, tokenizer: Tokenizer, id: str, model: str, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self.head = dict(id=id, object="text_completion", created=int(time.time()), model=model)
        self.offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, event: Event) -> dict[str, Any]:
        return self._choice(index, event.text, self._logprobs(index, [event]), None)

    def ending(self, index: int, job: Job) -> dict[str, Any]:
        return self._choice(index, "", None, job.reason)

    def usage(self, jobs: list[Job]) -> dict[str, Any]:
        return dict(self.head, choices=[], usage=counted(jobs))

    def whole(self, jobs: list[Job], found: list[list[Event]]) -> dict[str, Any]:
        choices = [
            self._choice(i, chat.visible_text(events), self._logprobs(i, events), job.reason)["choices"][0]
            for i, (job, events) in enumerate(zip(jobs, found))
        ]
        return dict(self.head, choices=choices, usage=counted(jobs))

    def _choice(self, index: int, text: str, logprobs: dict | None, reason: str | None) -> dict[str, Any]:
        choice = dict(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        return dict(self.head, choices=[choice])

    def _logprobs(self, index: int, events: list[Event]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        made: dict[str, list] = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for event in events:
            for token, found in event.tokens:
                text = shown(self.tokenizer, token)
                made["tokens"].append(text)
                made["token_logprobs"].append(finite(found.chosen))
                made["top_logprobs"].append({shown(self.tokenizer, t): finite(p) for t, p in found.top})
                made["text_offset"].append(self.offsets.get(index, 0))
                self.offsets[index] = self.offsets.get(index, 0) + len(text)
        return made


def raw(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.decode_bytes([token])


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; half a character is a replacement character, the bytes have the truth."""
    return raw(tokenizer, token).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI writes −9999 for it."""
    return max(logprob, -9999.0)
