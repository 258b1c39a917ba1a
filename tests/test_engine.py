import pytest
import tiny
import torch

from nanochat import chat
from nanochat.engine import Engine, Request, Sampling
from nanochat.engine.cache import Slots
from nanochat.engine.sampling import sample

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
    pieces = []
    with torch.inference_mode():
        for start, end in [(0, 140), (140, 150), *((i, i + 1) for i in range(150, 300))]:
            view = slots.view(0, 2, end - start)
            pieces.append(model.logits(model.hidden(ids[:, start:end], view)))
            view.advance()
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4


def test_parity_cache_past_128_tokens_teacher_forced(shared):
    from test_gpt import parity_model  # noqa: PLC0415

    model, tensors = parity_model(shared)
    ids = tensors["inputs"][0].long()
    slots = Slots(model.config, ids.size(0), torch.device("cpu"), torch.float32)
    pieces = []
    with torch.inference_mode():
        for start, end in [(0, 7), *((i, i + 1) for i in range(7, ids.size(1)))]:
            view = slots.view(0, ids.size(0), end - start)
            pieces.append(model.logits(model.hidden(ids[:, start:end], view)))
            view.advance()
    found, wanted = torch.cat(pieces, 1), tensors["logits"]
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


def test_sampling_draws_from_the_top_k_as_often_as_it_should():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, Sampling(1.0, 3), generator) for _ in range(4000)]
    assert set(drawn) == {4, 0, 1}
    wanted = torch.softmax(logits[[4, 0, 1]], 0)
    found = torch.tensor([drawn.count(i) / 4000 for i in (4, 0, 1)])
    assert (found - wanted).abs().max() < 0.02


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
