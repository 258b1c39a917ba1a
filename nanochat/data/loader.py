"""Batches for training: read → tokenize → pack, in a thread of its own, so that the step never waits for data.

Every rank walks the same stream of rows and keeps its own share, so the global batch of a step does not depend on the
number of ranks. Each batch carries the state of the loader just after it: saved with a checkpoint, it continues the
stream exactly, with the documents that were waiting to be packed.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat import typed
from nanochat.data import ahead
from nanochat.data.packing import Document, Packer, row_arrays
from nanochat.data.source import Position, Source, read
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

BUFFER = 1000  # documents to choose from when packing
MANY = 0.01  # of the documents
Encode = Callable[[list[Any]], list[Document]]


@dataclass(frozen=True)
class LoaderState:
    """Where the stream stands: the next unread item, and the documents read but not yet packed."""

    position: Position
    waiting: list[Document]
    seen: int = 0  # documents so far
    left_out: int = 0  # of these, because they have nothing to learn

    def complaint(self) -> str:
        """A sentence where many documents are left out, else ""."""
        if self.left_out <= MANY * self.seen:
            return ""
        return (
            f"{self.left_out:,} of the first {self.seen:,} conversations have nothing to learn (no answer, or none "
            "that begins within --max-seq-len) and are left out"
        )

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        lengths = torch.tensor([len(d) for d in self.waiting], dtype=torch.int64)
        empty = np.zeros(0, np.int32)
        tokens = torch.from_numpy(np.concatenate([empty, *(d.tokens for d in self.waiting)]))
        masks = [np.ones(len(d), bool) if d.trained is None else d.trained for d in self.waiting]
        trained = torch.from_numpy(np.concatenate([np.zeros(0, bool), *masks]))
        return dict(lengths=lengths, tokens=tokens, trained=trained)

    def metadata(self) -> dict[str, Any]:
        masked = any(d.trained is not None for d in self.waiting)
        return dict(position=asdict(self.position), masked=masked, seen=self.seen, left_out=self.left_out)

    @classmethod
    def restore(cls, metadata: dict[str, Any], tensors: dict[str, Tensor], vocabulary: int) -> "LoaderState":
        """The inverse of both. Raises KeyError, TypeError or ValueError for what they did not write."""
        numbers = typed.made(_Numbers, metadata)
        lengths, all_tokens, all_trained = (tensors[name].numpy() for name in ("lengths", "tokens", "trained"))
        ends = np.cumsum(lengths)
        if (len(all_tokens), len(all_trained)) != 2 * (int(ends[-1]) if len(ends) else 0,) or (lengths < 1).any():
            raise ValueError("the lengths of its waiting documents are others")
        if (
            all_tokens.dtype != np.int32
            or all_trained.dtype != bool
            or ((all_tokens < 0) | (all_tokens >= vocabulary)).any()
        ):
            raise ValueError(f"its waiting documents are no tokens of a vocabulary of {vocabulary}")
        tokens, trained = (np.split(all, ends[:-1]) if len(ends) else [] for all in (all_tokens, all_trained))
        waiting = [Document(t, m if numbers.masked else None) for t, m in zip(tokens, trained)]
        return cls(typed.made(Position, numbers.position), waiting, numbers.seen, numbers.left_out)


@dataclass(frozen=True)
class _Numbers:
    """What `LoaderState.metadata` gives."""

    position: dict[str, Any]
    masked: bool
    seen: int
    left_out: int


@dataclass(frozen=True)
class Batch:
    """inputs and targets (B, T) int64, targets −1 where nothing is to be learnt; the loader's state after it."""

    inputs: Tensor
    targets: Tensor
    state: LoaderState

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(inputs, targets) on the device; the batch may be dropped at once.

        Only pinned memory is copied to CUDA without waiting. There torch's caching host allocator notes the stream with
        the block (record_event, called by the copy) and gives a freed block to nobody before the copy is done. Nothing
        keeps pageable memory alive, and MPS would go on reading it after it was freed.
        """
        ahead = device.type == "cuda" and self.inputs.is_pinned()
        return self.inputs.to(device, non_blocking=ahead), self.targets.to(device, non_blocking=ahead)


@dataclass(frozen=True)
class Rows:
    """Shape and share of the batches: B rows of T tokens, for `rank` of `world`; `pad` for SFT."""

    B: int
    T: int
    pad: bool = False
    rank: int = 0
    world: int = 1
    pin: bool = False


def document_encoder(tokenizer: Tokenizer) -> Encode:
    """Texts to documents with <|bos|> before."""

    def encode(texts: list[str]) -> list[Document]:
        return [Document(np.array(ids, dtype=np.int32)) for ids in tokenizer.encode_documents(texts)]

    return encode


def conversation_encoder(tokenizer: Tokenizer, masked: bool) -> Encode:
    """Conversations to documents; masked: only the assistant's tokens are learnt (SFT), else all (mid-training).

    A source of mid-training may have plain texts among its conversations.
    """

    def encode(items: list[dict | str]) -> list[Document]:
        texts = iter(tokenizer.encode_documents([item for item in items if isinstance(item, str)]))
        rendered = [(next(texts), None) if isinstance(item, str) else tokenizer.render(item) for item in items]
        return [
            Document(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool) if masked else None)
            for ids, mask in rendered
        ]

    return encode


def batches(
    source: Source, split: str, encode: Encode, rows: Rows, state: LoaderState | None = None, bos: int = 0
) -> Iterator[Batch]:
    """Endless batches for training, from `state` on. Raises UserError when no document has anything to learn.

    In the thread of a Prefetch that is closed it ends at the next unit.
    """
    children = ahead.children(rows.world) if rows.pin else 0  # a CPU that trains has no core to spare
    packer, items, position = _restore(source, split, rows, state, children)
    capacity, begun = rows.T + 1, position.epoch
    while True:
        own = []
        for i in range(rows.B * rows.world):
            while len(packer) < BUFFER:
                if _told_to_end():
                    return
                texts, position = next(items)
                for document in encode(texts):
                    packer.add(document)
                if position.epoch > begun and packer.seen == packer.left_out > 0:
                    raise UserError(
                        f"{source.name}: no conversation has anything to learn: an answer of the assistant that begins "
                        f"within {rows.T} tokens"
                    )
            row = packer.pack()
            if i // rows.B == rows.rank:
                own.append(row_arrays(row, capacity, bos))
        yield _batch(own, rows, LoaderState(position, packer.waiting(), packer.seen, packer.left_out))


def one_pass(source: Source, split: str, encode: Encode, rows: Rows, max_rows: int, bos: int = 0) -> Iterator[Batch]:
    """Batches of at most max_rows rows over all ranks, each item once; missing rows of the last are all ignored."""
    packer, items, position = _restore(source, split, rows, None)
    empty = row_arrays([], rows.T + 1, bos)
    done = 0
    while done < max_rows:
        own, filled = [], 0
        for i in range(rows.B * rows.world):
            while len(packer) < BUFFER and position.unit < source.units(split):
                if _told_to_end():
                    return
                texts, position = next(items)
                for document in encode(texts):
                    packer.add(document)
            row = packer.pack() if done + i < max_rows else []
            filled += bool(row)
            if i // rows.B == rows.rank:
                own.append(row_arrays(row, rows.T + 1, bos) if row else empty)
        if not filled:
            return
        done += rows.B * rows.world
        yield _batch(own, rows, LoaderState(position, []))


def _restore(source: Source, split: str, rows: Rows, state: LoaderState | None, children: int = 0):
    state = state or LoaderState(Position(), [])
    packer = Packer(rows.T + 1, rows.pad)
    for document in state.waiting:
        packer.add(document)
    packer.seen, packer.left_out = state.seen, state.left_out
    return packer, read(source, split, state.position, children), state.position


def _batch(own: list[tuple[np.ndarray, np.ndarray]], rows: Rows, state: LoaderState) -> Batch:
    inputs, targets = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*own))
    if rows.pin:
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return Batch(inputs, targets, state)


class _Reader(threading.Thread):
    """The thread of a Prefetch; what it runs may look whether it was told to end."""

    def __init__(self, work: Callable[[Iterator[Batch]], None], items: Iterator[Batch]):
        super().__init__(target=work, args=(items,), daemon=True, name="data")
        self.told_to_end = threading.Event()


def _told_to_end() -> bool:
    thread = threading.current_thread()
    return isinstance(thread, _Reader) and thread.told_to_end.is_set()


class Prefetch:
    """Runs an iterator in a thread, a few items ahead. Its end, or an error in it, comes here after its last item."""

    def __init__(self, items: Iterator[Batch], ahead: int = 4, device: torch.device | None = None):
        """device: for which batches are pinned; a thread begins on card 0, where pinning would make a context."""
        self._device = device
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._thread = _Reader(self._work, items)
        self._stop = self._thread.told_to_end
        self._thread.start()

    def _work(self, items: Iterator[Batch]) -> None:
        try:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            for item in items:
                self._put(item)
                if self._stop.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:  # noqa: BLE001 (handed to the consumer)
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
