"""The next token against a plain float64 implementation, for the same draws; and that a device is not waited for."""

import math

import numpy as np
import pytest
import torch

from nanochat.engine import Request, Sampling
from nanochat.engine.sampling import Kind, _draw, best, kind, least, log_probabilities, probabilities, sample

SOFTCAP = 15.0


def plain(logits, softcap, asked, seen, draw):
    """One row's token, as the definitions say."""
    z = logits.astype(np.float64)
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    for token in set(seen) if asked.repetition_penalty != 1 else ():
        z[token] = z[token] / asked.repetition_penalty if z[token] > 0 else z[token] * asked.repetition_penalty
    order = np.argsort(-z, kind="stable")
    if asked.temperature == 0:
        return int(order[0])
    k = asked.top_k if asked.top_k is not None and asked.top_k < len(z) else None
    order = order[:k]
    p = np.exp((z[order] - z[order[0]]) / asked.temperature)
    p[p < asked.min_p] = 0
    before = np.cumsum(p) - p
    fewest = max(1, int((before < asked.top_p * p.sum()).sum()))
    p[p < p[fewest - 1]] = 0
    if k is None:  # in the vocabulary's order
        back = np.argsort(order)
        order, p = order[back], p[back]
    reached = np.cumsum(p)
    return int(order[np.searchsorted(reached, draw * reached[-1], side="right")])


KINDS = {
    "top_k": dict(top_k=50),
    "all": dict(top_k=None),
    "all, as top_k": dict(top_k=100_000),
    "top_p": dict(top_k=None, top_p=0.9),
    "little top_p": dict(top_k=None, top_p=0.3, temperature=0.7),
    "top_k and top_p": dict(top_k=20, top_p=0.6),
    "min_p": dict(top_k=None, min_p=0.05),
    "min_p and top_p": dict(top_k=None, min_p=0.02, top_p=0.8),
    "penalty": dict(top_k=None, repetition_penalty=1.5),
    "penalty, top_k and top_p": dict(top_k=30, top_p=0.9, repetition_penalty=0.8),
    "likeliest": dict(temperature=0.0),
    "penalised likeliest": dict(temperature=0.0, repetition_penalty=1.7),
}


def requests(count, **settings):
    made = [Request([i, 5, 9], 5, Sampling(**{"temperature": 1.0, "seed": i, **settings})) for i in range(count)]
    for request in made:
        request.output = [request.prompt[0] + 40]
    return made


@pytest.mark.parametrize("softcap", [SOFTCAP, None])
@pytest.mark.parametrize("vocab", [300, 64 * 300])
@pytest.mark.parametrize("name", KINDS)
def test_the_token_is_the_one_by_definition(name, vocab, softcap):
    rows = 64
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    found = sample(logits, softcap, requests(rows, **KINDS[name]))
    draws = [torch.rand((), generator=request.generator).item() for request in requests(rows, **KINDS[name])]
    for i, request in enumerate(requests(rows, **KINDS[name])):
        seen = [*request.prompt, *request.output]
        assert found[i] == plain(logits[i].numpy(), softcap, request.sampling, seen, draws[i]), i


def test_equal_probabilities_stay_or_go_together():
    """bfloat16 logits have many equals: which of them top_p keeps must not depend on how a device sorts."""
    logits = (torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    p = probabilities(logits, SOFTCAP, torch.ones(3, 1))
    kept = p >= least(p, torch.tensor([[0.2], [0.5], [0.9]]))
    for row, inside in zip(p, kept):
        assert row[inside].min() > row[~inside].max()
    assert kept.sum(-1).tolist() == sorted(kept.sum(-1).tolist()) and 1 < kept[0].sum() < 2000
    drawn = sample(logits[2:].float(), SOFTCAP, requests(1, top_k=None, top_p=0.9))
    assert drawn == sample(logits[2:], SOFTCAP, requests(1, top_k=None, top_p=0.9))


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.5, 0.9, 0.999])
def test_the_bound_before_sorting_takes_nothing_away(top_p):
    """Peaked, flat, and with zeros that min_p left: as from the whole order."""
    draw = torch.Generator().manual_seed(3)
    for p in (
        torch.softmax(torch.randn(4, 5000, generator=draw) * 6, -1),
        torch.full((4, 5000), 1 / 5000),
        torch.softmax(torch.randn(4, 5000, generator=draw), -1) * (torch.rand(4, 5000, generator=draw) > 0.9),
    ):
        ranked = p.double().sort(-1, descending=True).values
        before = ranked.cumsum(-1) - ranked
        fewest = (before < top_p * p.double().sum(-1, True)).sum(-1, True).clamp_min(1)
        found = least(p, torch.full((4, 1), top_p))
        at = ranked.gather(1, fewest - 1)
        near = ranked.gather(1, (fewest - 2).clamp_min(0)), ranked.gather(1, fewest.clamp_max(4999))  # rounding
        assert ((found == at) | (found == near[0]) | (found == near[1])).all()


def test_draws_are_as_frequent_as_they_are_likely():
    """χ² over 40 tokens of 20,000 draws of one generator, from all of the vocabulary."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    [request] = requests(1, top_k=None, temperature=0.8)
    drawn = [sample(logits, SOFTCAP, [request])[0] for _ in range(20_000)]
    wanted = torch.softmax(SOFTCAP * torch.tanh(logits[0].double() / SOFTCAP) / 0.8, 0) * 20_000
    found = torch.bincount(torch.tensor(drawn), minlength=40)
    assert ((found - wanted) ** 2 / wanted).sum() < 72.1  # 39 degrees of freedom: exceeded once in a thousand times


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_p=1e-9, top_k=None), dict(top_p=0.0, top_k=40), dict(min_p=1.0, top_k=None), dict(min_p=1.0, top_k=9),
        dict(temperature=1e-40, top_k=None), dict(temperature=1e-40), dict(temperature=1e-8, top_p=0.5, top_k=None),
    ],
)  # fmt: skip
def test_what_leaves_one_candidate_takes_the_likeliest(settings):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2)) * 3
    assert sample(logits, SOFTCAP, requests(50, **settings)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_of_nonsense_costs_no_other_row(name, bad):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    spoiled = logits.clone()
    spoiled[1, ::7] = bad
    found, wanted = (sample(x, SOFTCAP, requests(3, **KINDS[name])) for x in (spoiled, logits))
    assert found[::2] == wanted[::2] and 0 <= found[1] < 300


@pytest.mark.parametrize("settings", [dict(top_k=None, min_p=0.5), dict(top_k=None, top_p=0.4), dict(top_k=5)])
def test_the_largest_draw_hits_a_candidate(settings, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, generator: torch.tensor(1 - 2**-24))
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(4))
    logits[:, 500:] -= 8  # what comes last is no candidate
    made = requests(200, **settings)
    found = sample(logits, None, made)
    for i, request in enumerate(made):
        assert found[i] == plain(logits[i].numpy(), None, request.sampling, [], 1 - 2**-24)


# ---- company, and the device


def test_rows_of_all_kinds_together_say_what_they_say_alone():
    logits = torch.randn(len(KINDS), 64 * 300, generator=torch.Generator().manual_seed(5)).bfloat16() * 4

    def owners():
        return [Request([i, 7], 9, Sampling(**{"temperature": 1.0, "seed": i, **KINDS[name]})) for i, name in
                enumerate(KINDS)]  # fmt: skip

    together = sample(logits, SOFTCAP, owners())
    assert together == [sample(logits[i : i + 1], SOFTCAP, [owner])[0] for i, owner in enumerate(owners())]
    assert together[::-1] == sample(logits.flip(0), SOFTCAP, owners()[::-1])


@pytest.mark.parametrize("name", KINDS)
def test_choosing_reads_nothing_back(name):
    """Meta tensors have no values: whoever asks for one, or copies it to the host, fails."""
    made = requests(3, **KINDS[name])
    which = kind(made[0].sampling, 64 * 300)
    chosen = _draw(torch.empty(3, 64 * 300, device="meta", dtype=torch.bfloat16), SOFTCAP, which, made)
    assert chosen.shape == (3,) and chosen.dtype == torch.int64 and chosen.is_meta


def test_a_step_fetches_its_ids_at_once(monkeypatch):
    fetched, inner = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(self.shape) or inner(self))
    logits = torch.randn(len(KINDS), 300, generator=torch.Generator().manual_seed(5))
    sample(logits, SOFTCAP, [requests(1, **settings)[0] for settings in KINDS.values()])
    assert fetched == [(len(KINDS),)]


def test_nothing_is_sorted_without_top_p():
    for name, settings in KINDS.items():
        found = kind(Sampling(**settings), 300)
        assert found.nucleus == ("top_p" in name)
    assert kind(Sampling(temperature=0, top_p=0.5), 300) == Kind(False, 1, False)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_best_come_from_a_part_of_a_padded_vocabulary_too(k):
    wide = torch.randn(3, 64 * 320, generator=torch.Generator().manual_seed(k))
    part = wide[:, : 64 * 300]
    values, ids = best(part, k)
    assert torch.equal(values, part.topk(k, -1).values) and torch.equal(part.gather(1, ids), values)


def test_log_probabilities_of_several_rows_are_those_of_each():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(6)) * 3
    tokens, alternatives = [3, 299, 0, 17], [0, 5, 2, 20]
    together = log_probabilities(logits, SOFTCAP, tokens, alternatives)
    exact = torch.log_softmax(SOFTCAP * torch.tanh(logits.double() / SOFTCAP), -1)
    for i, said in enumerate(together):
        assert said == log_probabilities(logits[i : i + 1], SOFTCAP, tokens[i : i + 1], alternatives[i : i + 1])[0]
        assert said.chosen == pytest.approx(exact[i, tokens[i]].item(), abs=1e-5) and len(said.top) == alternatives[i]
        assert [token for token, _ in said.top] == exact[i].topk(alternatives[i]).indices.tolist()
        assert [p for _, p in said.top] == pytest.approx(exact[i].topk(alternatives[i]).values.tolist(), abs=1e-5)
