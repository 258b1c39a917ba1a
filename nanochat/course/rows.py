"""Chapter 2: how documents become rows of a batch."""

import numpy as np

from nanochat.course.chapter import Chapter, number
from nanochat.data.packing import Document, Packer

SHOWN, ASKED, CAPACITY = (9, 8, 7, 5, 5, 2), (9, 8, 6, 5, 5, 4, 3), 12


def packed(lengths: tuple[int, ...], pad: bool) -> list[list[Document]]:
    """The rows of documents whose tokens are all the document's number."""
    packer = Packer(CAPACITY, pad)
    for i, length in enumerate(lengths):
        packer.add(Document(np.full(length, i, dtype=np.int32)))
    rows = []
    while len(packer):
        rows.append(packer.pack())
    return rows


def picture() -> str:
    lines = [f"documents {', '.join(f'{chr(65 + i)}: {n}' for i, n in enumerate(SHOWN))}; rows of {CAPACITY} tokens"]
    for title, pad in (("pretraining crops", False), ("SFT pads", True)):
        for row in packed(SHOWN, pad):
            text = "".join(chr(65 + token) for document in row for token in document.tokens)
            lines.append(f"{title:18} {text:.<{CAPACITY}}")
            title = ""
    return "\n".join(lines)


def lost(pad: bool) -> int:
    """Tokens of ASKED that are in no row, or padding where rows are padded."""
    rows = packed(ASKED, pad)
    kept = sum(len(document) for row in rows for document in row)
    return len(rows) * CAPACITY - kept if pad else sum(ASKED) - kept


def check(answer: str) -> str:
    value = number(answer)
    if value == lost(False):
        return ""
    if value == lost(True):
        return "That is how much padding SFT's rows would have. Pretraining pads nothing: it crops."
    if value == 0:
        return "A row that is not full, with nothing that fits: see what `Packer.pack` takes then."
    return "Fill row after row: always the longest document that still fits; if none does, the shortest, cropped."


CHAPTER = Chapter(
    "From documents to rows",
    f"Documents of {', '.join(map(str, ASKED))} tokens wait, and rows have {CAPACITY}. Pretraining packs rows "
    "until none "
    "is left. How many tokens are cropped away, of all documents together?",
    picture,
    check,
)
