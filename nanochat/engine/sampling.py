"""Choosing the next token of every row at once. Every request has its own generator, and the same operations act on its
row whoever else is in the batch: its text does not depend on company.

Only what is needed is computed. The likeliest token, and the best k, are those of the raw logits, because the softcap
(softcap·tanh(z/softcap)) keeps the order; it is applied to the k. A whole row is normalised only for a request that
asks for log-probabilities, a repetition penalty, or all of the vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    temperature: 0 takes the likeliest token. top_k: so many candidates (None: all); top_p: the fewest candidates whose
    probabilities reach it; min_p: no candidate less likely than that part of the likeliest. repetition_penalty divides
    (or multiplies, where negative) the logits of tokens that are there already (CTRL, arXiv:1909.05858). seed fixes the
    draw. logprobs: None, or with how many alternatives each token's log-probability is reported, before all of these.
    """

    temperature: float = 0.6
    top_k: int | None = 50
    seed: int = 42
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None


class Drawing(Protocol):
    """What a row's owner must have."""

    prompt: list[int]
    output: list[int]
    sampling: Sampling
    generator: torch.Generator


@dataclass(frozen=True)
class LogProbs:
    """Natural logarithms: of the token taken, and of the likeliest ones with their ids, best first."""

    chosen: float
    top: list[tuple[int, float]]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sample(logits: Tensor, softcap: float | None, owners: Sequence[Drawing]) -> list[int]:
    """One token id for every row of raw logits (B, V) on the CPU, before the softcap (None: there is none)."""
    tokens = [0] * len(owners)
    groups: dict[int | None, list[int]] = defaultdict(list)  # rows by how many candidates they want
    for i, owner in enumerate(owners):
        asked = owner.sampling
        if asked.repetition_penalty != 1:
            row = penalised(capped(logits[i], softcap), owner)
            tokens[i] = _draw(row[None], None, candidates(asked, row.numel()), [owner])[0]
        else:
            groups[candidates(asked, logits.size(1))].append(i)
    for k, rows in groups.items():
        part = logits if len(rows) == len(owners) else logits[rows]
        for i, token in zip(rows, _draw(part, softcap, k, [owners[i] for i in rows])):
            tokens[i] = token
    return tokens


def candidates(asked: Sampling, vocab: int) -> int | None:
    """How many a draw is from: 1 for the likeliest, None for all."""
    if asked.temperature == 0 or asked.top_k == 1:
        return 1
    return None if asked.top_k is None or asked.top_k >= vocab else asked.top_k


def penalised(logits: Tensor, owner: Drawing) -> Tensor:
    logits, seen = logits.clone(), torch.tensor(sorted({*owner.prompt, *owner.output}))
    found, penalty = logits[seen], owner.sampling.repetition_penalty
    logits[seen] = torch.where(found > 0, found / penalty, found * penalty)
    return logits


def _draw(logits: Tensor, softcap: float | None, k: int | None, owners: Sequence[Drawing]) -> list[int]:
    if k == 1:
        return best(logits, 1)[1][:, 0].tolist()
    values, ids = logits.sort(-1, descending=True) if k is None else best(logits, k)  # (n, k), best first
    warmth = torch.tensor([owner.sampling.temperature or 1.0 for owner in owners])[:, None]
    p = torch.softmax(capped(values, softcap) / warmth, -1)
    if any(owner.sampling.min_p > 0 for owner in owners):
        p = p * (p >= torch.tensor([owner.sampling.min_p for owner in owners])[:, None] * p[:, :1])
    if any(owner.sampling.top_p < 1 for owner in owners):
        before = p.cumsum(-1) - p  # of all better candidates: the first always stays
        p = p * (before <= torch.tensor([owner.sampling.top_p for owner in owners])[:, None] * p.sum(-1, True))
    reached = p.cumsum(-1)
    draws = torch.stack([torch.rand(1, generator=owner.generator) for owner in owners])  # (n, 1), in [0, 1)
    at = torch.searchsorted(reached, draws * reached[:, -1:], right=True).clamp_max(p.size(1) - 1)
    return ids.gather(1, at)[:, 0].tolist()


GROUP = 64  # logits whose maximum is taken together


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As topk(k) of (n, V): the k groups with the largest maxima hold the k largest logits, and maxima are cheap.

    A group is every (V/GROUP)-th logit: maxima over rows of a table are vectorised, those along a row are not.
    """
    n, V = logits.shape
    if V % GROUP or V < 4 * k * GROUP:
        return logits.topk(k, -1)
    table, apart = logits.reshape(n, GROUP, V // GROUP), V // GROUP
    chosen = table.amax(1).topk(k, -1, sorted=False).indices  # (n, k)
    values, at = table.gather(2, chosen[:, None].expand(n, GROUP, k)).flatten(1).topk(k, -1)
    return values, at // k * apart + chosen.gather(1, at % k)


def log_probabilities(logits: Tensor, softcap: float | None, token: int, alternatives: int) -> LogProbs:
    """Of a raw row of logits (V,)."""
    logp = torch.log_softmax(capped(logits, softcap), -1)
    values, ids = logp.topk(min(alternatives, logp.numel()))
    return LogProbs(logp[token].item(), list(zip(ids.tolist(), values.tolist())))
