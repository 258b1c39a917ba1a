"""Chapter 11: a conversation, its mask, and what a score says."""

from itertools import groupby

from nanochat.course.chapter import Chapter, number
from nanochat.evaluate.intervals import McNemar
from nanochat.tokenizer import Tokenizer

N, DIFFER = 500, 40
CONVERSATION = dict(
    messages=[
        dict(role="user", content="What is 27 + 58?"),
        dict(
            role="assistant",
            content=[
                dict(type="python", text="27+58"),
                dict(type="python_output", text="85"),
                dict(type="text", text="It is 85."),
            ],
        ),
    ]
)


def picture() -> str:
    """Ids as text, in runs with the same mask."""
    tokenizer = Tokenizer([bytes([value]) for value in range(256)])
    ids, mask = tokenizer.render(CONVERSATION)
    lines = []
    for trained, stretch in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in stretch])
        lines.append(f"{'learnt' if trained else 'given':8}{text}")
    return "\n".join(lines)


def right() -> int:
    return next(only_a for only_a in range(DIFFER + 1) if only_a > DIFFER / 2 and p(only_a) < 0.05)


def p(only_a: int) -> float:
    return McNemar(N, only_a, DIFFER - only_a).p


def check(answer: str) -> str:
    value = number(answer)
    if value != int(value) or not 0 <= value <= DIFFER:
        return f"The answer is a number of questions, 0 to {DIFFER}."
    if value == right():
        return ""
    if value <= DIFFER / 2:
        return f"With {value:g} of {DIFFER}, A is not the better one."
    if p(int(value)) < 0.05:
        return f"With {value:g} it is: p is {p(int(value)):.3f}. But with fewer too."
    return (
        f"With {value:g} p is {p(int(value)):.3f}. A fair coin, {DIFFER} throws: how rare must heads be, on "
        "either side?"
    )


CHAPTER = Chapter(
    "A conversation, and what a score says",
    f"Models A and B are asked the same {N} questions; on {DIFFER} exactly one of them is right. How many of "
    "these must be "
    "A's, at least, for A to be the better one at p < 0.05 (two-sided, McNemar's exact test)?",
    picture,
    check,
)
