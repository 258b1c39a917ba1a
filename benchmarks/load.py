"""Puts load on `scripts.chat_web`, started here in a process of its own, and says what the clients saw.

    python -m benchmarks.load --run speedrun          # streaming, leaving, soak, batching: a minute each, about

`stream`: many clients read answers for a while. `leave`: clients disconnect in mid-answer; how long are slots taken?
`soak`: slow, huge, misdirected and idle connections, while an honest client goes on asking. `batch`: the same requests
one after the other and all at once, of a larger model of random weights. `long`, where it is named: bodies of two
megabytes, a conversation and masses of mistakes. During `stream`, `soak` and `long`, /health is asked all the time.
Clients are bare sockets: they must leave the machine to the server.
"""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.flags import flag, listed, number, parse, run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import device_name
from nanochat.run import Run
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

ROOT = Path(__file__).parent.parent
HEALTH_EVERY = 0.05  # seconds
BODY_LIMIT = 2 << 20  # bytes; the server's own
# As large as a small speedrun's.
BATCH_MODEL = dict(sequence_len=512, vocab_size=32768, n_layer=6, n_head=6, n_kv_head=6, n_embd=384)
BATCH_ROUNDS = 3


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run whose model is served")
    what: str = flag("stream,leave,soak,batch", "which of them, comma-separated")
    clients: int = number(64, 1, 10_000, "clients that stream at once")
    leavers: int = number(200, 1, 10_000, "clients that disconnect in mid-answer")
    seconds: float = number(60.0, 0.1, 1e6, "how long streaming and soak take")
    max_tokens: int = number(100, 1, 1 << 20, "tokens of an answer")
    batch: int = number(32, 2, 4096, "requests that are answered one after the other, then all at once")


class Server:
    """`python -m scripts.chat_web` on a free port, and the few requests that we make of it."""

    def __init__(self, run: str, **environment: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "scripts.chat_web", f"--run={run}", f"--port={self.port}"]
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
        )
        assert self.process.stdout
        said = []
        for line in self.process.stdout:
            if line.startswith("Serving"):
                break
            said.append(line)
        else:
            raise UserError(f"the server did not start: {''.join(said[-1:]).strip()}")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)

    async def ready(self) -> None:
        """Waits until it answers and, if it compiles, has done so."""
        while True:
            with suppress(OSError):
                status, stats = await self.get("/stats")
                if status == 200 and "compiling" not in json.loads(stats)["decoding"]:
                    return
            await asyncio.sleep(0.05)

    async def send(self, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(content)
        return reader, writer

    async def get(self, path: str) -> tuple[int, bytes]:
        return await self.exchange(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())

    async def exchange(self, content: bytes) -> tuple[int, bytes]:
        """(status, body) of a request on a connection of its own; status 0: it was closed without an answer."""
        reader, writer = await self.send(content)
        try:
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        except ConnectionResetError:  # it was closed while we still wrote
            return 0, b""
        finally:
            writer.close()
        return (int(head.split()[1]) if head else 0), body


def post(body: bytes, host: str = "localhost", kind: str = "application/json", length: int | None = None) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: {kind}\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def question(i: int, max_tokens: int) -> bytes:
    messages = [dict(role="user", content=f"Tell me about the number {i}, please.")]
    return post(json.dumps(dict(messages=messages, stream=True, max_tokens=max_tokens)).encode())


@dataclass
class Answer:
    whole: bool  # it ended as it should
    first: float  # seconds to the first chunk of text
    chunks: int


def choice_of(line: bytes) -> dict[str, Any]:
    """Of a line `data: {json}` of a stream."""
    return json.loads(line[6:])["choices"][0]


async def ask(server: Server, i: int, max_tokens: int) -> Answer:
    """Reads one streamed answer to its end."""
    started, first, chunks, ended, done = time.perf_counter(), 0.0, 0, 0, False
    reader, writer = await server.send(question(i, max_tokens))
    with suppress(ConnectionError):
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                choice = choice_of(line)
                ended += choice["finish_reason"] is not None
                chunks += bool(choice["delta"].get("content"))
                first = first or (time.perf_counter() - started if chunks else 0.0)
    writer.close()
    return Answer(done and ended == 1, first, chunks)


async def health(server: Server, found: list[float]) -> None:
    """Asks for ever; a refusal counts as infinitely late."""
    while True:
        started = time.perf_counter()
        status, _ = await server.get("/health")
        found.append(time.perf_counter() - started if status == 200 else float("inf"))
        await asyncio.sleep(HEALTH_EVERY)


async def during(work: Coroutine[Any, Any, Any], background: Coroutine[Any, Any, Any]) -> Any:
    task = asyncio.ensure_future(background)
    try:
        return await work
    finally:
        task.cancel()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def waits(found: list[float]) -> dict[str, float]:
    return dict(
        health_p50_ms=1e3 * percentile(found, 0.5), health_p99_ms=1e3 * percentile(found, 0.99),
        health_max_ms=1e3 * max(found), health_asked=len(found),
    )  # fmt: skip


async def stream(server: Server, flags: Flags) -> dict[str, Any]:
    ends = time.perf_counter() + flags.seconds
    answers: list[Answer] = []

    async def client(i: int) -> None:
        while time.perf_counter() < ends:
            answers.append(await ask(server, i, flags.max_tokens))

    found: list[float] = []
    started, before = time.perf_counter(), await tokens(server)
    await during(asyncio.gather(*map(client, range(flags.clients))), health(server, found))
    seconds = time.perf_counter() - started
    first = [answer.first for answer in answers if answer.first]
    return dict(
        clients=flags.clients, seconds=seconds, answers=len(answers), lost=sum(not a.whole for a in answers),
        tok_per_s=(await tokens(server) - before) / seconds, first_p50_ms=1e3 * percentile(first, 0.5),
        first_p99_ms=1e3 * percentile(first, 0.99), **waits(found),
    )  # fmt: skip


async def tokens(server: Server) -> int:
    return json.loads((await server.get("/stats"))[1])["tokens"]


async def begun(reader: asyncio.StreamReader) -> None:
    """Reads up to the first text of an answer, or to its end."""
    async for line in reader:
        if line.startswith(b"data: {") and choice_of(line)["delta"].get("content"):
            return


async def leave(server: Server, flags: Flags) -> dict[str, Any]:
    opened = [await server.send(question(i, 200)) for i in range(flags.leavers)]
    slots = json.loads((await server.get("/stats"))[1])["slots"]
    await asyncio.gather(*(begun(reader) for reader, _ in opened[:slots]))
    before = json.loads((await server.get("/stats"))[1])
    for _, writer in opened:
        writer.transport.abort()
    gone, taken = time.perf_counter(), -1
    while taken:
        numbers = json.loads((await server.get("/stats"))[1])
        taken = numbers["running"] + numbers["waiting"]
    freed = time.perf_counter() - gone
    answer = await ask(server, 0, 8)
    return dict(
        clients=flags.leavers, running=before["running"], waiting=before["waiting"], freed_ms=1e3 * freed,
        then_answered=answer.whole,
    )  # fmt: skip


async def soak(server: Server, flags: Flags) -> dict[str, Any]:
    ends = time.perf_counter() + flags.seconds
    seen: dict[str, Counter] = {}

    async def again(name: str, attack: Any) -> None:
        counts = seen.setdefault(name, Counter())
        while time.perf_counter() < ends:
            counts[await attack()] += 1

    async def slow_headers() -> int:
        """A byte a second, until the server has had enough."""
        reader, writer = await server.send(b"")
        with suppress(ConnectionError):
            for byte in b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n":
                if reader.at_eof():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(1.0)
            else:
                return int((await reader.read()).split()[1])
        writer.close()
        return 0

    async def flood() -> int:
        opened = [await server.send(b"") for _ in range(200)]
        await asyncio.sleep(1.0)
        for _, writer in opened:
            writer.transport.abort()
        return 0

    async def status(content: bytes) -> int:
        return (await server.exchange(content))[0]

    answers: list[Answer] = []

    async def honest() -> None:
        while time.perf_counter() < ends:
            answers.append(await ask(server, len(answers), 16))

    attacks = dict(
        slow_headers=slow_headers,
        slow_body=lambda: status(post(b'{"messages": ', length=1000)),
        huge_body=lambda: status(post(b"x" * (BODY_LIMIT + 1))),
        wrong_host=lambda: status(post(b"{}", host="evil.example")),
        wrong_type=lambda: status(post(b"{}", kind="text/plain")),
        no_json=lambda: status(post(b"{" * 1000)),
        flood=flood,
    )
    found: list[float] = []
    many = [again(name, attack) for name, attack in attacks.items()]
    many += [again(name, attacks[name]) for name in ("slow_headers", "slow_body") for _ in range(20)]
    await during(asyncio.gather(honest(), *many), health(server, found))
    return dict(
        seconds=flags.seconds, honest=len(answers), honest_lost=sum(not a.whole for a in answers),
        statuses={name: dict(sorted(counts.items())) for name, counts in seen.items()},
        honest_p50_ms=1e3 * percentile([a.first for a in answers], 0.5), **waits(found),
    )  # fmt: skip


LONG_BODIES: dict[str, dict[str, Any]] = dict(
    conversation=dict(
        messages=[dict(role=("user", "assistant")[i % 2], content="the dog sees a cat, " * 200) for i in range(499)],
        truncation="auto", max_tokens=8,
    ),
    parts=dict(messages=[dict(role="user", content=[{}] * 500_000)]),
    messages=dict(messages=[None] * 340_000),
)  # fmt: skip


async def long(server: Server, flags: Flags) -> dict[str, Any]:
    """Each body 40 times, two at once: statuses, the seconds of the slowest, and how long /health took meanwhile."""
    seen: dict[str, Any] = {}
    for name, body in LONG_BODIES.items():
        content, found, took = post(json.dumps(body).encode()), [], []

        async def often(content: bytes = content, took: list[float] = took) -> list[int]:
            statuses = []
            for _ in range(20):
                started = time.perf_counter()
                statuses.append((await server.exchange(content))[0])
                took.append(time.perf_counter() - started)
            return statuses

        statuses = Counter(sum(await during(asyncio.gather(often(), often()), health(server, found)), []))
        seen[name] = dict(bytes=len(content), statuses=dict(statuses), slowest_s=max(took), **waits(found))
    return seen


def random_run(base_dir: Path, sizes: dict[str, int]) -> str:
    """A run of untrained weights of a GPTConfig of these sizes; the vocabulary's merges are pairs of bytes."""
    made = Run("random", base_dir / "runs" / "random")
    single = [bytes([i]) for i in range(256)]
    pairs = (first + second for first in single for second in single)
    tokenizer = Tokenizer([*single, *islice(pairs, sizes["vocab_size"] - len(SPECIAL_TOKENS) - 256)])
    tokenizer.save(made.stage("tokenizer"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # it begins with zeros: every draw would be a tie
    meta = dict(stage="base", step=0, finished=True, tokenizer=tokenizer.fingerprint)
    checkpoint.save(made.stage("base"), meta, model, {})
    return made.name


async def batch(flags: Flags) -> dict[str, Any]:
    """On a server of its own, in turns; medians. The prompts are new each time, so that no cache helps."""
    rates: dict[int, list[float]] = {1: [], flags.batch: []}
    asked = 0
    with TemporaryDirectory() as folder:
        server = Server(random_run(Path(folder), BATCH_MODEL), NANOCHAT_BASE_DIR=folder)
        try:
            await server.ready()
            for _ in range(BATCH_ROUNDS):
                for at_once, found in rates.items():
                    free = asyncio.Semaphore(at_once)

                    async def one(i: int, free: asyncio.Semaphore = free) -> Answer:
                        async with free:
                            return await ask(server, i, flags.max_tokens)

                    started, before = time.perf_counter(), await tokens(server)
                    answers = await asyncio.gather(*map(one, range(asked, asked + flags.batch)))
                    found.append((await tokens(server) - before) / (time.perf_counter() - started))
                    asked += flags.batch
                    if not all(answer.whole for answer in answers):
                        raise UserError(f"of {flags.batch} answers, {at_once} at once, some did not end as they should")
        finally:
            server.end()
    alone, together = median(rates[1]), median(rates[flags.batch])
    return dict(
        requests=flags.batch, model=BATCH_MODEL, alone_tok_per_s=alone, together_tok_per_s=together,
        ratio=together / alone, alone_rounds=rates[1], together_rounds=rates[flags.batch],
    )  # fmt: skip


SCENES = dict(stream=stream, leave=leave, soak=soak, long=long)  # on one server, of --run
NAMES = (*SCENES, "batch")


async def play(flags: Flags, names: list[str]) -> dict[str, Any]:
    found = {}

    def report(name: str) -> None:
        shown = (f"{k} {round(v, 1) if isinstance(v, float) else v}" for k, v in found[name].items())
        print(f"{name}: {', '.join(shown)}", flush=True)

    if set(names) & set(SCENES):
        server = Server(flags.run)
        try:
            await server.ready()
            for name in SCENES:
                if name in names:
                    found[name] = await SCENES[name](server, flags)
                    report(name)
        finally:
            server.end()
    if "batch" in names:
        found["batch"] = await batch(flags)
        report("batch")
    return found


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # the soak writes into connections that are closed
    names = listed("what", flags.what, NAMES)
    found = asyncio.run(play(flags, names))
    machine = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(dict(machine=machine, cores=os.cpu_count(), torch=torch.__version__, run=flags.run, **found)))


if __name__ == "__main__":
    run_script(main)
