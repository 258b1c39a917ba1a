"""Best-fit packing of documents into rows of a fixed number of tokens, every row beginning with a document.

A row takes again and again the longest waiting document that still fits. When none fits, pretraining crops the shortest
one to fill the row (nothing is padded, little is lost: the shortest is cropped), while SFT pads (nothing is lost). A
document longer than a row is cut beforehand into several, each beginning with <|bos|>, so that long books are not
wasted.

The waiting documents are kept sorted by length, so that finding the best is a binary search instead of a scan over all
1,000 (benchmarks/test_packing.py compares the two). Same length: the one that has waited longest.
Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830; cropping as in nanochat.
"""

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

import numpy as np

IGNORED = -1  # target of a token that is not to be learnt


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids (int32) and, for conversations in SFT, which of them are to be learnt (bool); None means all."""

    tokens: np.ndarray
    trained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def cropped(self, length: int) -> "Document":
        return Document(self.tokens[:length], None if self.trained is None else self.trained[:length])


def cut_long(document: Document, capacity: int) -> list[Document]:
    """A document in chunks of at most `capacity` tokens, each beginning with the first token (<|bos|>)."""
    if len(document) <= capacity:
        return [document]
    bos, body = document.tokens[:1], document.tokens[1:]
    step = capacity - 1
    return [Document(np.concatenate((bos, body[i : i + step]))) for i in range(0, len(body), step)]


def learnable(document: Document, capacity: int) -> bool:
    """Whether a row of `capacity` tokens that begins with it has a target of it. A row's first token is none."""
    return document.trained is None or bool(document.trained[1:capacity].any())


class Packer:
    """The waiting documents. `add` them, `pack` rows of `capacity` tokens out of them."""

    def __init__(self, capacity: int, pad: bool):
        self.capacity, self.pad = capacity, pad
        self.seen = self.left_out = 0  # documents
        self._waiting: list[tuple[int, int, Document]] = []  # sorted by (length, arrival)
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, document: Document) -> None:
        """Padded rows cannot hold more than their capacity: there a longer document is cropped, else cut in chunks.

        One with nothing to learn (an answer that begins beyond the crop, or none) is left out.
        """
        self.seen += 1
        if not learnable(document, self.capacity):
            self.left_out += 1
            return
        chunks = [document.cropped(self.capacity)] if self.pad else cut_long(document, self.capacity)
        for chunk in chunks:
            insort(self._waiting, (len(chunk), self._arrivals, chunk))
            self._arrivals += 1

    def waiting(self) -> list[Document]:
        """The waiting documents in the order in which they came; adding them to a new packer restores this one."""
        return [document for _, _, document in sorted(self._waiting, key=lambda entry: entry[1])]

    def pack(self) -> list[Document]:
        """The documents of the next row: `capacity` tokens together, fewer when padding or running dry."""
        row, left = [], self.capacity
        while left > 0 and self._waiting:
            fitting = bisect_right(self._waiting, left, key=lambda entry: entry[0])
            if fitting:
                length = self._waiting[fitting - 1][0]
                document = self._waiting.pop(bisect_left(self._waiting, length, key=lambda entry: entry[0]))[2]
            elif self.pad:
                break
            else:
                document = self._waiting.pop(0)[2].cropped(left)
            row.append(document)
            left -= len(document)
        return row


def row_arrays(documents: list[Document], capacity: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), each (capacity − 1,) int64; the rest of a short row is `filler` with IGNORED targets."""
    tokens = np.full(capacity, filler, dtype=np.int64)
    targets = np.full(capacity, IGNORED, dtype=np.int64)
    start = 0
    for document in documents:
        end = start + len(document)
        tokens[start:end] = document.tokens
        targets[start:end] = (
            document.tokens if document.trained is None else np.where(document.trained, document.tokens, IGNORED)
        )
        start = end
    return tokens[:-1], targets[1:]
