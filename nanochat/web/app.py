"""The endpoints: OpenAI's (models, chat completions, completions), nanochat's old one, vLLM's for the tokenizer,
health, stats, metrics, the page and the run's report. What a request becomes: reading.py, then asking.py.
"""

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.web import asking, metrics, reading
from nanochat.web.limits import Guard, Limits
from nanochat.web.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    OldRequest,
    TokenizeRequest,
)  # fmt: skip
from nanochat.web.served import Served
from nanochat.web.worker import stats

STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
REPORT_HEADERS = {  # it has its style within, and pictures; what it quotes of models is escaped, and no script runs
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


def make_app(served: Served, limits: Limits) -> FastAPI:
    app = FastAPI(title="nanochat-kernels", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=limits)
    if limits.origin:  # outside of Guard: its refusals are read there too
        app.add_middleware(
            CORSMiddleware, allow_origins=[limits.origin], allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["retry-after"],
        )  # fmt: skip
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

    @app.api_route("/report", methods=["GET", "HEAD"], include_in_schema=False)
    async def report() -> Response:
        if not has_report():
            raise ApiError(404, "this run has no report yet; python -m scripts.report makes it", "not_found_error")
        return FileResponse(str(served.report), media_type="text/html", headers=REPORT_HEADERS)

    def has_report() -> bool:
        return served.report is not None and served.report.is_file()

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
        # A link cannot send a key, so the page has none where one is asked for.
        report = "/report" if has_report() and not limits.api_key else None
        return dict(
            id=served.model, object="model", created=served.created, owned_by="nanochat",
            context_length=served.context, max_model_len=served.context, stage=served.stage,
            max_tokens=served.max_tokens, report=report, **served.card,
        )  # fmt: skip

    # OpenAI's, with and without /v1: that is how a base_url is often written.

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        return dict(object="list", data=[card()])

    @app.get("/v1/models/{name:path}")
    @app.get("/models/{name:path}", include_in_schema=False)
    async def one_model(name: str) -> dict[str, Any]:
        served.known(name)
        return card()

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await asking.chat_completion(served, request, await reading.body(request))

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    @app.post("/completions", include_in_schema=False)
    async def completions(request: Request) -> Response:
        return await asking.completion(served, request, await reading.body(request))

    @app.post("/chat/completions", openapi_extra=body_of(OldRequest))
    async def old_chat(request: Request) -> Response:
        """nanochat's own; but who names a model speaks OpenAI's language."""
        content = await reading.body(request)
        if isinstance(content, dict) and "model" in content:
            return await asking.chat_completion(served, request, content)
        return await asking.old_chat(served, request, content)

    # The tokenizer, as vLLM serves it and lm-evaluation-harness asks for it.

    bos = "<|bos|>"  # before every document, and so its end too

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return dict(
            tokenizer_class="nanochat", vocab_size=served.tokenizer.vocab_size, model_max_length=served.context,
            bos_token=bos, eos_token=bos, pad_token=bos, add_bos_token=True,
        )  # fmt: skip

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return await reading.aside(request, reading.tokenized, served, await reading.body(request))

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        return await reading.aside(request, reading.detokenized, served, await reading.body(request))

    return app


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """A body's schema for the OpenAPI document: we parse it ourselves, to answer with OpenAI's error bodies."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    text = json.dumps(schema)
    for _ in range(3):  # definitions refer to each other
        for name, inner in definitions.items():
            text = text.replace(json.dumps({"$ref": f"#/components/schemas/{name}"}), json.dumps(inner))
    return dict(requestBody=dict(required=True, content={"application/json": dict(schema=json.loads(text))}))
