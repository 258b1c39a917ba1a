import pytest
import tiny
import torch

from nanochat import chat
from nanochat.engine import Engine, Request, Sampling
from nanochat.engine.cache import Slots
from nanochat.engine.decode import Decoder
from nanochat.engine.graphs import Graphs
from nanochat.engine.sampling import best, sample

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3], [3, 3], [11, 12, 13, 14]]


def run_all(engine, requests):
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    return [request.output for request in requests]


def test_greedy_with_the_cache_is_greedy_without():
    model = tiny.model()
    plain = [list(model.generate(prompt, 40, temperature=0)) for prompt in PROMPTS]
    engine = Engine(tiny.model(), slots=2)
    assert [list(engine.stream(Request(prompt, 40, GREEDY))) for prompt in PROMPTS] == plain


def test_cached_logits_teacher_forced_past_the_window():
    """Window 128: the cache is read far beyond it, by prefill and by single tokens."""
    model = tiny.model(sequence_len=300)
    assert model.config.window(0) == 128
    ids = torch.randint(300, (2, 300), generator=torch.Generator().manual_seed(1))
    whole = model(ids).detach()
    slots = Slots(model.config, 2, torch.device("cpu"), torch.float32)
    chunks = []
    with torch.inference_mode():
        for start, end in [(0, 140), (140, 150), *((i, i + 1) for i in range(150, 300))]:
            view = slots.view(0, 2, end - start)
            chunks.append(model.logits(model.hidden(ids[:, start:end], view)))
            view.advance()
    assert (torch.cat(chunks, 1) - whole).abs().max() < 1e-4


def test_parity_cache_past_128_tokens_teacher_forced(shared):
    from test_gpt import parity_model  # noqa: PLC0415

    model, tensors = parity_model(shared)
    ids = tensors["inputs"][0].long()
    slots = Slots(model.config, ids.size(0), torch.device("cpu"), torch.float32)
    chunks = []
    with torch.inference_mode():
        for start, end in [(0, 7), *((i, i + 1) for i in range(7, ids.size(1)))]:
            view = slots.view(0, ids.size(0), end - start)
            chunks.append(model.logits(model.hidden(ids[:, start:end], view)))
            view.advance()
    found, wanted = torch.cat(chunks, 1), tensors["logits"]
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_a_request_says_the_same_alone_and_in_company():
    def requests():
        return [Request(p, 10 + 5 * i, Sampling(0.9, 20, seed=i)) for i, p in enumerate(PROMPTS)]

    alone = [run_all(Engine(tiny.model(), slots=1), [request])[0] for request in requests()]
    together = run_all(Engine(tiny.model(), slots=3), requests())
    assert alone == together


def test_company_would_show_if_rows_shared_a_generator():
    requests = [Request(p, 30, Sampling(0.9, 20, seed=i)) for i, p in enumerate(PROMPTS)]
    alone = run_all(Engine(tiny.model(), slots=1), [Request(PROMPTS[1], 30, Sampling(0.9, 20, seed=1))])[0]
    for request in requests:
        request.generator = requests[0].generator
    assert run_all(Engine(tiny.model(), slots=5), requests)[1] != alone


def test_stop_forced_cancel_and_context_end():
    engine = Engine(tiny.model(), slots=2)
    free = run_all(engine, [Request([1, 2], 20, GREEDY)])[0]
    stopped = Request([1, 2], 20, GREEDY, stop=frozenset([free[5]]))
    assert run_all(engine, [stopped])[0] == free[: free.index(free[5])]
    forced = Request([1, 2], 5, GREEDY)
    forced.force([70, 71])
    assert run_all(engine, [forced])[0][:2] == [70, 71]
    long = Request([1] * 60, 100, GREEDY)
    assert len(run_all(engine, [long])[0]) == 4  # the context holds 64
    waiting = [engine.submit(Request([1], 50, GREEDY)) for _ in range(3)]
    engine.step()
    engine.cancel(waiting[0])
    engine.step()
    assert engine.running == [waiting[1], waiting[2]]
    for request in waiting:
        engine.cancel(request)
    engine.step()
    assert engine.idle


def test_closing_a_stream_frees_its_slot():
    engine = Engine(tiny.model(), slots=1)
    stream = engine.stream(Request([1], 50, GREEDY))
    next(stream)
    stream.close()
    assert engine.idle


@pytest.mark.parametrize("prompt", [[], [1] * 64])
def test_a_prompt_must_leave_room(prompt):
    with pytest.raises(ValueError, match="wanted 1 to 63"):
        Engine(tiny.model()).submit(Request(prompt, 5, GREEDY))


# ---- sampling


def draws(logits, count, softcap=None, **settings):
    """Tokens drawn one after the other from the same logits."""
    request = Request([1], 1, Sampling(**settings))
    return [sample(torch.tensor([logits]), softcap, [request])[0] for _ in range(count)]


def test_sampling_draws_from_the_top_k_as_often_as_it_should():
    logits = [2.0, 1.0, 0.0, -1.0, 5.0]
    drawn = draws(logits, 4000, temperature=1.0, top_k=3)
    assert set(drawn) == {4, 0, 1}
    wanted = torch.softmax(torch.tensor([5.0, 2.0, 1.0]), 0)
    found = torch.tensor([drawn.count(i) / 4000 for i in (4, 0, 1)])
    assert (found - wanted).abs().max() < 0.02


@pytest.mark.parametrize("top_k", [None, 5, 4])
def test_temperature_and_softcap(top_k):
    logits = [8.0, 4.0, -4.0, 0.0, -30.0]
    drawn = draws(logits, 4000, softcap=5.0, temperature=2.0, top_k=top_k)
    wanted = torch.softmax(5 * torch.tanh(torch.tensor(logits) / 5) / 2, 0)
    found = torch.tensor([drawn.count(i) / 4000 for i in range(5)])
    assert (found - wanted).abs().max() < 0.03


@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_best_by_groups_are_the_best(k):
    logits = torch.randn(7, 64 * 300, generator=torch.Generator().manual_seed(k))
    found, wanted = best(logits, k), logits.topk(k, -1)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    coarse = (logits * 4).round()  # with many ties
    values, ids = best(coarse, k)
    assert torch.equal(values, coarse.topk(k, -1)[0]) and torch.equal(coarse.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_top_p_and_min_p():
    p = [0.5, 0.3, 0.15, 0.05]
    logits = torch.tensor(p).log().tolist()
    for settings, kept in (
        (dict(top_p=0.79), {0, 1}),
        (dict(top_p=0.81), {0, 1, 2}),
        (dict(top_p=0.0), {0}),
        (dict(min_p=0.4), {0, 1}),
        (dict(min_p=1.0), {0}),
        (dict(top_k=3, top_p=0.9), {0, 1, 2}),
    ):
        assert set(draws(logits, 400, **{"temperature": 1.0, "top_k": None, **settings})) == kept, settings


def test_a_repetition_penalty_acts_on_what_is_there():
    request = Request([0], 5, Sampling(temperature=0, repetition_penalty=2.0))
    request.output = [2]
    logits = torch.tensor([[3.0, 1.6, -1.0, -1.5]])  # 0 → 1.5, 2 → −2
    assert sample(logits, None, [request]) == [1]
    assert sample(logits, None, [Request([0], 5, GREEDY)]) == [0]


def test_rows_of_all_kinds_in_one_batch_say_what_they_say_alone():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 300, generator=generator).bfloat16() * 4  # with ties
    settings = [
        GREEDY, Sampling(1.0, None, 1), Sampling(0.7, 50, 2), Sampling(0.7, 50, 3), Sampling(1.0, 7, 4, top_p=0.5),
        Sampling(1.0, 50, 5, min_p=0.1), Sampling(1.0, 20, 6, repetition_penalty=1.3), Sampling(1.5, None, 7, 0.9),
    ]  # fmt: skip
    requests = lambda: [Request([i, 5, 9], 5, sampling) for i, sampling in enumerate(settings)]
    together = sample(logits.clone(), 15.0, requests())
    alone = [sample(logits[i : i + 1].clone(), 15.0, [request])[0] for i, request in enumerate(requests())]
    assert together == alone


def test_log_probabilities_are_the_models_own():
    model = tiny.model()
    request = Request([5, 6], 6, Sampling(0.8, 20, seed=1, logprobs=3))
    ids = run_all(Engine(tiny.model(), slots=2), [request])[0]
    exact = torch.log_softmax(model(torch.tensor([[5, 6, *ids]]))[0], -1).detach()
    assert len(request.logprobs) == len(ids) == 6
    for i, (token, reported) in enumerate(zip(ids, request.logprobs)):
        row = exact[1 + i]
        assert reported.chosen == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in reported.top] == row.topk(3).indices.tolist()
        assert [p for _, p in reported.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert request.ended == "length"


def test_each_request_gets_the_log_probabilities_it_asked_for():
    """Beside others that ask for none, for more, whose tokens are forced, and that stop."""

    def requests():
        return [
            Request([5, 6], 4, GREEDY), Request([7, 8, 9], 4, Sampling(0.8, 20, seed=1, logprobs=2)),
            Request([1], 4, Sampling(temperature=0, logprobs=4)), Request([2], 4, Sampling(1.0, None, 3, logprobs=0)),
        ]  # fmt: skip

    def run(requests, slots):
        requests[-2].force([70, 71])
        run_all(Engine(tiny.model(), slots), requests)
        return [(request.output, request.logprobs) for request in requests]

    together = run(requests(), 4)
    assert [len(said) for _, said in together] == [0, 4, 4, 4]
    assert [len(said[0].top) for _, said in together[1:]] == [2, 4, 0] and together[2][0][:2] == [70, 71]
    for (output, said), (alone_output, alone) in zip(together, run(requests(), 1)):
        assert output == alone_output
        for one, other in zip(said, alone):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


# ---- the decode step, and what the cache keeps


SHAPES = [
    dict(),
    dict(sequence_len=300, n_layer=4, window_pattern="SSSL"),
    dict(n_kv_head=4, residual_mix=False, smear=False, value_embeds=False, backout=False, qk_scale=1.0),
]


@pytest.mark.parametrize("kind", ["lean", "graphs"])
@pytest.mark.parametrize("sizes", SHAPES)
def test_a_decode_step_is_the_model(sizes, kind):
    """Rows of different lengths, also past the window, against the model without a cache."""
    model = tiny.model(**sizes)
    context = model.config.sequence_len
    lengths = [context - 20, 3, context // 2]
    ids = torch.randint(300, (3, context), generator=torch.Generator().manual_seed(2))
    slots = Slots(model.config, 4, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            view = slots.view(row, row + 1, length)
            model.hidden(ids[row : row + 1, :length], view)
            view.advance()
        step = Decoder(model, slots) if kind == "lean" else Graphs(model, slots)
        for new in range(8):
            logits = step([ids[row, length + new].item() for row, length in enumerate(lengths)])
            logits = 15 * torch.tanh(logits / 15)
            for row, length in enumerate(lengths):
                exact = model(ids[row : row + 1, : length + new + 1])[0, -1]
                assert (logits[row] - exact).abs().max() < 1e-4
        alone = Decoder(model, slots)([5])  # one row takes another path: no mask
        exact = model(torch.tensor([[*ids[0, : lengths[0] + 8].tolist(), 5]]))[0, -1]
        assert (15 * torch.tanh(alone[0] / 15) - exact).abs().max() < 1e-4


@pytest.mark.parametrize("sizes", SHAPES)
def test_chunks_of_a_prompt_are_the_model(sizes):
    """Long ones and short ones, past the window, in a slot between two others: against the model without a cache."""
    model = tiny.model(**sizes)
    T = model.config.sequence_len - 1
    ids = torch.randint(300, (T,), generator=torch.Generator().manual_seed(3)).tolist()
    slots = Slots(model.config, 3, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        slots.k.fill_(9.0), slots.v.fill_(9.0)
        decoder, ends = Decoder(model, slots), [T // 2, T // 2 + 10, T // 2 + 11, T]
        hidden = torch.cat([decoder.read(1, ids[a:b]) for a, b in zip([0, *ends], ends)])
        assert (model.logits(hidden) - model(torch.tensor([ids]))[0]).abs().max() < 1e-4
    assert slots.lengths == [0, T, 0] and (slots.k[:, ::2] == 9).all() and (slots.v[:, ::2] == 9).all()
    assert torch.allclose(slots.previous[1], model.embedded(ids[-1]), atol=1e-5)


def test_chunks_in_bfloat16():
    exact, usual = tiny.model(), tiny.model()
    usual.set_dtype(torch.bfloat16)
    usual = usual.to(torch.bfloat16)
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    slots = Slots(usual.config, 1, torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        decoder = Decoder(usual, slots)
        mine = torch.cat([decoder.read(0, ids[:40]), decoder.read(0, ids[40:])]).float()
        wanted, plain = (model.hidden(torch.tensor([ids]))[0].float() for model in (exact, usual))
    assert (mine - wanted).norm() <= 1.2 * (plain - wanted).norm()


def test_the_decode_step_in_bfloat16():
    model = tiny.model()
    model.set_dtype(torch.bfloat16)
    exact, model = tiny.model(), model.to(torch.bfloat16)
    slots = Slots(model.config, 2, torch.device("cpu"), torch.bfloat16)
    step, ids = Decoder(model, slots), [[5, 9, 7, 30, 2, 80], [8, 3, 250, 1, 4, 4]]
    with torch.inference_mode():
        for i in range(6):
            logits = step([row[i] for row in ids])
        wanted = exact(torch.tensor(ids))[:, -1]
        usual = model(torch.tensor(ids))[:, -1]
    mine = 15 * torch.tanh(logits.float() / 15)
    assert (mine - wanted).norm() <= 1.5 * (usual - wanted).norm()


def test_a_chat_goes_on_from_what_the_cache_holds():
    engine = Engine(tiny.model(), slots=3)
    first = Request([5, 6, 7, 8, 9], 6, GREEDY)
    answer = run_all(engine, [first])[0]
    other = Request([50, 51, 52], 6, GREEDY)
    run_all(engine, [other])
    longer = [5, 6, 7, 8, 9, *answer, 20, 21]
    second = Request(longer, 6, GREEDY)
    found = run_all(engine, [second])[0]
    assert (first.cached, other.cached, second.cached) == (0, 0, 10)  # the last token was never an input
    assert found == run_all(Engine(tiny.model(), slots=1), [Request(longer, 6, GREEDY)])[0]


def test_a_common_beginning_is_done_once():
    """Requests that run together share a system prompt; the copy does not disturb its source."""
    prompts = [[9] * 20 + [i, i + 1] for i in range(5)]
    alone = [run_all(Engine(tiny.model(), slots=1), [Request(p, 12, GREEDY)])[0] for p in prompts]
    engine = Engine(tiny.model(), slots=3)
    requests = [Request(p, 12, GREEDY) for p in prompts]
    assert run_all(engine, requests) == alone
    assert [request.cached for request in requests] == [0, 20, 20, 20, 20]
    again = Request(prompts[4], 12, GREEDY)
    assert run_all(engine, [again])[0] == alone[4] and again.cached == 21


def test_what_was_used_last_is_kept_longest():
    engine = Engine(tiny.model(), slots=2)
    a, b, c = [1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]
    for prompt in (a, b, a, c):
        run_all(engine, [Request(prompt, 2, GREEDY)])
    kept = [Request(prompt, 2, GREEDY) for prompt in (a, b)]
    for request in kept:
        run_all(engine, [request])
    assert [request.cached for request in kept] == [3, 0]


def test_many_requests_come_and_go_and_the_cache_never_lies():
    """Prompts that share beginnings, cancelled at random: every answer is that of an engine of its own."""
    generator = torch.Generator().manual_seed(0)
    pick = lambda n: int(torch.randint(n, (1,), generator=generator))
    engine, requests = Engine(tiny.model(), slots=4), []
    stem = [3, 1, 4, 1, 5, 9, 2, 6]
    for i in range(60):
        prompt = stem[: 1 + pick(8)] + [pick(300) for _ in range(pick(6))]
        requests.append(engine.submit(Request(prompt, 1 + pick(8), Sampling(0.9, 20, seed=i))))
        for _ in range(pick(3)):
            engine.step()
        if pick(4) == 0:
            engine.cancel(requests[pick(len(requests))])
    while not engine.idle:
        engine.step()
    fresh = Engine(tiny.model(), slots=1)
    for i, request in enumerate(requests):
        fresh.slots.tokens[0] = []
        exact = run_all(fresh, [Request(request.prompt, request.max_tokens, Sampling(0.9, 20, seed=i))])[0]
        assert request.output == exact[: len(request.output)]
        assert request.ended == "" or request.output == exact
    assert sum(request.cached for request in requests) > 50


# ---- chat


def scripted(tokenizer, tokens):
    """A reply fed with given tokens; forced ones come when they are due, as in the engine."""
    request = Request([1], 100, GREEDY)
    reply, events = chat.Reply(tokenizer, request), []
    tokens = list(tokens)
    while tokens or request.forced:
        events += reply.feed(request.forced.popleft() if request.forced else tokens.pop(0))
    return events + reply.finish()


def test_a_tool_call_is_answered_and_the_answer_forced():
    tokenizer = tiny.tokenizer()
    special = tokenizer.special
    tokens = [
        *tokenizer.encode("so "),
        special["<|python_start|>"],
        *tokenizer.encode("12*(3+4)"),
        special["<|python_end|>"],
        *tokenizer.encode("84"),
    ]
    events = scripted(tokenizer, tokens)
    assert chat.visible_text(events) == "so 84"
    assert [e for e in events if e.kind != "text"] == [
        chat.Event("python", "12*(3+4)"),
        chat.Event("python_output", "84"),
    ]
    assert chat.content(events)[0] == dict(type="text", text="so ")
    assert chat.content([chat.Event("text", "a"), chat.Event("text", "b")]) == "ab"


def test_a_call_that_cannot_be_computed_gets_no_answer():
    tokenizer = tiny.tokenizer()
    special = tokenizer.special
    call = [special["<|python_start|>"], *tokenizer.encode("import os"), special["<|python_end|>"]]
    assert [e.kind for e in scripted(tokenizer, call)] == ["python"]


def test_text_is_whole_utf8_and_special_tokens_never_show():
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("né 春")
    assert len(ids) >= 7  # bytes: characters are split over tokens
    events = scripted(tokenizer, [*ids[:-1], tokenizer.special["<|output_end|>"], ids[-1]])
    assert chat.visible_text(events) == "né 春"
    assert all("\ufffd" not in event.text for event in events)
    assert chat.visible_text(scripted(tokenizer, ids[:-1])).endswith("\ufffd")


def test_old_turns_are_dropped_when_the_context_is_full():
    tokenizer = tiny.tokenizer()
    turns = [dict(role=("user", "assistant")[i % 2], content="the dog sees a cat") for i in range(21)]
    asked = chat.request(tokenizer, turns, 16, GREEDY, 64)
    assert len(asked.prompt) + 16 <= 64
    kept = [tokenizer.render_for_completion(turns[-n:]) for n in range(1, 21, 2)]
    assert asked.prompt == max((p for p in kept if len(p) + 16 <= 64), key=len)
    huge = chat.request(tokenizer, [dict(role="user", content="dog " * 500)], 16, GREEDY, 64)
    assert len(huge.prompt) < 64


def test_answers_of_several_conversations_at_once():
    tokenizer = tiny.tokenizer()
    talks = [[dict(role="user", content=text)] for text in ("the dog", "a cat", "the old house", "a")]
    engine = Engine(tiny.model(), slots=2)
    together = chat.answers(engine, tokenizer, talks, 12, GREEDY)
    alone = [list(chat.stream(engine, tokenizer, talk, 12, GREEDY)) for talk in talks]
    assert list(map(chat.visible_text, together)) == list(map(chat.visible_text, alone))


@pytest.mark.parametrize("threads, chunk", [(1, 16384), (2, 8192), (64, 512)])
def test_short_loops_of_the_compiled_step_are_one_threads(monkeypatch, threads, chunk):
    """Threads that meet for a microsecond's work are what another program slows most (benchmarks/neighbour.py)."""
    seen = []
    look = lambda *inputs: seen.append(torch._inductor.config.cpp.min_chunk_size)
    monkeypatch.setattr(torch, "compile", lambda step, options: look)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = tiny.model()
    Decoder(model, Slots(model.config, 2, torch.device("cpu"), torch.float32)).compile()
    assert seen == [chunk] * 2
    with torch._inductor.config.patch({"cpp.min_chunk_size": 20_000}):  # the user's
        Decoder(model, Slots(model.config, 1, torch.device("cpu"), torch.float32)).compile()
    assert seen[2:] == [20_000]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, slots", [*((sizes, 12) for sizes in SHAPES), (SHAPES[0], 2)])
def test_the_compiled_step_is_the_eager_one(sizes, slots):
    """One row, as many as it was compiled for, and other numbers; longer and longer; compiled once for each kind."""
    from torch._dynamo.utils import counters

    model = tiny.model(**sizes)
    engines = [Engine(model, slots=slots) for _ in range(2)]
    assert engines[0].decoding == "eager" and engines[0].compile() == "" and engines[0].decoding == "compiled"
    compiled = counters["stats"]["unique_graphs"]
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, model.config.sequence_len - 20, (slots,), generator=draw).tolist()
    with torch.inference_mode():
        for store in (engine.slots for engine in engines):
            values = torch.randn(store.k.shape, generator=draw.manual_seed(1))
            store.k.copy_(values), store.v.copy_(values.roll(1))
            store.lengths = list(lengths)
        for rows in (rows for rows in (1, 2, 8, 5, 12, 1) if rows <= slots):
            tokens = torch.randint(300, (rows,), generator=draw).tolist()
            found, wanted = (engine._decode(tokens) for engine in engines)
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert counters["stats"]["unique_graphs"] == compiled
