"""The endpoints: OpenAI's (models, chat completions, completions), nanochat's old one, health, stats, metrics, page.

A request becomes jobs for the engine's thread (worker.py), one for each of `n` answers; their events come back through
an asyncio queue and leave as JSON or as server-sent events. When the client goes, the jobs are cancelled.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from nanochat import chat
from nanochat.calculator import calculate
from nanochat.chat import Event, Reply
from nanochat.engine import Request as EngineRequest
from nanochat.files import json_of
from nanochat.tokenizer import Tokenizer
from nanochat.web import answers, metrics
from nanochat.web.limits import Guard, Limits
from nanochat.web.schema import ApiError, ChatRequest, CompletionRequest, OldRequest, Settings, problem
from nanochat.web.worker import Full, Job, Pool, Worker, stats

STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


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


def make_app(served: Served, limits: Limits) -> FastAPI:
    app = FastAPI(title="nanochat-kernels", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=limits)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_problem(request: Request, error: HTTPException) -> Response:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        words, headers = f"{request.url.path}: {error.detail}", dict(error.headers or {})
        return await refused(request, ApiError(error.status_code, words, kind, headers=headers))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, ApiError(400, str(error.errors()[0]["msg"])))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return await refused(request, ApiError(500, "something went wrong in the server", "server_error"))

    @app.middleware("http")
    async def headers(request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        for name, value in PAGE_HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        status, problem = served.pool.status, served.pool.problem
        body = dict(status=status, **(dict(problem=problem) if problem else {}))
        return JSONResponse(body, 503 if status == "dead" else 200)

    @app.get("/stats")
    async def numbers() -> dict[str, Any]:
        return dict(model=served.model, context_length=served.context, **stats(served.pool))

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return metrics.response(served.pool)

    def card() -> dict[str, Any]:
        return dict(
            id=served.model, object="model", created=served.created, owned_by="nanochat",
            context_length=served.context, stage=served.stage, max_tokens=served.max_tokens,
        )  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return dict(object="list", data=[card()])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        known(name)
        return card()

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        asked = await parsed(request, ChatRequest)
        known(asked.model)
        asked.check()
        limit = asked.max_completion_tokens or asked.max_tokens
        prompt = chat_prompt(asked, limit)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        jobs = start(asked, prompt, limit, logprobs, tools=True)
        form = answers.ChatForm(
            served.tokenizer, f"chatcmpl-{secrets.token_hex(12)}", served.model, bool(asked.logprobs)
        )
        return await respond(request, asked, jobs, form)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = await parsed(request, CompletionRequest)
        known(asked.model)
        asked.check()
        ids = asked.prompt
        if isinstance(ids, str):
            ids = [served.tokenizer.bos, *served.tokenizer.encode(ids)]
        elif max(ids) >= served.tokenizer.vocab_size:
            raise ApiError(400, f"prompt: token {max(ids)} is not below {served.tokenizer.vocab_size}", param="prompt")
        limit = asked.max_tokens or 16
        check_length(ids, limit, "prompt")
        jobs = start(asked, ids, limit, asked.logprobs, tools=False)
        form = answers.TextForm(
            served.tokenizer, f"cmpl-{secrets.token_hex(12)}", served.model, asked.logprobs is not None
        )
        return await respond(request, asked, jobs, form)

    @app.post("/chat/completions", openapi_extra=body_of(OldRequest))
    async def old_chat(request: Request) -> Response:
        asked = await parsed(request, OldRequest)
        total = sum(len(message.content) for message in asked.messages)
        if total > 32_000:
            raise ApiError(400, f"messages: {total} characters in all, wanted at most 32,000", param="messages")
        settings = Settings.model_validate(dict(temperature=asked.temperature, top_k=asked.top_k))
        messages = conversation([message.model_dump() for message in asked.messages])
        limit = asked.max_tokens or served.max_tokens
        prompt = chat.prompt_within(served.tokenizer, messages, limit, served.context)
        jobs = start(settings, prompt, limit, None, tools=True)
        return StreamingResponse(old_stream(jobs), media_type="text/event-stream")

    # ---- from a body to jobs

    def known(name: str | None) -> None:
        if name is not None and name != served.model:
            raise ApiError(
                404, f"there is no model {name!r} here, only {served.model!r}", param="model", code="model_not_found"
            )

    def conversation(messages: list[dict]) -> list[dict]:
        try:
            served.tokenizer.render_for_completion(messages)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None
        if messages[-1]["role"] != "user":
            raise ApiError(400, "messages: the last one must be the user's", param="messages")
        return messages

    def chat_prompt(asked: ChatRequest, limit: int | None) -> list[int]:
        messages = conversation([message.plain() for message in asked.messages])
        if asked.truncation == "auto":
            return chat.prompt_within(served.tokenizer, messages, limit or served.max_tokens, served.context)
        prompt = served.tokenizer.render_for_completion(messages)
        check_length(prompt, limit or 1, "messages")
        return prompt

    def check_length(prompt: list[int], limit: int, param: str) -> None:
        if len(prompt) + limit > served.context:
            raise ApiError(
                400, f"the prompt has {len(prompt)} tokens; with max_tokens {limit} that is more than the model's "
                f"context of {served.context}", param=param, code="context_length_exceeded",
            )  # fmt: skip

    def start(settings: Settings, prompt: list[int], limit: int | None, logprobs: int | None, tools: bool) -> Asked:
        """Submits one job for each answer. Raises ApiError when the queue is full or the engine dead."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
        seed = secrets.randbelow(2**62) if settings.seed is None else settings.seed
        jobs = []
        for i in range(settings.n or 1):
            sampling = settings.sampling(served.temperature, served.top_k, seed + i, logprobs)
            ends = chat.ends(served.tokenizer) if tools else frozenset((served.tokenizer.bos,))
            request = EngineRequest(prompt, limit or served.max_tokens, sampling, ends)
            tell = lambda event, i=i: later(loop, events, i, event)
            tool = served.tool if tools else None
            jobs.append(Job(request, Reply(served.tokenizer, request, settings.stops(), tool), tell))
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

    # ---- from events to a response

    async def respond(request: Request, settings: Settings, asked: Asked, form: answers.Form) -> Response:
        if settings.stream:
            usage = bool(settings.stream_options and settings.stream_options.include_usage)
            return StreamingResponse(stream(asked, form, usage), media_type="text/event-stream")
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
                if (opening := form.opening(i)) is not None:
                    yield sse(opening)
            async for i, event in asked.each():
                yield sse(form.ending(i, asked.jobs[i]) if event is None else form.piece(i, event))
            if usage:
                yield sse(form.usage(asked.jobs))
        except ApiError as error:
            yield sse(error.body)
        finally:
            asked.cancel()
        yield "data: [DONE]\n\n"

    async def old_stream(asked: Asked) -> AsyncIterator[str]:
        gpu = served.pool.workers.index(asked.worker)
        try:
            async for _, event in asked.each():
                if event is not None and event.kind == "text" and event.text:
                    yield sse(dict(token=event.text, gpu=gpu))
            yield sse(dict(done=True))
        except ApiError as error:
            yield sse(error.body)
        finally:
            asked.cancel()

    return app


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


async def parsed(request: Request, form: type[BaseModel]) -> Any:
    """The body as a `form`. Raises ApiError when it is no JSON or does not fit."""
    try:
        content = json_of(await request.body())
    except ValueError:
        raise ApiError(400, "the body is no valid JSON") from None
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise problem(error) from None


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """A body's schema for the OpenAPI document: we parse it ourselves, to answer with OpenAI's error bodies."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for _ in range(3):  # definitions refer to each other
        for name, inner in definitions.items():
            text = text.replace(json.dumps({"$ref": f"#/components/schemas/{name}"}), json.dumps(inner))
    return dict(requestBody=dict(required=True, content={"application/json": dict(schema=json.loads(text))}))


def sse(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
