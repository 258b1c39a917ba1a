"""From what is asked (reading.py) to jobs for the engine's thread (worker.py), one for each answer, and from their
events to a response.

The events come back through an asyncio queue and leave as JSON or as server-sent events. When the client goes, the jobs
are cancelled. What may be long is written in a thread: the event loop never waits.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from nanochat import chat
from nanochat.chat import Event, Reply
from nanochat.engine import Request as EngineRequest
from nanochat.web import answers
from nanochat.web.reading import aside, chat_asked, few_enough, old_asked, text_asked
from nanochat.web.schema import ApiError, Settings
from nanochat.web.served import Served
from nanochat.web.worker import Full, Job, Worker

UNBUFFERED = {"x-accel-buffering": "no"}  # nginx would keep a stream until it is large


@dataclass
class Asked:
    """A request on its way: its jobs and the queue of (index, event) that they fill."""

    jobs: list[Job]
    events: "asyncio.Queue[tuple[int, Event | Exception | None]]"
    worker: Worker

    def cancel(self) -> None:
        for job in self.jobs:
            self.worker.cancel(job)

    async def each(self) -> AsyncIterator[tuple[int, Event | None]]:
        """Events as they come; None when the answer of that index is over. Raises ApiError when the engine fails."""
        left = len(self.jobs)
        while left:
            index, event = await self.events.get()
            if isinstance(event, ValueError):  # of this request
                raise ApiError(400, str(event))
            if isinstance(event, Exception):
                raise ApiError(503, str(event), "server_error")
            left -= event is None
            yield index, event


# ---- the kinds of requests


async def chat_completion(served: Served, request: Request, content: Any) -> Response:
    asked, limit, prompt = await aside(request, chat_asked, served, content)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    jobs = start(served, asked, [prompt], limit, chat.ends(served.tokenizer), logprobs, served.tool)
    form = answers.ChatForm(served.tokenizer, identity("chatcmpl"), served.model, bool(asked.logprobs))
    return await respond(request, asked, jobs, form)


async def completion(served: Served, request: Request, content: Any) -> Response:
    asked, limit, texts = await aside(request, text_asked, served, content)
    with_logprobs, echo = asked.logprobs is not None, bool(asked.echo)
    prompts = [prompt for prompt, _, _ in texts]
    ends = frozenset((served.tokenizer.bos,))
    jobs = start(served, asked, prompts, limit, ends, asked.logprobs, None, echo and with_logprobs)
    repeated = [(text, ids) for _, text, ids in texts] if echo else None
    form = answers.TextForm(served.tokenizer, identity("cmpl"), served.model, with_logprobs, asked.n or 1, repeated)
    return await respond(request, asked, jobs, form)


async def old_chat(served: Served, request: Request, content: Any) -> Response:
    asked, limit, prompt = await aside(request, old_asked, served, content)
    settings = Settings.model_validate(dict(temperature=asked.temperature, top_k=asked.top_k))
    jobs = start(served, settings, [prompt], limit, chat.ends(served.tokenizer), None, served.tool)
    gpu = served.pool.workers.index(jobs.worker)
    return StreamingResponse(old_stream(jobs, gpu), media_type="text/event-stream", headers=UNBUFFERED)


def start(
    served: Served, settings: Settings, prompts: list[list[int]], limit: int, ends: frozenset[int],
    logprobs: int | None, tool: chat.Tool | None, echo: bool = False,
) -> Asked:  # fmt: skip
    """Submits a job for each of the n answers to each prompt. Raises ApiError when the queue is full or the engine
    dead."""
    loop, n = asyncio.get_running_loop(), settings.n or 1
    events: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
    seed = secrets.randbelow(2**62) if settings.seed is None or settings.seed == -1 else settings.seed
    few_enough(served, n * len(prompts))
    jobs = []
    for i in range(n * len(prompts)):
        sampling = settings.sampling(served.temperature, served.top_k, seed + i % n, logprobs)
        stop = frozenset() if settings.ignore_eos else ends
        request = EngineRequest(prompts[i // n], limit, sampling, stop, echo)
        reply = Reply(served.tokenizer, request, settings.stops(), tool)
        jobs.append(Job(request, reply, partial(later, loop, events, i)))
    try:
        worker = served.pool.submit(jobs)
    except Full as full:
        raise ApiError(
            429, "too many requests are waiting; try again soon", "rate_limit_error", code="queue_full",
            headers={"retry-after": str(full.seconds)},
        ) from None  # fmt: skip
    except RuntimeError as dead:
        raise ApiError(503, str(dead), "server_error") from None
    return Asked(jobs, events, worker)


def identity(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


# ---- from events to a response


async def respond(request: Request, settings: Settings, asked: Asked, form: answers.Form) -> Response:
    if settings.stream:
        usage = bool(settings.stream_options and settings.stream_options.include_usage)
        return StreamingResponse(stream(asked, form, usage), media_type="text/event-stream", headers=UNBUFFERED)
    whole = asyncio.ensure_future(gather(asked))
    gone = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=499)
        return Response(await asyncio.to_thread(written, form, asked, await whole), media_type="application/json")
    finally:
        asked.cancel()
        whole.cancel()
        gone.cancel()


def written(form: answers.Form, asked: Asked, found: list[list[Event]]) -> bytes:
    return "".join(answers.dumped(form.whole(asked.jobs, found))).encode()


async def stream(asked: Asked, form: answers.Form, usage: bool) -> AsyncIterator[str]:
    begun: set[int] = set()
    try:
        for i in range(len(asked.jobs)):
            for chunk in form.opening(i):
                yield sse(chunk)
        async for i, event in asked.each():
            job = asked.jobs[i]
            make = partial(form.ending, i, job) if event is None else partial(form.delta, i, event, job)
            long = job.request.echo and i not in begun  # the whole prompt is in it
            begun.add(i)
            for line in await asyncio.to_thread(long_lines, make) if long else map(sse, make()):
                yield line
        if usage:
            yield sse(form.usage(asked.jobs))
    except ApiError as error:
        yield sse(error.body)
    finally:
        asked.cancel()
    yield "data: [DONE]\n\n"


async def old_stream(asked: Asked, gpu: int) -> AsyncIterator[str]:
    try:
        async for _, event in asked.each():
            if event is not None and event.kind == "text" and event.text:
                yield sse(dict(token=event.text, gpu=gpu))
        yield sse(dict(done=True))
    except ApiError as error:
        yield sse(error.body)
    finally:
        asked.cancel()


def later(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, index: int, event: Any) -> None:
    """Puts an event on a queue, from another thread; nothing when the loop has ended."""
    try:
        loop.call_soon_threadsafe(events.put_nowait, (index, event))
    except RuntimeError:
        pass


async def gather(asked: Asked) -> list[list[Event]]:
    found: list[list[Event]] = [[] for _ in asked.jobs]
    async for i, event in asked.each():
        if event is not None:
            found[i].append(event)
    return found


async def left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def long_lines(make: Callable[[], list[answers.Chunk]]) -> list[str]:
    return [f"data: {''.join(answers.dumped(chunk))}\n\n" for chunk in make()]


def sse(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
