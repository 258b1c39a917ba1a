import itertools
import threading

import pytest
import tiny
import torch

from nanochat.data.loader import (
    Batch,
    LoaderState,
    Prefetch,
    Rows,
    batches,
    conversation_encoder,
    document_encoder,
    one_pass,
)
from nanochat.data.source import Position, first_items, read
from nanochat.errors import UserError

TOKENIZER = tiny.tokenizer()
TEXTS = tiny.sentences(3000)


class ListSource:
    name, fingerprint = "list", "0"

    def __init__(self, items, size=64):
        self.items, self.size = items, size

    def units(self, split):
        return -(-len(self.items) // self.size)

    def load(self, split, unit):
        return self.items[unit * self.size : (unit + 1) * self.size]


SOURCE = ListSource(TEXTS)


def take(count, rows, state=None, source=SOURCE, encode=None):
    stream = batches(source, "train", encode or document_encoder(TOKENIZER), rows, state, TOKENIZER.bos)
    return list(itertools.islice(stream, count))


def restored(state: LoaderState) -> LoaderState:
    """Through the same form as on disk."""
    return LoaderState.restore(state.metadata(), state.tensors(), 1 << 16)


@pytest.mark.parametrize("masked", [False, True])
def test_a_restored_stream_goes_on_bitwise(masked):
    if masked:
        source = ListSource(
            [dict(messages=[dict(role="user", content=t), dict(role="assistant", content=t)]) for t in TEXTS]
        )
        encode, rows = conversation_encoder(TOKENIZER, masked=True), Rows(4, 64, pad=True)
    else:
        source, encode, rows = SOURCE, document_encoder(TOKENIZER), Rows(4, 64)
    whole = take(40, rows, source=source, encode=encode)
    again = take(20, rows, restored(whole[19].state), source, encode)
    for a, b in zip(whole[20:], again):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
    assert whole[-1].state.position == again[-1].state.position


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_ranks(world):
    alone = take(2, Rows(12, 64))
    shares = [take(2, Rows(12 // world, 64, rank=rank, world=world)) for rank in range(world)]
    for step in range(2):
        together = torch.cat([share[step].inputs for share in shares])
        assert torch.equal(alone[step].inputs, together)


def test_accumulated_rows_are_those_of_one_large_batch():
    large, small = take(1, Rows(12, 64)), take(3, Rows(4, 64))
    assert torch.equal(large[0].inputs, torch.cat([batch.inputs for batch in small]))


def test_every_row_begins_with_bos_and_targets_follow_inputs():
    for batch in take(5, Rows(4, 64)):
        assert (batch.inputs[:, 0] == TOKENIZER.bos).all()
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_an_epoch_reads_everything_once_in_another_order_than_the_next():
    stream = read(SOURCE, "train", Position())
    epochs = [[text for _ in range(SOURCE.units("train")) for text in next(stream)[0]] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(TEXTS)
    assert epochs[0] != epochs[1] != TEXTS
    assert next(stream)[1] == Position(2, 1)


def test_one_pass_sees_every_token_once_and_pads_the_last_batch():
    few = ListSource(TEXTS[:50])
    encode = document_encoder(TOKENIZER)
    seen = list(one_pass(few, "val", encode, Rows(4, 64), 1000, TOKENIZER.bos))
    assert all(batch.inputs.shape == (4, 64) for batch in seen)
    total = sum(len(document) for document in encode(TEXTS[:50]))
    counted = sum(int((batch.targets != -1).sum()) for batch in seen)
    assert total * 0.9 < counted < total  # first tokens of rows are no targets; a few are cropped
    limited = list(one_pass(few, "val", encode, Rows(4, 64), 8, TOKENIZER.bos))
    assert len(limited) == 2


def test_first_items():
    assert first_items(SOURCE, "train", 100) == TEXTS[:100]
    assert first_items(SOURCE, "train", 10**6) == TEXTS


def test_prefetch_hands_on_items_and_errors_and_ends_its_thread():
    def failing():
        yield 1
        raise ValueError("row 7 is bad")

    items = Prefetch(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(items)
    endless = Prefetch(iter(itertools.count()))
    next(endless)
    endless.close()
    assert not any(thread.name == "data" and thread.is_alive() for thread in threading.enumerate())


def test_prefetch_ends_where_its_iterator_does():
    assert list(Prefetch(iter([1, 2, 3]))) == [1, 2, 3]
    assert list(Prefetch(iter([]))) == []


@pytest.mark.parametrize(
    "device, pinned, ahead",
    [("cpu", False, False), ("mps", False, False), ("cuda", False, False), ("cuda", True, True)],
)
def test_only_pinned_memory_is_copied_without_waiting_and_to_cuda_only(monkeypatch, device, pinned, ahead):
    """Pageable memory may be freed, and used again, before such a copy has read it."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: pinned)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, to, non_blocking=False: asked.append((to.type, non_blocking))
    )
    Batch(torch.zeros(1, 2), torch.ones(1, 2), LoaderState(Position(), [])).to(torch.device(device))
    assert asked == [(device, ahead)] * 2


def test_batches_move_to_the_device():
    batch = Batch(torch.zeros(1, 2), torch.ones(1, 2), LoaderState(Position(), []))
    inputs, targets = batch.to(torch.device("cpu"))
    assert inputs.shape == targets.shape == (1, 2)


class BlankSource(ListSource):
    def __init__(self, units):
        super().__init__([])
        self._count = units

    def units(self, split):
        return self._count

    def load(self, split, unit):
        return []


@pytest.mark.parametrize("units", [0, 3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_source_without_text_is_an_error_and_no_endless_loop(split, units):
    with pytest.raises(UserError, match="nothing in its (train|val) split"):
        next(read(BlankSource(units), split, Position())) and list(read(BlankSource(units), split, Position()))
    assert not list(one_pass(BlankSource(units), "val", document_encoder(TOKENIZER), Rows(2, 16), 8))
    with pytest.raises(UserError, match="nothing in its train split"):
        next(Prefetch(batches(BlankSource(units), "train", document_encoder(TOKENIZER), Rows(2, 16))))


@pytest.mark.parametrize("iterate", [batches, lambda *given: one_pass(*given, max_rows=8)])
def test_a_thread_that_finds_nothing_ends_when_it_is_told(iterate):
    data = Prefetch(iterate(BlankSource(10**6), "train", document_encoder(TOKENIZER), Rows(2, 16)))
    thread = data._thread
    data.close()
    assert not thread.is_alive()
