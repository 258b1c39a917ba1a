import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.packing import IGNORED, Document, Packer, row_arrays

BOS = 999


def document(length, name=0, masked=False):
    tokens = np.array([BOS] + [name] * (length - 1), dtype=np.int32)
    return Document(tokens, np.arange(length) % 2 == 0 if masked else None)


def scan(waiting, capacity, pad):
    """Best fit as one would write it first: a scan over all waiting documents."""
    row, left = [], capacity
    while left > 0 and waiting:
        fitting = [d for d in waiting if len(d) <= left]
        if fitting:
            best = max(fitting, key=len)  # the first of the longest
        elif pad:
            break
        else:
            best = min(waiting, key=len)
        waiting.remove(best)
        row.append(best.cropped(left) if len(best) > left else best)
        left -= len(row[-1])
    return row


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths, st.booleans())
def test_the_same_rows_as_a_scan(sizes, pad):
    packer, waiting = Packer(20, pad), []
    for i, size in enumerate(sizes):
        packer.add(document(min(size, 20), i))
        waiting.append(document(min(size, 20), i))
    while len(packer):
        packed, scanned = packer.pack(), scan(waiting, 20, pad)
        assert [d.tokens.tolist() for d in packed] == [d.tokens.tolist() for d in scanned]
    assert not waiting


@settings(max_examples=100, deadline=None)
@given(lengths)
def test_rows_are_full_and_begin_with_bos(sizes):
    packer = Packer(16, pad=False)
    for size in sizes:
        packer.add(document(size))
    while len(packer):
        row = packer.pack()
        assert row[0].tokens[0] == BOS
        assert sum(map(len, row)) == 16 or not len(packer)


def test_a_long_document_is_cut_into_pieces_that_begin_with_bos():
    packer = Packer(10, pad=False)
    packer.add(Document(np.array([BOS, *range(30)], dtype=np.int32)))
    chunks = [d.tokens.tolist() for d in packer.waiting()]
    assert all(chunk[0] == BOS and len(chunk) <= 10 for chunk in chunks)
    assert [token for chunk in chunks for token in chunk[1:]] == list(range(30))


def test_padding_loses_nothing_but_what_exceeds_a_row():
    packer = Packer(10, pad=True)
    for size in (6, 6, 3, 25):
        packer.add(document(size, masked=True))
    rows = []
    while len(packer):
        rows.append([len(d) for d in packer.pack()])
    assert rows == [[10], [6, 3], [6]]


@given(lengths)
def test_waiting_documents_restore_the_packer(sizes):
    first, second = Packer(20, pad=False), Packer(20, pad=False)
    for i, size in enumerate(sizes):
        first.add(document(size, i))
    first.pack()
    for d in first.waiting():
        second.add(d)
    while len(first):
        assert [d.tokens.tolist() for d in first.pack()] == [d.tokens.tolist() for d in second.pack()]


def test_targets_are_the_next_tokens_and_ignore_what_is_not_trained():
    inputs, targets = row_arrays([document(3, 7, masked=True), document(2, 8)], 8, BOS)
    assert inputs.tolist() == [BOS, 7, 7, BOS, 8, BOS, BOS]
    assert targets.tolist() == [IGNORED, 7, BOS, 8, IGNORED, IGNORED, IGNORED]
