"""Between messages and ids: renders a conversation, follows the model's answer, runs its tool calls.

The model writes an expression between <|python_start|> and <|python_end|>; the calculator's answer goes back as forced
tokens between <|output_start|> and <|output_end|>, and the model writes on. `Reply` is that state machine; it turns
tokens into events, text whole in UTF-8.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat.calculator import calculate
from nanochat.engine import Engine, Request, Sampling
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Event:
    """A piece of an answer: of kind "text", shown as it comes; "python", a whole call; "python_output", its result."""

    kind: str
    text: str


class Reply:
    """An answer in the making. Feed it every token of the request; it gives events and forces tool results."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.tokenizer, self.request = tokenizer, request
        self._inside: str | None = None  # the tool section we are in: "python" or "python_output"
        self._section: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half characters

    def feed(self, token: int) -> list[Event]:
        special = self.tokenizer.special
        if token == special["<|python_start|>"]:
            self._open("python")
        elif token == special["<|output_start|>"]:
            self._open("python_output")
        elif token == special["<|python_end|>"] and self._inside == "python":
            call = self._close()
            result = calculate(call.text)
            if result is not None:
                answer = self.tokenizer.encode(result)
                self.request.force([special["<|output_start|>"], *answer, special["<|output_end|>"]])
            return [call]
        elif token == special["<|output_end|>"] and self._inside == "python_output":
            return [self._close()]
        elif token >= len(self.tokenizer.merges):
            pass  # a special token where none belongs is not text
        elif self._inside:
            self._section.append(token)
        else:
            text = self._decoder.decode(self.tokenizer.decode_bytes([token]))
            return [Event("text", text)] if text else []
        return []

    def finish(self) -> list[Event]:
        """What was still held back, at the end."""
        text = self._decoder.decode(b"", final=True)
        return [Event("text", text)] if text else []

    def _open(self, kind: str) -> None:
        self._inside, self._section = kind, []

    def _close(self) -> Event:
        event = Event(self._inside or "", self.tokenizer.decode(self._section))
        self._inside = None
        return event


def content(events: list[Event]) -> str | list[dict]:
    """The events of an answer as a message's content: a string, or parts where the tool was used."""
    parts: list[dict] = []
    for event in events:
        if parts and event.kind == "text" == parts[-1]["type"]:
            parts[-1]["text"] += event.text
        else:
            parts.append(dict(type=event.kind, text=event.text))
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def visible_text(events: list[Event]) -> str:
    """What a person reads of an answer: its text without the tool calls."""
    return "".join(event.text for event in events if event.kind == "text")


def request(tokenizer: Tokenizer, messages: list[dict], max_tokens: int, sampling: Sampling, context: int) -> Request:
    """A request for the assistant's next turn. Drops the oldest turns when prompt and answer exceed the context."""
    messages = list(messages)
    while True:
        prompt = tokenizer.render_for_completion(messages)
        if len(prompt) + min(max_tokens, context // 4) <= context or len(messages) <= 2:
            break
        first = 1 if messages[0]["role"] == "system" else 0
        del messages[first : first + 2]
    prompt = prompt if len(prompt) < context else [prompt[0], *prompt[-(context * 3 // 4) :]]
    ends = frozenset((tokenizer.special["<|assistant_end|>"], tokenizer.bos))
    return Request(prompt, max_tokens, sampling, ends)


def stream(
    engine: Engine, tokenizer: Tokenizer, messages: list[dict], max_tokens: int, sampling: Sampling
) -> Iterator[Event]:
    """Yields the events of one answer as they come."""
    asked = request(tokenizer, messages, max_tokens, sampling, engine.config.sequence_len)
    reply = Reply(tokenizer, asked)
    for token in engine.stream(asked):
        yield from reply.feed(token)
    yield from reply.finish()


def answers(
    engine: Engine, tokenizer: Tokenizer, conversations: list[list[dict]], max_tokens: int, sampling: Sampling
) -> list[list[Event]]:
    """The events of the next answer of every conversation, run through the engine together."""
    replies: dict[Request, Reply] = {}
    events: dict[Request, list[Event]] = {}
    for messages in conversations:
        asked = request(tokenizer, messages, max_tokens, sampling, engine.config.sequence_len)
        replies[asked], events[asked] = Reply(tokenizer, asked), []
        engine.submit(asked)
    while not engine.idle:
        for owner, token in engine.step():
            events[owner] += replies[owner].feed(token)
        engine.retire()
    return [collected + replies[asked].finish() for asked, collected in events.items()]
