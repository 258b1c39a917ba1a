"""From a body to jobs for the engine's thread (worker.py), one for each answer, and from their events to a response.

The events come back through an asyncio queue and leave as JSON or as server-sent events. When the client goes, the jobs
are cancelled. Texts are turned into ids in a thread: a long conversation takes a while, and the event loop never waits.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from nanochat import chat
from nanochat.calculator import calculate
from nanochat.chat import Event, Reply
from nanochat.engine import Request as EngineRequest
from nanochat.files import encodable, json_of
from nanochat.tokenizer import Tokenizer
from nanochat.web import answers
from nanochat.web.conversation import conversation
from nanochat.web.schema import ApiError, ChatRequest, CompletionRequest, Message, OldRequest, Settings, problem
from nanochat.web.worker import Full, Job, Pool, Worker

UNBUFFERED = {"x-accel-buffering": "no"}  # nginx would keep a stream until it is large


@dataclass(frozen=True)
class Served:
    """What is served and with which settings where a request leaves them open."""

    pool: Pool
    tokenizer: Tokenizer
    model: str
    context: int
    stage: str
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    created: int = 0
    tool: chat.Tool = calculate
    card: dict[str, Any] = field(default_factory=dict)  # what else the page is told about the model: suggestions.py
    report: Path | None = None  # the run's report card, once there is one

    def known(self, name: str | None) -> None:
        """Raises ApiError for the name of another model."""
        if name is not None and name != self.model:
            raise ApiError(
                404, f"there is no model {name!r} here, only {self.model!r}", param="model", code="model_not_found"
            )


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
        """Events as they come; None when the answer of that index is over. Raises ApiError when the engine dies."""
        left = len(self.jobs)
        while left:
            index, event = await self.events.get()
            if isinstance(event, Exception):
                raise ApiError(503, str(event), "server_error")
            left -= event is None
            yield index, event


# ---- the kinds of requests


async def chat_completion(served: Served, request: Request, content: Any) -> Response:
    asked: ChatRequest = validated(content, ChatRequest)
    served.known(asked.model)
    asked.check()
    limit = longest(served, asked.max_completion_tokens or asked.max_tokens, served.max_tokens)
    prompt = await asyncio.to_thread(chat_prompt, served, asked, limit)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    jobs = start(served, asked, [prompt], limit, chat.ends(served.tokenizer), logprobs, served.tool)
    form = answers.ChatForm(served.tokenizer, identity("chatcmpl"), served.model, bool(asked.logprobs))
    return await respond(request, asked, jobs, form)


async def completion(served: Served, request: Request, content: Any) -> Response:
    asked: CompletionRequest = validated(content, CompletionRequest)
    served.known(asked.model)
    asked.check()
    limit = longest(served, asked.max_tokens, 16)
    texts = await asyncio.to_thread(text_prompts, served, asked)
    with_logprobs, echo = asked.logprobs is not None, bool(asked.echo)
    prompts = [prompt for prompt, _, _ in texts]
    ends = frozenset((served.tokenizer.bos,))
    jobs = start(served, asked, prompts, limit, ends, asked.logprobs, None, echo and with_logprobs)
    repeated = [(text, ids) for _, text, ids in texts] if echo else None
    form = answers.TextForm(served.tokenizer, identity("cmpl"), served.model, with_logprobs, asked.n or 1, repeated)
    return await respond(request, asked, jobs, form)


async def old_chat(served: Served, content: Any) -> Response:
    asked: OldRequest = validated(content, OldRequest)
    total = sum(len(message.content) for message in asked.messages)
    if total > 32_000:
        raise ApiError(400, f"messages: {total} characters in all, wanted at most 32,000", param="messages")
    settings = Settings.model_validate(dict(temperature=asked.temperature, top_k=asked.top_k))
    messages = conversation([Message(role=message.role, content=message.content) for message in asked.messages])
    limit = asked.max_tokens or served.max_tokens
    prompt = await asyncio.to_thread(chat.prompt_within, served.tokenizer, messages, limit, served.context)
    jobs = start(served, settings, [prompt], limit, chat.ends(served.tokenizer), None, served.tool)
    gpu = served.pool.workers.index(jobs.worker)
    return StreamingResponse(old_stream(jobs, gpu), media_type="text/event-stream", headers=UNBUFFERED)


# ---- from a body to jobs


async def body(request: Request) -> Any:
    """What the body says. Raises ApiError when it is no JSON."""
    try:
        return json_of(await request.body())
    except ValueError:
        raise ApiError(400, "the body is no valid JSON") from None


def validated(content: Any, form: type[BaseModel]) -> Any:
    """A body as a `form`. Raises ApiError when it does not fit."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise problem(error) from None


def longest(served: Served, asked: int | None, usual: int) -> int:
    """Tokens of an answer; what does not fit is not made. −1: as many as fit."""
    return served.context if asked == -1 else usual if asked is None else asked


def chat_prompt(served: Served, asked: ChatRequest, limit: int) -> list[int]:
    messages = conversation(asked.messages)
    try:
        if asked.truncation == "auto":
            return chat.prompt_within(served.tokenizer, messages, limit, served.context)
        prompt = served.tokenizer.render_for_completion(messages)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    check_length(served, prompt, "messages")
    return prompt


def text_prompts(served: Served, asked: CompletionRequest) -> list[tuple[list[int], str, list[int]]]:
    """Of each prompt what the model reads, and what is repeated: its text and its ids. A text begins with <|bos|>, as
    every document does; ids are taken as they are. Raises ApiError.
    """
    tokenizer, found = served.tokenizer, []
    for prompt in asked.prompts():
        if isinstance(prompt, str):
            try:
                encodable(prompt)
            except ValueError as error:
                raise ApiError(400, f"prompt: {error}", param="prompt") from None
            ids = tokenizer.encode(prompt)
            found.append(([tokenizer.bos, *ids], prompt, ids))
        elif max(prompt) >= tokenizer.vocab_size:
            raise ApiError(400, f"prompt: token {max(prompt)} is not below {tokenizer.vocab_size}", param="prompt")
        else:
            text = tokenizer.decode([token for token in prompt if token < len(tokenizer.merges)])
            found.append((prompt, text, prompt))
        check_length(served, found[-1][0], "prompt")
    return found


def check_length(served: Served, prompt: list[int], param: str) -> None:
    if len(prompt) >= served.context:
        raise ApiError(
            400, f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in the model's context of "
            f"{served.context}", param=param, code="context_length_exceeded",
        )  # fmt: skip


def start(
    served: Served, settings: Settings, prompts: list[list[int]], limit: int, ends: frozenset[int],
    logprobs: int | None, tool: chat.Tool | None, echo: bool = False,
) -> Asked:  # fmt: skip
    """Submits a job for each of the n answers to each prompt. Raises ApiError when the queue is full or the engine
    dead."""
    loop, n = asyncio.get_running_loop(), settings.n or 1
    events: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
    seed = secrets.randbelow(2**62) if settings.seed is None or settings.seed == -1 else settings.seed
    if n * len(prompts) > served.pool.most:
        raise ApiError(400, f"these are {n * len(prompts)} answers, wanted at most {served.pool.most} at a time")
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
        return JSONResponse(form.whole(asked.jobs, await whole))
    finally:
        asked.cancel()
        whole.cancel()
        gone.cancel()


async def stream(asked: Asked, form: answers.Form, usage: bool) -> AsyncIterator[str]:
    try:
        for i in range(len(asked.jobs)):
            for chunk in form.opening(i):
                yield sse(chunk)
        async for i, event in asked.each():
            job = asked.jobs[i]
            for chunk in form.ending(i, job) if event is None else form.piece(i, event, job):
                yield sse(chunk)
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


def sse(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
