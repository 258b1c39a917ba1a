"""Learning byte-level BPE merges in plain Python: where rustbpe is not installed, on a machine without a network, say.

The same merges as rustbpe's: the most frequent pair of neighbours first, of equally frequent ones the one with the
smaller ids. Each distinct word is kept once with its count, and only words that contain the merged pair are looked at
again: seconds for the embedded world's text, many minutes for gigabytes.

Source: Sennrich et al., arXiv:1508.07909; the bookkeeping as in minbpe and rustbpe (Andrej Karpathy).
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

Pair = tuple[int, int]


def learn(texts: Iterable[str], vocab_size: int, pattern: str) -> list[bytes]:
    """Byte strings by id: the 256 bytes, then merges in order; fewer than vocab_size where the text has no more pairs.

    pattern: how texts are split into words, which no merge crosses.
    """
    counts: Counter[str] = Counter()
    split = regex.compile(pattern)
    for text in texts:
        counts.update(split.findall(text))
    words = [(list(word.encode()), count) for word, count in counts.items()]
    pairs: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, set[int]] = defaultdict(set)  # words that may contain a pair
    for i, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += count
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    tokens = [bytes([value]) for value in range(256)]
    while len(tokens) < vocab_size and heap:
        negative, pair = heapq.heappop(heap)
        if pairs[pair] != -negative:  # an older count: the newer one is in the heap too, where there is one
            continue
        if not pairs[pair]:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed: set[Pair] = set()
        for i in where.pop(pair):
            ids, count = words[i]
            merged = _merge(ids, pair, new)
            for old in zip(ids, ids[1:]):
                pairs[old] -= count
                changed.add(old)
            for fresh in zip(merged, merged[1:]):
                pairs[fresh] += count
                where[fresh].add(i)
                changed.add(fresh)
            words[i] = merged, count
        pairs[pair] = 0
        for one in changed - {pair}:
            heapq.heappush(heap, (-pairs[one], one))
    return tokens


def _merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    found, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            found.append(new)
            i += 2
        else:
            found.append(ids[i])
            i += 1
    return found
