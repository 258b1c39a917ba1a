"""Choosing the next token of every row at once, where the logits are: only the chosen ids come back to the host. Every
request has its own generator, on the CPU, and the same operations act on its row whoever else is in the batch: its text
does not depend on company.

Only what is needed is computed. The likeliest token, and the best k, are those of the raw logits, because the softcap
(softcap·tanh(z/softcap)) keeps the order; it is applied to the k. All of the vocabulary is drawn from in its own order,
by a cumulative sum; it is sorted only for top_p, and then without ids: what counts is the least probability that stays.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


def moved(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list as a tensor on a device. On CUDA the host does not wait for it: it comes from pinned memory."""
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=cuda).to(device, non_blocking=cuda)


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    temperature: 0 takes the likeliest token. top_k: so many candidates (None: all); top_p: the fewest candidates whose
    probabilities reach it, and those as likely as the last of them; min_p: no candidate less likely than that part of
    the likeliest. repetition_penalty divides (or multiplies, where negative) the logits of tokens that are there
    already (CTRL, arXiv:1909.05858). seed fixes the draw. logprobs: None, or with how many alternatives each token's
    log-probability is reported, before all of these.
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


class Kind(NamedTuple):
    """Rows of one kind go through the same operations."""

    penalised: bool
    k: int | None  # candidates: 1 for the likeliest, None for all
    nucleus: bool  # whether there is a top_p


COLD = 1e-6  # temperatures below take the likeliest token: divided by them, float32 no longer tells logits apart


def kind(asked: Sampling, vocab: int) -> Kind:
    if asked.temperature < COLD or asked.top_k == 1:
        k: int | None = 1
    else:
        k = None if asked.top_k is None or asked.top_k >= vocab else asked.top_k
    return Kind(asked.repetition_penalty != 1, k, k != 1 and asked.top_p < 1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sample(logits: Tensor, softcap: float | None, owners: Sequence[Drawing]) -> list[int]:
    """One token id for every row of raw logits (B, V), before the softcap (None: there is none). On a GPU the host
    waits once, for the ids.
    """
    groups: dict[Kind, list[int]] = defaultdict(list)
    for i, owner in enumerate(owners):
        groups[kind(owner.sampling, logits.size(1))].append(i)
    chosen, order = [], []
    for which, rows in groups.items():
        part = logits if len(rows) == len(owners) else logits[moved(rows, torch.int64, logits.device)]
        chosen.append(_draw(part, softcap, which, [owners[i] for i in rows]))
        order += rows
    tokens = [0] * len(owners)
    for i, token in zip(order, (chosen[0] if len(chosen) == 1 else torch.cat(chosen)).tolist()):
        tokens[i] = token
    return tokens


def penalised(logits: Tensor, owners: Sequence[Drawing]) -> Tensor:
    """(n, V) with the logits of each row's tokens so far made less likely."""
    seen = [(i, token) for i, owner in enumerate(owners) for token in {*owner.prompt, *owner.output}]
    rows, ids = moved(list(zip(*seen)), torch.int64, logits.device)
    strengths = [owner.sampling.repetition_penalty for owner in owners]
    penalty, found = moved(strengths, torch.float32, logits.device)[rows], logits[rows, ids]
    return logits.index_put((rows, ids), torch.where(found > 0, found / penalty, found * penalty))


def _draw(logits: Tensor, softcap: float | None, which: Kind, owners: Sequence[Drawing]) -> Tensor:
    """Ids (n,) for rows of one kind, (n, V)."""
    if which.penalised:
        logits, softcap = penalised(capped(logits, softcap), owners), None
    if which.k == 1:
        return best(logits, 1)[1][:, 0]
    values, ids = (logits, None) if which.k is None else best(logits, which.k)  # (n, k), best first
    settings = [owner.sampling for owner in owners]
    draws = [torch.rand((), generator=owner.generator).item() for owner in owners]  # in [0, 1)
    columns = [(1 / of.temperature, of.min_p, of.top_p, draw) for of, draw in zip(settings, draws)]
    colder, min_p, top_p, draw = moved(list(zip(*columns)), torch.float32, logits.device)[..., None]  # (n, 1) each
    p = probabilities(values, softcap, colder)
    if any(of.min_p > 0 for of in settings):
        p = torch.where(p >= min_p * p.amax(-1, True), p, 0.0)
    if which.nucleus:
        p = torch.where(p >= least(p, top_p), p, 0.0)
    # A GPU adds up in parallel; in float32 the sums would not quite rise, and what is no candidate could be hit.
    reached = p.cumsum(-1, dtype=torch.float64 if p.is_cuda else torch.float32)
    at = torch.searchsorted(reached, draw * reached[:, -1:], right=True).clamp_max(p.size(1) - 1)  # NaN: the last
    return (at if ids is None else ids.gather(1, at))[:, 0]


def probabilities(logits: Tensor, softcap: float | None, colder: Tensor) -> Tensor:
    """softmax(capped·colder) of raw logits (n, k), as float32; colder (n, 1) is one over the temperature.

    As tanh(x) = 2·sigmoid(2x) − 1, of which softmax does not see the constant, the softcap costs a sigmoid: on a CPU a
    sixth of a tanh.
    """
    z = logits.to(torch.float32, copy=True)
    if softcap is not None:
        z.mul_(2 / softcap).sigmoid_().mul_(2 * softcap)
    return torch.softmax(z.mul_(colder), -1)


def least(p: Tensor, top_p: Tensor) -> Tensor:
    """(n, 1): the least of the weights p (n, k) that belongs to the fewest whose sum is top_p (n, 1) of all."""
    total = p.sum(-1, True)
    if p.device.type == "cpu":
        # Values without ids sort several times as fast, and equal ones faster still: even all that are below this
        # bound do not make up what top_p leaves out.
        ranked = torch.from_numpy(np.sort(p.clamp_min((1 - top_p) * total * (0.99 / p.size(1))).numpy(), axis=-1))
    else:
        ranked = p.sort(-1).values
    reached = ranked.cumsum(-1)  # the least first: what is not needed is small, and so is its sum's rounding
    at = torch.searchsorted(reached, reached[:, -1:] - top_p * total, right=True).clamp_max(p.size(1) - 1)
    return ranked.gather(1, at)


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
    ids = (chosen[:, None] + torch.arange(0, V, apart, device=logits.device)[:, None]).flatten(1)  # (n, GROUP·k)
    values, at = logits.gather(1, ids).topk(k, -1)
    return values, ids.gather(1, at)


def log_probabilities(
    logits: Tensor, softcap: float | None, tokens: Sequence[int], alternatives: Sequence[int]
) -> list[LogProbs]:
    """Of raw logits (n, V): each row's token, and so many of its likeliest."""
    logp = torch.log_softmax(capped(logits, softcap), -1)
    top, ids = logp.topk(min(max(alternatives), logp.size(1)))
    chosen = logp.gather(1, moved(tokens, torch.int64, logits.device)[:, None])
    rows = zip(alternatives, torch.cat((chosen, top), 1).tolist(), ids.tolist())
    return [LogProbs(first, list(zip(ids[:n], rest))) for n, (first, *rest), ids in rows]
