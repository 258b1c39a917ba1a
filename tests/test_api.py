"""What real clients send and rely on beyond the plain requests of test_web.py; clients themselves: test_clients.py."""

import gc
import json
import threading
from itertools import pairwise

import httpx
import openai
import pytest
import tiny
import torch
from pydantic import ValidationError
from test_web import HOSTS, client, parrot, real, say, serving  # noqa: F401 (parrot and real are fixtures)

from nanochat import chat
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.web import answers, asking, mock, reading
from nanochat.web.conversation import conversation
from nanochat.web.limits import Limits, called, checked_origin
from nanochat.web.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    OldRequest,
    TokenizeRequest,
)

TEXT = "the dog sees a cat"


def post(server, path, **body):
    return httpx.post(server[0] + path, json=body, timeout=20)


# ---- a stream put together by the client


class TwoSums(mock.Parrot):
    """Calls the calculator twice in every answer."""

    def _answer(self, request):
        special, encode = self.tokenizer.special, self.tokenizer.encode
        call = lambda words: [special["<|python_start|>"], *encode(words), special["<|python_end|>"]]
        return [*encode("First"), *call("2 + 3"), *encode(", then"), *call("4 * 5"), *encode(".")]


CALLS = [("python", "2 + 3"), ("python_output", "5"), ("python", "4 * 5"), ("python_output", "20")]


def test_clients_that_put_a_stream_together_keep_every_call():
    tokenizer = tiny.tokenizer()
    asked = dict(model="tiny", messages=[dict(role="user", content="?")], max_tokens=90)
    with serving(TwoSums(tokenizer, 2), tokenizer, 500) as server:
        completions = client(server).chat.completions
        with completions.stream(**asked) as stream:
            message = stream.get_final_completion().choices[0].message
        choices = [chunk.choices[0] for chunk in completions.create(**asked, stream=True)]
        whole = completions.create(**asked).choices[0].message
    wanted = [dict(index=i, type=kind, text=text) for i, (kind, text) in enumerate(CALLS)]
    assert message.model_extra["events"] == wanted and message.content == whole.content == "First, then."
    assert [(one["type"], one["text"]) for one in whole.model_extra["events"]] == CALLS
    listed = [one.delta.model_extra["events"] for one in choices if "events" in one.delta.model_extra]
    assert listed == [wanted]  # openai for Node keeps the last delta's list
    live = [one.model_extra.get("event") or one.delta.content for one in choices]
    parts = [part if isinstance(part, str) else (part["type"], part["text"]) for part in live if part]
    assert [part for part in parts if isinstance(part, tuple)] == CALLS
    assert "".join(parts[: parts.index(CALLS[0])]) == "First" and parts.index(CALLS[2]) > parts.index(CALLS[1]) + 1


# ---- plain completions


def test_prompts_come_in_lists_and_choices_are_numbered(real):  # noqa: F811
    ask = lambda prompt, **more: client(real).completions.create(
        model="tiny", prompt=prompt, max_tokens=4, seed=3, temperature=1, **more
    )
    ids = tiny.tokenizer().encode("a cat")
    alone = [ask(prompt, n=2) for prompt in (TEXT, "the old house")]
    together = ask([TEXT, "the old house"], n=2)
    assert [choice.text for choice in together.choices] == [c.text for one in alone for c in one.choices]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert ask([TEXT]).choices[0].text == ask(TEXT).choices[0].text
    assert ask([ids, ids]).choices[1].text == ask(ids).choices[0].text
    mixed = ask(["the dog", "a cat"], stream=True, echo=True)
    texts = {0: "", 1: ""}
    for chunk in mixed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0].startswith("the dog") and texts[1].startswith("a cat")


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_tells_the_log_probabilities_of_a_prompt(real, max_tokens):  # noqa: F811
    tokenizer = tiny.tokenizer()
    ids = [tokenizer.bos, *tokenizer.encode(TEXT)]
    for prompt, names in ((ids, ["<|bos|>", *map(tokenizer.decode, [[i] for i in ids[1:]])]), (TEXT, None)):
        names = names or [tokenizer.decode([i]) for i in ids[1:]]
        choice = post(real, "/v1/completions", prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=1,
                      temperature=0, ignore_eos=True).json()["choices"][0]  # fmt: skip
        said = choice["logprobs"]
        assert choice["text"].startswith(TEXT) and said["tokens"][: len(names)] == names
        assert {len(one) for one in said.values()} == {len(names) + max_tokens}
        assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
        exact = torch.log_softmax(tiny.model()(torch.tensor([ids]))[0].detach(), -1)
        wanted = [exact[i, token].item() for i, token in enumerate(ids[1:])][-len(names) + 1 :]
        assert said["token_logprobs"][1 : len(names)] == pytest.approx(wanted, abs=1e-4)
        for name, own, top in list(zip(said["tokens"], said["token_logprobs"], said["top_logprobs"]))[1:]:
            assert top[name] == own <= max(top.values()) and len(top) <= 2
        assert all(a < b for a, b in pairwise(said["text_offset"][-len(ids) + 1 - max_tokens :][: len(ids) - 1]))


def test_a_prompts_end_is_told_though_the_model_ends_there(real):  # noqa: F811
    """One token is always made, be it the end of the text: clients cut it off."""
    ask = lambda **more: post(real, "/v1/completions", prompt=[[5, 6, 7]], echo=True, logprobs=1, temperature=0, **more)
    first = ask(max_tokens=1).json()["choices"][0]["logprobs"]["tokens"]
    assert len(first) == 4
    stopped = post(real, "/v1/completions", prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=3, temperature=0,
                   stop=["a"]).json()["choices"][0]  # fmt: skip
    assert stopped["logprobs"]["token_logprobs"][0] is None


def test_offsets_count_characters_and_half_ones_have_their_own_names(parrot):  # noqa: F811
    text = "a🙂b春c"
    ids = tiny.tokenizer().encode(text)
    choice = post(parrot, "/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    said = choice["logprobs"]
    assert choice["text"] == text
    assert said["text_offset"] == [0, 1, 1, 1, 1, 2, 3, 3, 3, 4]
    assert said["tokens"][1] == "bytes:\\xf0" and len(set(said["tokens"][1:5])) == 4


def test_a_tokenizer_for_the_evaluation_harness(parrot):  # noqa: F811
    tokenizer = tiny.tokenizer()
    info = httpx.get(parrot[0] + "/tokenizer_info").json()
    assert info["bos_token"] == info["eos_token"] == "<|bos|>" and info["vocab_size"] == tokenizer.vocab_size
    ask = lambda **body: post(parrot, "/tokenize", **body).json()["tokens"]
    assert ask(prompt="<|bos|>", add_special_tokens=False) == [tokenizer.bos]
    assert ask(prompt=TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert ask(prompt=TEXT) == [tokenizer.bos, *tokenizer.encode(TEXT)]
    assert ask(prompt="a <|bos|>", add_special_tokens=False) == tokenizer.encode("a <|bos|>")
    assert post(parrot, "/detokenize", tokens=tokenizer.encode(TEXT)).json() == dict(prompt=TEXT)
    assert post(parrot, "/detokenize", tokens=[10**6]).status_code == 400


# ---- conversations


def turns(*messages):
    return conversation([Message.model_validate(message) for message in messages])


def user(text):
    return dict(role="user", content=text)


def assistant(content, **more):
    return dict(role="assistant", content=content, **more)


def system(text):
    return dict(role="system", content=text)


@pytest.mark.parametrize(
    "sent, meant",
    [
        ([user("a"), user("b")], [user("a\n\nb")]),
        ([assistant("Hello!"), user("a")], [user(""), assistant("Hello!"), user("a")]),
        ([system("s"), dict(role="developer", content="d"), user("a")], [system("s\n\nd"), user("a")]),
        ([user("a"), assistant("b"), system("s"), user("c")], [user("a"), assistant("b"), user("s\n\nc")]),
        ([user("a"), assistant("b"), system("s")], [user("a"), assistant("b"), user("s")]),
        ([system("s")], [user("s")]),
        (
            [user("a"), assistant(None, tool_calls=[dict(id="1")]), dict(role="tool", content="12"), user("b")],
            [user("a\n\n12\n\nb")],
        ),
        ([user("a"), dict(role="assistant"), user("b")], [user("a\n\nb")]),
        ([user("a"), assistant(None, refusal="No."), user("b")], [user("a"), assistant("No."), user("b")]),
        (
            [user("a"), assistant([dict(type="refusal", refusal="No.")]), user("b")],
            [user("a"), assistant("No."), user("b")],
        ),
        ([user("a"), assistant("b"), assistant("c"), user("d")], [user("a"), assistant("b\n\nc"), user("d")]),
        (
            [user("a"), assistant([dict(type="python", text="1")]), assistant("c"), assistant("d"), user("d")],
            [
                user("a"),
                assistant([dict(type=k, text=t) for k, t in (("python", "1"), ("text", "\n\n"), ("text", "c\n\nd"))]),
                user("d"),
            ],
        ),
    ],
)
def test_conversations_that_clients_make(sent, meant):
    assert turns(*sent) == meant
    tiny.tokenizer().render_for_completion(meant)


@pytest.mark.parametrize(
    "sent, words",
    [
        ([assistant("a")], "must be the user's"),
        ([user("a"), assistant("b")], "must be the user's"),
        ([dict(role="user")], "messages.0.content: wanted text"),
        ([user([dict(type="python", text="1")])], "messages.0.content: only the assistant"),
    ],
)
def test_what_cannot_be_meant_is_said(sent, words):
    with pytest.raises(ApiError, match=words):
        turns(*sent)


@pytest.mark.parametrize(
    "more",
    [
        dict(max_tokens=-1), dict(max_tokens=4096), dict(max_completion_tokens=512), dict(stop=""),
        dict(max_tokens=2**31 - 1, seed=-1),
        dict(extra_body=dict(top_k=-1)), dict(tools=[], functions=[]),
        dict(tools=[dict(type="function", function=dict(name="f"))], tool_choice="none"),
        dict(temperature=1e-300), dict(stop=[]),
    ],
)  # fmt: skip
def test_settings_as_clients_of_other_servers_mean_them(real, more):  # noqa: F811
    answer = client(real).chat.completions.create(model="tiny", messages=[user("a")], **more)
    prompt = answer.usage.prompt_tokens
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.usage.total_tokens <= 64
    if answer.choices[0].finish_reason == "length" and more.get("max_tokens"):
        assert answer.usage.completion_tokens == 64 - prompt


def test_ignore_eos_goes_on_to_the_longest_answer(real):  # noqa: F811
    for path, body in (("/v1/chat/completions", dict(messages=[user("a")])), ("/v1/completions", dict(prompt="a"))):
        for seed in range(3):
            found = post(real, path, **body, max_tokens=30, ignore_eos=True, temperature=1.5, seed=seed).json()
            assert found["usage"]["completion_tokens"] == 30, found
            assert found["choices"][0]["finish_reason"] == "length"


def test_a_seed_of_minus_one_is_none(real):  # noqa: F811
    asked = dict(prompt="a", max_tokens=30, ignore_eos=True, temperature=1.5)
    ask = lambda seed: post(real, "/v1/completions", **asked, seed=seed).json()["choices"][0]["text"]
    assert ask(-1) != ask(-1) and ask(-2) == ask(-2)


@pytest.mark.parametrize(
    "path, body, words",
    [
        ("/v1/chat/completions", dict(messages=[user("a")], max_tokens=0), "max_tokens is 0"),
        ("/v1/chat/completions", dict(messages=[user("a")], max_tokens=-2), "max_tokens"),
        ("/v1/chat/completions", dict(messages=[user("a")], repetition_penalty=1e-300), "repetition_penalty"),
        ("/v1/completions", dict(prompt="\ud800", echo=True), "prompt"),
        ("/v1/chat/completions", dict(messages=[user("\ud800")]), "messages"),
        ("/v1/completions", dict(prompt=[]), "prompt: List should have at least 1 item"),
        ("/v1/completions", dict(prompt=[[]]), "prompt.0: List should have at least 1 item"),
        ("/v1/completions", dict(prompt="a", stop=["a"] * 17), "stop: List should have at most 16 items"),
        ("/v1/completions", dict(prompt=[["a"]]), "prompt"),
        ("/v1/completions", dict(prompt=[[10**6]]), "prompt: token"),
        ("/v1/completions", dict(prompt=["a"] * 30, n=5), "answers, wanted at most 64"),
        ("/v1/completions", dict(prompt="dog " * 200), "leaves no room"),
        ("/v1/completions", dict(prompt=[5] * 64), "leaves no room"),
        ("/v1/completions", dict(prompt=[5] * 65, max_tokens=0, echo=True), "65 tokens, which is more than"),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content=[{}] * 4097)]), "4097 parts in all"),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content=[{}] * 9)] * 456), "4104 parts in all"),
    ],
)
def test_the_rest_stays_a_clear_refusal(real, path, body, words):  # noqa: F811
    found = httpx.post(real[0] + path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert found.status_code == 400 and words in found.json()["error"]["message"]


# ---- a long conversation


def test_a_long_conversation_is_read_from_its_end_and_no_further(monkeypatch):
    read = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: read.append(len(text)) or encode(self, text))
    messages = [dict(role=("user", "assistant")[i % 2], content=f"{i} {TEXT} ") for i in range(2001)]
    for beginning in ([], [system("be kind")]):
        read.clear()
        prompt = chat.prompt_within(tiny.tokenizer(), [*beginning, *messages], 16, 256)
        assert 256 - 60 < len(prompt) <= 240 and sum(read) < 2500
        assert ("be kind" in tiny.tokenizer().decode(prompt)) == bool(beginning)
    read.clear()
    assert len(chat.prompt_within(tiny.tokenizer(), [system("be kind " * 500), *messages], 16, 256)) == 1 + 192
    assert sum(read) < 2 * 8 * 500 + 200


def test_a_prompt_leaves_room_for_an_answer_in_every_context():
    tokenizer, messages = tiny.tokenizer(), [dict(role="user", content=TEXT)]
    whole = tokenizer.render_for_completion(messages)
    for context in range(2, len(whole) + 3):
        prompt = chat.prompt_within(tokenizer, messages, 16, context)
        assert 1 <= len(prompt) < context and prompt[0] == tokenizer.bos
        assert context == 2 or prompt[-1] == whole[-1]
    for context in (2, 3, 4):
        engine = Engine(tiny.model(sequence_len=context), 1)
        chat.answers(engine, tokenizer, [messages], 16, Sampling(temperature=0))


def in_threads(monkeypatch, *named):
    """Notes who calls these functions of modules or classes: a list of (name, thread's name)."""
    seen = []

    def noted(name, work):
        return lambda *args: seen.append((name, threading.current_thread().name)) or work(*args)

    for owner, name in named:
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    return seen


READ = ((reading, "json_of"), (reading, "validated"), (Tokenizer, "encode"), (Tokenizer, "decode"))
WRITTEN = ((asking, "written"), (asking, "long_lines"))


def test_two_megabytes_are_read_aside_and_one_after_the_other(monkeypatch):
    """499 messages of 4,000 characters, all of which must be counted, or only the last of which are read."""
    tokenizer, words = tiny.tokenizer(), (TEXT + " ") * 300
    messages = [dict(role=("user", "assistant")[i % 2], content=words[:4000]) for i in range(499)]
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500, limits=Limits(HOSTS)) as server:
        seen = in_threads(monkeypatch, *READ)
        for truncation, status in (("auto", 200), ("disabled", 400)):
            sent = dict(messages=messages, truncation=truncation, max_tokens=4)
            answer = httpx.post(server[0] + "/v1/chat/completions", timeout=60, json=sent)
            assert answer.status_code == status
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert len(seen) > 499 and len({thread for name, thread in seen if "long body" in thread}) == 1
        assert {name for name, thread in seen if "long body" not in thread} <= {"decode", "encode"}  # the engine's
        assert not any("server" in thread for _, thread in seen)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/chat/completions", dict(messages=[user("a")], max_tokens=2)),
        ("/chat/completions", dict(messages=[user("a")], max_tokens=2)),
        ("/chat/completions", dict(messages=[user("a")], model="tiny", max_tokens=2)),
        ("/v1/completions", dict(prompt=["a", "b"], echo=True, logprobs=2, max_tokens=0)),
        ("/v1/completions", dict(prompt=[[5, 6], [7]], echo=True, logprobs=2, max_tokens=1, stream=True)),
        ("/tokenize", dict(prompt="a")), ("/detokenize", dict(tokens=[5])),
    ],
)  # fmt: skip
def test_the_event_loop_reads_no_body_and_writes_no_long_answer(real, monkeypatch, path, body):  # noqa: F811
    seen = in_threads(monkeypatch, *READ, *WRITTEN)
    assert post(real, path, **body).status_code == 200
    assert {"json_of", "validated"} <= {name for name, _ in seen} and not any("server" in where for _, where in seen)
    if "echo" in body:
        assert ("long_lines" if body.get("stream") else "written") in {name for name, _ in seen}


FORMS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, OldRequest)


def lists_of(schema):
    """All lists in a core schema of pydantic's whose items can be wrong."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list | tuple) else ()
    items = schema.get("items_schema", {}) if isinstance(schema, dict) and schema.get("type") == "list" else {}
    return [schema] * (items.get("type", "any") != "any") + [found for one in inner for found in lists_of(one)]


@pytest.mark.parametrize("form", FORMS)
def test_every_list_of_a_body_fails_at_its_first_mistake(form):
    """Two megabytes of mistakes took pydantic 20 seconds to collect, in which no other thread ran."""
    assert all(one.get("fail_fast") for one in lists_of(form.__pydantic_core_schema__))
    assert lists_of(form.__pydantic_core_schema__) or form is TokenizeRequest
    for wrong in (-1, None, {}, []):
        many = [wrong] * 3000
        turns = dict(role="user", content=many)
        for sent in (dict(messages=many), dict(messages=[turns]), dict(prompt=many), dict(prompt=[many]),
                     dict(tokens=many), dict(messages=[user("a")], prompt="a", tokens=[1], stop=many)):  # fmt: skip
            try:
                form.model_validate(sent)
            except ValidationError as error:
                assert error.error_count() < 12


def test_a_body_of_many_lists_is_read_without_looking_for_garbage():
    looked = []
    watch = lambda phase, _: looked.append(phase)
    gc.callbacks.append(watch)
    try:
        assert len(reading.parsed(b"[" + b"[]," * 20_000 + b"[]]")) == 20_001
    finally:
        gc.callbacks.remove(watch)
    assert len(looked) <= 2 and gc.isenabled()  # one after it


def test_long_answers_are_written_in_chunks():
    row = {f"né {i}": -0.1 * i for i in range(20)}
    whole = dict(
        id="x", none=None, choices=[dict(index=i, logprobs=dict(top=[row] * 950, at=[]), t="é") for i in (0, 1)]
    )
    chunks = list(answers.dumped(whole))
    assert json.loads("".join(chunks)) == whole and max(map(len, chunks)) < len(json.dumps(row)) * 110


def test_a_prompt_may_fill_the_context_where_no_answer_is_asked_for(real):  # noqa: F811
    choice = post(real, "/v1/completions", prompt=[5] * 64, max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) == 64 and choice["finish_reason"] == "length"


def test_a_stream_repeats_a_prompt_as_the_whole_answer_does(real):  # noqa: F811
    asked = dict(prompt=[[5, 6, 7], [8, 9]], echo=True, logprobs=2, max_tokens=3, temperature=0, ignore_eos=True)
    whole = post(real, "/v1/completions", **asked).json()["choices"]
    lines = post(real, "/v1/completions", **asked, stream=True).text.split("\n\n")
    found = [dict(text="", tokens=[]) for _ in whole]
    for line in lines[:-2]:
        [choice] = json.loads(line[6:])["choices"]
        found[choice["index"]]["text"] += choice["text"]
        found[choice["index"]]["tokens"] += (choice["logprobs"] or dict(tokens=[]))["tokens"]
    assert found == [dict(text=one["text"], tokens=one["logprobs"]["tokens"]) for one in whole]


# ---- the way there


@pytest.mark.parametrize("key", ["k", "clé", "钥匙"])
def test_keys_as_clients_write_them(key):
    tokenizer = tiny.tokenizer()
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500, limits=Limits(HOSTS, key)) as server:
        ask = lambda header: httpx.get(server[0] + "/v1/models", headers=[(b"authorization", header)]).status_code
        assert ask(b"Bearer " + key.encode()) == ask(b"bearer " + key.encode()) == 200
        if max(key) < "\xff":
            assert ask(b"Bearer " + key.encode("latin1")) == 200
        assert {ask(wrong) for wrong in (b"Bearer ?", b"Bearer ??", b"Bearer", b"Basic k", b"x")} == {401}


def test_streams_are_not_buffered_and_v1_may_be_left_out(parrot):  # noqa: F811
    for path, body in (("/v1/chat/completions", dict(stream=True)), ("/chat/completions", {})):
        answer = post(parrot, path, messages=say("x"), **body)
        assert answer.headers["x-accel-buffering"] == "no" and "text/event-stream" in answer.headers["content-type"]
    bare = openai.OpenAI(base_url=parrot[0], api_key="any", max_retries=0)
    assert bare.chat.completions.create(model="tiny", messages=say("x")).choices[0].message.content == "x"
    assert [model.id for model in bare.models.list()] == ["tiny"] and bare.models.retrieve("tiny").id == "tiny"
    assert bare.completions.create(model="tiny", prompt="say: x", max_tokens=2).choices[0].text


def test_one_other_page_may_ask_and_no_other():
    tokenizer, page = tiny.tokenizer(), "https://example.org"
    ask = lambda server, origin: httpx.options(
        server[0] + "/v1/chat/completions",
        headers={"origin": origin, "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization, content-type, x-stainless-os"},
    )  # fmt: skip
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500, limits=Limits(HOSTS, "k", page)) as server:
        allowed = ask(server, page)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == page
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-origin" not in ask(server, "https://example.com").headers
        refused = httpx.get(server[0] + "/v1/models", headers={"origin": page})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500) as server:
        assert ask(server, page).status_code >= 400
        assert "access-control-allow-origin" not in httpx.get(server[0] + "/health", headers={"origin": page}).headers


def test_other_names_and_origins_are_checked():
    assert called("127.0.0.1", "Host.docker.internal, my-proxy") >= {"host.docker.internal", "my-proxy", "localhost"}
    assert called("0.0.0.0", "x") == frozenset() and checked_origin("") == ""
    assert checked_origin("https://Example.org:8080") == "https://example.org:8080"
    for wrong in ("http://x", "x:80", "*"):
        with pytest.raises(UserError, match="--allow-host"):
            called("127.0.0.1", wrong)
    for wrong in ("*", "example.org", "https://example.org/page", "null"):
        with pytest.raises(UserError, match="--allow-origin"):
            checked_origin(wrong)
