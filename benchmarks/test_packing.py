"""Packing a stream of documents, against a scan over all that wait: `python -m pytest benchmarks/test_packing.py`."""

import numpy as np
import pytest

from nanochat.data.loader import BUFFER
from nanochat.data.packing import Document, Packer

CAPACITY = 2049


def documents(count: int) -> list[Document]:
    """Lengths as of web text: log-normal, median 400 tokens, at most a row."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.0, count).astype(int).clip(8, CAPACITY)
    return [Document(np.zeros(length, dtype=np.int32)) for length in lengths]


def packed(supply: list[Document]) -> int:
    packer, source, tokens = Packer(CAPACITY, pad=False), iter(supply), 0
    for document in source:
        packer.add(document)
        if len(packer) >= BUFFER:
            tokens += sum(map(len, packer.pack()))
    return tokens


def scanned(supply: list[Document]) -> int:
    waiting: list[Document] = []
    tokens = 0
    for document in supply:
        waiting.append(document)
        if len(waiting) < BUFFER:
            continue
        left = CAPACITY
        while left > 0 and waiting:
            best, length = -1, 0
            for i, candidate in enumerate(waiting):
                if length < len(candidate) <= left:
                    best, length = i, len(candidate)
            if best < 0:
                best = min(range(len(waiting)), key=lambda i: len(waiting[i]))
            taken = min(left, len(waiting.pop(best)))
            tokens, left = tokens + taken, left - taken
    return tokens


@pytest.mark.parametrize("way", [packed, scanned])
def test_packing(benchmark, way):
    supply = documents(3000)
    tokens = benchmark.pedantic(way, (supply,), rounds=7, warmup_rounds=1)
    benchmark.extra_info["tokens"] = tokens
    benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median
