"""Chapter 1: what a token is."""

from nanochat import bpe
from nanochat.course.chapter import Chapter, table
from nanochat.data import choose
from nanochat.data.source import first_items
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer

TEXT = "low low low lower lower newest newest newest widest"
SHOWN = "Every lighthouse needs 1024 lamps."


def picture() -> str:
    """One sentence in the tokens of three vocabularies, learnt from the embedded world's first texts."""
    texts = first_items(choose.documents("embedded", 0), "train", 200)
    rows, shown = [], ["the sentence"]
    for size in (265, 512, 1024):
        tokenizer = Tokenizer.train(texts, size)
        ids = tokenizer.encode(SHOWN)
        joined = "|".join(tokenizer.decode([token]) for token in ids)
        rows.append([f"{size:,}", str(len(ids)), f"{len(SHOWN.encode()) / len(ids):.2f}"])
        shown.append(joined)
    lines = table(["vocabulary", "tokens", "bytes per token"], rows).splitlines()
    return "\n".join(f"{line}  {text}" for line, text in zip(lines, shown))


def merges() -> list[str]:
    """What TEXT teaches, in order; a space as _."""
    return [token.decode().replace(" ", "_") for token in bpe.learn([TEXT], 256 + 8, SPLIT_PATTERN)[256:]]


def check(answer: str) -> str:
    answer = answer.rstrip().strip("\"'").replace(" ", "_")
    learnt = merges()
    if answer == learnt[2]:
        return ""
    if answer in learnt[:2]:
        return f"{answer} is merge {learnt.index(answer) + 1}: it makes a token that the third may be built from."
    if answer in learnt:
        return (
            f"{answer} is merge {learnt.index(answer) + 1}: of equally frequent pairs the one with the "
            "smaller first id goes first."
        )
    if answer.isdigit():
        return "That is an id. Which letters does it stand for?"
    if answer == learnt[2].strip("_"):
        return "Almost: what does the split pattern do with the space before a word?"
    return (
        "Count each pair of neighbours in all words, merge the most frequent everywhere, and count again; twice more."
    )


CHAPTER = Chapter(
    "What is a token?",
    f'Learn merges from the text "{TEXT}". The bytes have the ids 0 to 255, the first merge gets 256; of '
    "equally frequent pairs the one with the smaller first id goes first, and of those the one with the smaller second "
    "id. Which text does id 258, the third merge, stand for? Write a space as _.",
    picture,
    check,
)
