"""Prompts that come in in chunks, and what was said of their tokens."""

import json

import pytest
import tiny
import torch

from nanochat.engine import Engine, Request, Sampling
from nanochat.engine.scheduler import LEAST, LONGER

GREEDY = Sampling(temperature=0)
LONG = [(7 * i) % 290 for i in range(50)]


def run_all(engine, *requests):
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    return [request.output for request in requests]


def reading_along(budget, slots=4):
    """An engine in which a request is being written, and that request."""
    engine = Engine(tiny.model(), slots)
    engine.scheduler.budget = budget
    engine.scheduler.learn = lambda *seconds: None  # what a machine takes is another test's
    first = engine.submit(Request([5, 6, 7], 40, GREEDY))
    engine.step()
    return engine, first


def test_a_long_prompt_comes_in_between_the_tokens_of_others():
    engine, first = reading_along(budget=8)
    long, short = (engine.submit(Request(prompt, 5, GREEDY)) for prompt in (LONG, [9, 8]))
    read = []
    while not long.output:
        said = engine.step()
        assert first in [request for request, _ in said]  # at every step
        read.append(engine.read)
    assert read == [8, 8, 8, 8, 8, 8, 1, 1] and sum(read) == len(LONG) + len([9, 8]) - 2
    while not engine.idle:
        engine.step()
    alone = [run_all(Engine(tiny.model(), 1), Request(r.prompt, r.max_tokens, GREEDY))[0] for r in (first, long, short)]
    assert [first.output, long.output, short.output] == alone


def test_nobody_is_spared_who_does_not_read():
    engine = Engine(tiny.model(), 4)
    engine.scheduler.budget = 4
    for start in range(3):
        engine.submit(Request(LONG[start:], 3, GREEDY))
    assert len(engine.step()) == 3


def test_what_was_read_of_a_cancelled_prompt_serves_the_next():
    engine, first = reading_along(budget=8)
    gone = engine.submit(Request(LONG, 5, GREEDY))
    engine.step(), engine.step()
    engine.cancel(gone)
    engine.step()
    again = Request(LONG, 5, GREEDY)
    found = run_all(engine, again)[0]
    assert again.cached == 16 and not gone.output
    assert found == run_all(Engine(tiny.model(), 1), Request(LONG, 5, GREEDY))[0]


def test_prompts_that_were_cancelled_while_they_waited_are_not_read():
    engine = Engine(tiny.model(), 4)
    short, *gone = (engine.submit(Request(prompt, 3, GREEDY)) for prompt in ([5, 6, 7], LONG, LONG[1:]))
    last = engine.submit(Request([9, 8], 3, GREEDY))
    for request in gone:
        engine.cancel(request)
    engine.step()
    assert engine.read == 2 + 1 and engine.running == [short, last] and not engine.waiting


@pytest.mark.parametrize(
    "seconds, budget",
    [((LONGER, 1.0), 64), ((LONGER / 2, 1.0), 80), ((0.1, 1.0), 80), ((2 * LONGER, 1.0), 56), ((90.0, 1.0), 56)],
)
def test_the_budget_follows_the_machine(seconds, budget):
    """LONGER times as long as the rest of a step is right; one step, however odd, changes a quarter at most."""
    engine, _ = reading_along(budget=64)
    scheduler = engine.scheduler
    del scheduler.learn
    measured = lambda length: (engine.submit(Request([1] * length, 5, GREEDY)), scheduler.begin_step(),
                           scheduler.next_chunk(), scheduler.learn(*seconds))  # fmt: skip
    measured(20)  # less than the budget: only that it took too long counts
    assert scheduler.budget == min(budget, 64)
    scheduler.budget, scheduler.entering = 64, None
    scheduler.slots.lengths = [0] * 4
    long = Request([1] * 63, 5, GREEDY)
    long.output = [1] * 40  # longer than the tiny model's context: it is not run
    scheduler.submit(long)
    scheduler.begin_step(), scheduler.next_chunk(), scheduler.learn(*seconds)
    assert scheduler.budget == budget
    for _ in range(100):
        scheduler.begin_step(), scheduler.learn(9.0, 0.1)
    assert scheduler.budget == LEAST
    scheduler.begin_step(), scheduler.learn(0.0, 0.1)  # as a coarse clock has it
    assert scheduler.budget == LEAST


def test_a_long_prompts_first_step_is_not_that_of_its_last_chunk():
    engine, first = reading_along(budget=16)
    long = engine.submit(Request(LONG, 5, GREEDY))
    lengths = []
    while long not in engine.running:
        engine.step()
        lengths.append(engine.read)
    assert lengths == [16, 16, 16, 1, 0] and long.output
    alone = Engine(tiny.model(), 2)
    alone.scheduler.budget = 16
    run_all(alone, Request([5, 6], 1, GREEDY))
    assert alone.submit(Request(LONG, 5, GREEDY)) and len(alone.step()) == 1  # nobody waits


# ---- log-probabilities of prompts


def exact(ids):
    """Of each token but the first, by the model without a cache."""
    logp = torch.log_softmax(tiny.model()(torch.tensor([ids]))[0].detach(), -1)
    return [logp[i, token].item() for i, token in enumerate(ids[1:])], logp


def check(request):
    chosen, logp = exact([*request.prompt])
    assert request.echoed[0] is None and len(request.echoed) == len(request.prompt)
    for i, (one, wanted) in enumerate(zip(request.echoed[1:], chosen)):
        assert one.chosen == pytest.approx(wanted, abs=1e-4)
        top = logp[i].topk(request.sampling.logprobs)
        assert [token for token, _ in one.top] == top.indices.tolist()
        assert [p for _, p in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def asked(prompt, n=2, max_tokens=1):
    return Request(prompt, max_tokens, Sampling(temperature=0, logprobs=n), echo=True)


@pytest.mark.parametrize("budget", [3, 8, 100])
def test_what_is_said_of_a_prompt_is_the_models_own(budget, monkeypatch):
    monkeypatch.setattr("nanochat.engine.engine.HEAD_ROWS", 5)
    engine, _ = reading_along(budget)
    for max_tokens in (0, 1, 3):
        request = asked(LONG[max_tokens:], max_tokens=max_tokens)
        assert len(run_all(engine, request)[0]) == max_tokens and request.ended == "length"
        check(request)


def test_choices_pay_for_their_context_once_and_all_that_is_asked_is_there():
    engine = Engine(tiny.model(), slots=4)
    context = LONG[:20]
    choices = [asked([*context, i, i + 1, i + 2]) for i in (3, 40, 77)]
    run_all(engine, *choices)
    assert [request.cached for request in choices] == [0, 19, 19]
    more, fewer, none = asked([*context, 3, 4, 5], n=3), asked([*context, 3, 4, 5], n=1), Request(context, 2, GREEDY)
    run_all(engine, more), run_all(engine, fewer), run_all(engine, none)
    assert (more.cached, fewer.cached, none.cached) == (0, 22, 19)
    plain = Request([*context, 200, 201, 202], 2, GREEDY)  # keeps no log-probabilities of what it adds
    run_all(engine, plain)
    after = asked([*context, 200, 201, 202, 203])
    run_all(engine, after)
    assert plain.cached == 20 and after.cached < 22
    for request in (*choices, more, fewer, after):
        check(request)


def test_random_prompts_that_share_beginnings_are_told_the_truth():
    generator = torch.Generator().manual_seed(0)
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))
    engine, requests = Engine(tiny.model(), slots=3), []
    for _ in range(40):
        prompt = LONG[: 1 + pick(12)] + [pick(300) for _ in range(1 + pick(4))]
        request = asked(prompt, 1 + pick(3), pick(3)) if pick(3) else Request(prompt, 3, GREEDY)
        requests.append(engine.submit(request))
        if pick(3) == 0:
            engine.step()
        if pick(6) == 0:
            engine.cancel(requests[pick(len(requests))])
    while not engine.idle:
        engine.step()
    for request in requests:
        if request.echoed:
            check(request)
    assert sum(request.cached for request in requests if request.echo) > 30


def test_the_stop_token_is_told_where_a_prompt_is():
    free = run_all(Engine(tiny.model(), 1), Request([1, 2], 6, GREEDY))[0]
    request = Request([1, 2], 6, Sampling(temperature=0, logprobs=1), frozenset(free[:1]), echo=True)
    assert run_all(Engine(tiny.model(), 1), request) == [[]]
    assert request.ended == "stop" and request.stopped_by == free[0]
    assert [one.top[0][0] for one in request.logprobs] == free[:1]


def test_the_benchmark_of_gaps_measures_what_it_says(capsys):
    """Long prompts in chunks, of a tiny model: one line of JSON, with all that was done counted."""
    flags = ("--depth=1", "--width=128", "--vocab-size=300", "--streams=2", "--new-tokens=12", "--prompts=1")
    more = ("--prompt-tokens=40", "--rounds=1", "--device-type=cpu")
    assert tiny.call_module("benchmarks.prefill", *flags, *more) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert set(found["found"]) == {"quiet", "at_once", "chunks"} and found["chunks_p99_over_quiet_p50"] > 0
    assert all(row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] for row in found["found"].values())
