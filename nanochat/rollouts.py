"""Answers to practise on: several to each question, drawn by the engine at temperature 1, all questions in one batch.

The samples of a question share its prompt's keys and values, which the engine's prefix cache finds. A sample's seed
follows from the step, the question and the sample's number, whichever rank or slot it is drawn in. Of every token the
engine says how likely it took it: what the trainer's own probability is compared with (nanochat/rl.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.calculator import calculate
from nanochat.chat import Event, Tool, ends, prompt_within, together, visible_text
from nanochat.engine import Engine, Request, Sampling
from nanochat.tasks import Question
from nanochat.tasks.practice import Practice
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """A question and its place among the step's."""

    place: int
    question: Question


@dataclass(frozen=True)
class Sample:
    """One answer: its tokens, how likely each was (nats), which of them the model chose itself; and what it is worth.

    `tokens` are prompt and output, the token that ended it too; the other lists are of the output's tokens.
    """

    place: int  # its question's
    prompt: int  # how many tokens that is
    tokens: list[int]
    drawn: list[bool]  # not those that the tool's answer forced
    logprobs: list[float]  # the engine's
    events: list[Event]
    ended: str  # "stop" or "length"
    reward: float

    @property
    def learnt(self) -> int:
        """How many tokens the model chose."""
        return sum(self.drawn)


def seed(base: int, step: int, place: int, sample: int) -> int:
    """Of one sample of one question of one step."""
    digest = hashlib.sha256(f"{base}\0rollout\0{step}\0{place}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def roll_out(
    engine: Engine, tokenizer: Tokenizer, practice: Practice, kind: str, asked: Sequence[Asked], samples: int,
    limit: int, base: int, step: int, tool: Tool = calculate,
) -> list[Sample]:  # fmt: skip
    """So many samples of every question, of at most `limit` tokens; those of a question stand together.

    kind: of reward, as of Practice.reward; base: the run's seed.
    """
    of, requests = [], []
    for one in asked:
        prompt = prompt_within(tokenizer, one.question.messages, limit, engine.config.sequence_len)
        for i in range(samples):
            drawing = Sampling(1.0, None, seed(base, step, one.place, i), logprobs=0)
            requests.append(Request(prompt, limit, drawing, ends(tokenizer)))
            of.append(one)
    found = together(engine, tokenizer, requests, tool)
    return [_sample(one, request, events, practice, kind) for one, request, events in zip(of, requests, found)]


def _sample(one: Asked, request: Request, events: list[Event], practice: Practice, kind: str) -> Sample:
    last = [] if request.stopped_by is None else [request.stopped_by]
    return Sample(
        one.place,
        len(request.prompt),
        [*request.prompt, *request.output, *last],
        [*request.drawn, *(True for _ in last)],
        [said.chosen for said in request.logprobs],
        events,
        request.ended,
        practice.reward(kind, one.question, visible_text(events)),
    )
