"""`scripts.chat_web` as a process: what it refuses to serve, how it ends, and what benchmarks/load.py does to it."""

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import standins
import tiny
import torch
from test_training import home, train  # noqa: F401 (home is a fixture)
from test_web import say

from benchmarks import load
from nanochat.run import Run
from nanochat.web import mock
from scripts import chat_web

LONG = ("--max-seq-len=256", "--num-iterations=1", "--total-batch-size=1024", "--head-dim=16")


@pytest.fixture
def served(home, monkeypatch):  # noqa: F811
    """A run whose model's context is long enough to chat in; servers start no compiler, which takes half a minute."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert train(home, "a", "base", *LONG) == 0
    return home


def refusal(capsys, *flags):
    capsys.readouterr()
    assert tiny.call("chat_web", "--run=a", *flags) == 2
    said = capsys.readouterr().err
    assert said.strip().split("\n")[-1].startswith("error: ") and said.count("\n") <= 2  # a damaged one is warned of
    return said


def test_what_cannot_be_served_is_one_sentence(served, capsys):
    assert "missing" in refusal(capsys, "--run=missing")
    assert "sft" in refusal(capsys, "--source=sft")
    assert "--temperature is 3" in refusal(capsys, "--temperature=3")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert f"cannot listen on 127.0.0.1:{taken.getsockname()[1]}" in refusal(
            capsys, f"--port={taken.getsockname()[1]}"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = f"--port={free.getsockname()[1]}"
    folder = Run.open("a").stage("tokenizer")
    shutil.copytree(folder, served / "kept")
    tiny.tokenizer(290).save(folder)
    assert "tokenizer" in refusal(capsys, port)
    shutil.copytree(served / "kept", folder, dirs_exist_ok=True)
    weights = next(Run.open("a").stage("base").glob("step_*/model*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not used: model" in refusal(capsys, port)


def test_sigterm_lets_answers_end_and_takes_no_more(served):
    """The answer that was being written comes whole, others are sent away; then the process ends, with code 0."""

    async def scene():
        server = load.Server("a")
        try:
            await server.ready()
            reader, writer = await server.send(load.question(0, 150))
            while not (await reader.readline()).startswith(b"data: "):
                pass
            server.process.send_signal(signal.SIGTERM)
            rest = await reader.read()
            writer.close()
            assert b"data: [DONE]" in rest and b'"finish_reason": "' in rest
            assert await asyncio.to_thread(server.process.wait, 20) == 0
            with pytest.raises(ConnectionRefusedError):
                await server.get("/health")
        finally:
            server.process.kill()

    asyncio.run(scene())


@pytest.mark.slow
def test_told_to_end_while_it_compiles_it_ends_with_0_each_time(served, monkeypatch, tmp_path):
    """At any moment of a compilation: Python once stopped the compiler's thread in C++, which aborts the process."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    codes = []
    for trial in range(12):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"cache{trial}"))
        server = load.Server("a")
        try:
            time.sleep(0.5 + trial)
            server.process.send_signal(signal.SIGTERM)
            codes.append(server.process.wait(timeout=60))
        finally:
            server.process.kill()
    assert codes == [0] * len(codes)


def test_every_replica_computes_in_what_its_card_has(monkeypatch):
    standins.gpus(monkeypatch, "H100", "T4")
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    asked = []
    checkpoint = SimpleNamespace(
        meta=dict(stage="sft"), check_tokenizer=lambda tokenizer: None, model=lambda *how: asked.append(how)
    )
    run = SimpleNamespace(checkpoint=lambda *_, older: checkpoint, tokenizer=mock.tokenizer, folder=Path("run"))
    engine = SimpleNamespace(config=SimpleNamespace(sequence_len=64))
    stubs = dict(Run=SimpleNamespace(open=lambda name: run), Engine=lambda *_: engine, Worker=lambda *_: None)
    stubs.update(Pool=lambda workers, waiting: workers, suggestions=SimpleNamespace(of_the_run=lambda *_: {}))
    for name, stub in stubs.items():
        monkeypatch.setattr(chat_web, name, stub)
    chat_web.load(chat_web.Flags(run="a", num_gpus=2), lambda text: text)
    cards = [torch.device("cuda", i) for i in (0, 1)]
    assert asked == [(cards[0], *[torch.bfloat16] * 2), (cards[1], *[torch.float16] * 2)]


def test_503_while_loading_and_while_draining(monkeypatch, capsys):
    """In this process, with a load that takes as long as we want and a SIGTERM that comes when we want."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where, long = f"http://127.0.0.1:{port}", dict(messages=say("word " * 30), max_tokens=400)
    load_mock, plain, before = chat_web.load, chat_web.until_told_to_end, signal.getsignal(signal.SIGTERM)
    said, answers = [], []

    def slowly(flags, tool):
        said.append(httpx.get(where + "/health"))
        said.append(httpx.post(where + "/v1/chat/completions", json=long))
        return load_mock(flags, tool)

    def end():
        while signal.getsignal(signal.SIGTERM) is before or not httpx.get(where + "/stats").json()["running"]:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        while (health := httpx.get(where + "/health")).status_code == 200:
            time.sleep(0.02)
        said.append(health)
        said.append(httpx.get(where + "/v1/models"))

    def client():
        answers.append(httpx.post(where + "/v1/chat/completions", json=long, timeout=60))

    def clients_come(thread):
        for one in (end, client):
            threading.Thread(target=one).start()
        plain(thread)

    monkeypatch.setattr(chat_web, "load", slowly)
    monkeypatch.setattr(chat_web, "until_told_to_end", clients_come)
    assert tiny.call("chat_web", "--mock", f"--port={port}") == 0
    assert [answer.status_code for answer in said] == [503] * 4
    assert [said[i].json() for i in (0, 2)] == [dict(status="loading"), dict(status="draining")]
    assert [said[i].json()["error"]["code"] for i in (1, 3)] == ["loading", "draining"]
    assert all(answer.headers["retry-after"] for answer in said)
    assert answers[0].json()["choices"][0]["message"]["content"] == "word " * 30


def found(capsys, *flags):
    capsys.readouterr()
    assert tiny.call_module("benchmarks.load", "--run=a", *flags) == 0
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])


def check(scenes):
    stream, leave, soak, long = (scenes[name] for name in ("stream", "leave", "soak", "long"))
    assert stream["lost"] == 0 and stream["answers"] >= stream["clients"]
    assert leave["running"] + leave["waiting"] > 0 and leave["then_answered"]
    assert soak["honest"] > 0 and soak["honest_lost"] == 0
    assert soak["health_max_ms"] < float("inf") and stream["health_max_ms"] < float("inf")
    assert long["conversation"]["statuses"] == {"200": 40}
    for name in ("parts", "messages"):
        assert long[name]["statuses"] == {"400": 40} and long[name]["health_max_ms"] < 2000
    seen = soak["statuses"]
    expected = dict(slow_headers="0", huge_body="413", wrong_host="400", wrong_type="415", no_json="400")
    for name, status in expected.items():
        assert set(seen[name]) == {status}, (name, seen[name])
    assert set(seen["slow_body"]) <= {"408", "0"} and seen["flood"]


@pytest.mark.slow
def test_load_in_short(served, capsys):
    check(
        found(capsys, "--what=stream,leave,soak,long", "--seconds=2", "--clients=8", "--leavers=20", "--max-tokens=20")
    )


def test_batching_in_short(home, monkeypatch, capsys):  # noqa: F811
    small = dict(sequence_len=128, vocab_size=600, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    monkeypatch.setattr(load, "BATCH_MODEL", small)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    batch = found(capsys, "--what=batch", "--batch=4", "--max-tokens=20")["batch"]
    assert batch["requests"] == 4 and batch["model"] == small
    assert batch["ratio"] == pytest.approx(batch["together_tok_per_s"] / batch["alone_tok_per_s"])
    assert len(batch["alone_rounds"]) == len(batch["together_rounds"]) == load.BATCH_ROUNDS
    assert batch["alone_tok_per_s"] > 0


@pytest.mark.slow
def test_load_in_full(served, monkeypatch, capsys):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    scenes = found(capsys, "--what=stream,leave,soak,long,batch")
    check(scenes)
    assert scenes["leave"]["freed_ms"] < 1000 and scenes["batch"]["requests"] == 32


def test_load_refuses_what_makes_no_sense(capsys):
    for flags, words in (
        (["--what=dance"], "--what names 'dance'"),
        (["--clients=0"], "wanted 1 to 10000"),
        (["--batch=1"], "wanted 2 to 4096"),
    ):
        assert tiny.call_module("benchmarks.load", *flags) == 2
        assert words in capsys.readouterr().err
    assert tiny.call_module("benchmarks.load", "--run=missing") == 2
    assert "the server did not start" in capsys.readouterr().err
