"""Between messages and ids: renders a conversation, follows the model's answer, runs its tool calls.

The model writes an expression between <|python_start|> and <|python_end|>; the tool's answer (the calculator's, or that
of sandbox/tool.py) goes back as forced tokens between <|output_start|> and <|output_end|>, and the model writes on.
`Reply` is that state machine; it turns tokens into events, text whole in UTF-8, and ends at stop strings, which may lie
across tokens: what could become one is held back, and never shown if it does.
"""

import codecs
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from nanochat.calculator import calculate
from nanochat.engine import Engine, Request, Sampling
from nanochat.engine.sampling import LogProbs
from nanochat.tokenizer import Tokenizer

# What answers a call: its text, or None for no answer; at once, or later where it takes time.
Tool = Callable[[str], str | None | Future[str | None]]


@dataclass(frozen=True)
class Event:
    """A part of an answer: of kind "text", shown as it comes; "python", a whole call; "python_output", its result.

    `tokens` are those that the text is made of, where log-probabilities are asked for.
    """

    kind: str
    text: str
    tokens: tuple[tuple[int, LogProbs], ...] = ()


class Reply:
    """An answer in the making. Feed it every token of the request; it gives events and forces tool results.

    `stopped` is set when a stop string came: the request is to be cancelled. tool=None: raw text, no calls. While a
    tool takes its time, `pending` is its answer to come and the request is paused: when it is done call `resume`, then
    submit the request again.
    """

    def __init__(
        self, tokenizer: Tokenizer, request: Request, stops: Sequence[str] = (), tool: Tool | None = calculate
    ):
        self.tokenizer, self.request, self.stops, self.tool = tokenizer, request, tuple(stops), tool
        self.stopped = False
        self.pending: Future[str | None] | None = None
        self._inside: str | None = None  # the tool section we are in: "python" or "python_output"
        self._section: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half characters
        self._held = ""  # text that could be the beginning of a stop string
        self._shown = 0  # characters given out
        self._owed: deque[tuple[int, int, LogProbs]] = deque()  # (where it begins, token, …) of tokens not given out

    def feed(self, token: int) -> list[Event]:
        if self.stopped:
            return []
        special = token >= len(self.tokenizer.merges)
        if special and self.tool:
            return self._call(token, self.tokenizer.special, self.tool)
        if self._inside:
            self._section.append(token)
            return []
        self._owe(token)
        return self._text("" if special else self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def finish(self) -> list[Event]:
        """What was still held back, at the end."""
        if self.pending:
            self.pending.cancel()
        if self.stopped:
            return []
        if self.request.echo and self.request.stopped_by is not None:
            self._owe(self.request.stopped_by)
        found = self._text(self._decoder.decode(b"", final=True))
        return found if self.stopped else found + self._give(self._held, last=True)

    def resume(self) -> None:
        """Takes the answer of the tool, waiting for it."""
        assert self.pending
        answer, self.pending = self.pending.result(), None
        self.request.paused = False
        self._force(answer)

    def _owe(self, token: int) -> None:
        if self.request.logprobs:
            self._owed.append((self._shown + len(self._held), token, self.request.logprobs[-1]))

    def _text(self, new: str) -> list[Event]:
        text = self._held + new
        at = min((i for stop in self.stops if (i := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            return self._give(text[:at])
        longest = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text
        return self._give(text[: len(text) - longest])

    def _give(self, text: str, last: bool = False) -> list[Event]:
        """An event of the first held characters, with the tokens that begin in them (last: all that are left)."""
        self._held = self._held[len(text) :]
        self._shown += len(text)
        tokens = []
        while self._owed and (last or self._owed[0][0] < self._shown):
            _, token, logprobs = self._owed.popleft()
            tokens.append((token, logprobs))
        return [Event("text", text, tuple(tokens))] if text or tokens else []

    def _call(self, token: int, special: dict[str, int], tool: Tool) -> list[Event]:
        if token in (special["<|python_start|>"], special["<|output_start|>"]):
            before = [] if self._inside else self._give(self._held)  # no stop string reaches over a call
            self._inside = "python" if token == special["<|python_start|>"] else "python_output"
            self._section = []
            return before
        if token == special["<|python_end|>"] and self._inside == "python":
            call = self._close()
            answer = tool(call.text)
            if isinstance(answer, Future):
                self.pending, self.request.paused = answer, True
            else:
                self._force(answer)
            return [call]
        if token == special["<|output_end|>"] and self._inside == "python_output":
            return [self._close()]
        return []  # a special token where none belongs is not text

    def _force(self, answer: str | None) -> None:
        if answer is not None:
            special = self.tokenizer.special
            tokens = self.tokenizer.encode(answer)
            self.request.force([special["<|output_start|>"], *tokens, special["<|output_end|>"]])

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


def printable(text: str) -> str:
    """Without what a terminal would obey (a model may write any bytes): escapes, and what turns the line around.

    All else stays, spaces that do not break and the joiners of emoji and of Indic and Persian words too. Control
    characters that end lines, and tabulators, become a space, so that words stay apart.
    """
    return "".join(c if not obeyed(c) else " " if c.isspace() else "" for c in text)


def obeyed(character: str) -> bool:
    """Whether a terminal takes it for a command, and not for a letter."""
    turning = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return turning or (character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"))


def visible_text(events: list[Event]) -> str:
    """What a person reads of an answer: its text without the tool calls."""
    return "".join(event.text for event in events if event.kind == "text")


def prompt_within(tokenizer: Tokenizer, messages: list[dict], max_tokens: int, context: int) -> list[int]:
    """A conversation's ids. Drops the oldest turns when prompt and answer exceed the context.

    It is read from its end, and no further than there is room: what a conversation costs does not grow with its length.
    """
    system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    room = context - min(max_tokens, context // 4)
    size = 2 + sum(
        len(tokenizer.encode(message["content"] + "\n\n")) for message in system
    )  # <|bos|>, the answer's start
    first = last = (len(turns) - 1) // 2 * 2  # turns are dropped by pairs
    size += sum(len(tokenizer.turn(turn)[0]) for turn in turns[first:])
    while first and (size := size + sum(len(tokenizer.turn(turn)[0]) for turn in turns[first - 2 : first])) <= room:
        first -= 2
    while True:
        prompt = tokenizer.render_for_completion([*system, *turns[first:]])
        if len(prompt) <= room or first == last:
            break
        first += 2  # what joins two texts may be a token more than the two
    if len(prompt) < context:
        return prompt
    kept = min(context * 3 // 4, context - 2)  # beside <|bos|>, with room for a token of the answer
    return [prompt[0], *prompt[len(prompt) - kept :]]


def ends(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer."""
    return frozenset((tokenizer.special["<|assistant_end|>"], tokenizer.bos))


def request(tokenizer: Tokenizer, messages: list[dict], max_tokens: int, sampling: Sampling, context: int) -> Request:
    """A request for the assistant's next turn, within the context."""
    prompt = prompt_within(tokenizer, messages, max_tokens, context)
    return Request(prompt, max_tokens, sampling, ends(tokenizer))


def stream(
    engine: Engine, tokenizer: Tokenizer, messages: list[dict], max_tokens: int, sampling: Sampling,
    tool: Tool = calculate,
) -> Iterator[Event]:  # fmt: skip
    """Yields the events of one answer as they come."""
    asked = request(tokenizer, messages, max_tokens, sampling, engine.config.sequence_len)
    reply = Reply(tokenizer, asked, tool=tool)
    for token in engine.stream(asked):
        yield from reply.feed(token)
        if reply.pending and not asked.finished:
            engine.retire()
            reply.resume()
            engine.submit(asked)
    yield from reply.finish()


def answers(
    engine: Engine, tokenizer: Tokenizer, conversations: Sequence[list[dict]], max_tokens: int,
    sampling: Sampling | Sequence[Sampling], tool: Tool = calculate, tick: Callable[[int], None] = lambda done: None,
) -> list[list[Event]]:  # fmt: skip
    """The events of the next answer of every conversation, run through the engine together.

    sampling: one for all, or one for each. tick: called after each step with how many answers it has finished.
    """
    each = [sampling] * len(conversations) if isinstance(sampling, Sampling) else sampling
    context = engine.config.sequence_len
    asked = [request(tokenizer, messages, max_tokens, own, context) for messages, own in zip(conversations, each)]
    return together(engine, tokenizer, asked, tool, tick)


def together(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], tool: Tool = calculate,
    tick: Callable[[int], None] = lambda done: None,
) -> list[list[Event]]:  # fmt: skip
    """The events of requests for answers, all run through the engine. tick: as for `answers`."""
    replies: dict[Request, Reply] = {}
    events: dict[Request, list[Event]] = {}
    for asked in requests:
        replies[asked], events[asked] = Reply(tokenizer, asked, tool=tool), []
        engine.submit(asked)
    pending: dict[Future, Reply] = {}
    left = len(replies)
    while not engine.idle or pending:
        for owner, token in engine.step():
            events[owner] += (reply := replies[owner]).feed(token)
            if reply.pending and not owner.finished:
                pending[reply.pending] = reply
        engine.retire()
        if pending and engine.idle:
            wait(pending, return_when=FIRST_COMPLETED)
        for future in [future for future in pending if future.done()]:
            reply = pending.pop(future)
            reply.resume()
            engine.submit(reply.request)
        before, left = left, len(engine.running) + len(engine.waiting) + len(pending)
        tick(before - left)
    return [collected + replies[asked].finish() for asked, collected in events.items()]
