"""What requests look like, and what is wrong with them: OpenAI's bodies, plus a few fields of ours.

Every problem is an `ApiError` with OpenAI's error body. Fields that we do not know are ignored, as clients send many;
those that would change the answer and that we cannot honour are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from nanochat.engine import Sampling


class ApiError(Exception):
    """An HTTP status with OpenAI's error body."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = dict(error=dict(message=message, type=kind, param=param, code=code))


Text = Annotated[str, StringConstraints(max_length=200_000)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> dict[str, Any]:
        """As tokenizer.py has it: a string, or an assistant's parts where a tool was used."""
        role, content = "system" if self.role == "developer" else self.role, self.content
        if isinstance(content, list):
            if any(part.type != "text" for part in content):
                content = [part.model_dump() for part in content]  # type: ignore[misc]
            else:
                content = "".join(part.text for part in content)
        return dict(role=role, content=content)


class Options(BaseModel):
    include_usage: bool = False


class Settings(BaseModel):
    """What chat completions and plain ones have in common."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: Annotated[str, StringConstraints(max_length=200)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="candidates to draw from; 0: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    n: int | None = Field(None, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: Options | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None
    best_of: int | None = Field(None, ge=1)

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, temperature: float, top_k: int, seed: int, logprobs: int | None) -> Sampling:
        """The request's, with what it leaves open."""
        k = top_k if self.top_k is None else self.top_k
        return Sampling(
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=k or None,
            seed=seed % 2**63,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logprobs=logprobs,
        )

    def check(self) -> None:
        """Raises ApiError for what we know and cannot do."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported; use repetition_penalty", param=name)
        if self.logit_bias:
            raise ApiError(400, "logit_bias is not supported", param="logit_bias")
        if (self.best_of or 1) > (self.n or 1):
            raise ApiError(400, "best_of is not supported; use n", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")


class ChatRequest(Settings):
    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: drop the oldest turns when the context is full"
    )
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise ApiError(400, f"{name} are not supported: the model calls its own calculator", param=name)
        if self.response_format and self.response_format.get("type") not in (None, "text"):
            raise ApiError(400, "response_format is not supported but for text", param="response_format")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs: true", param="top_logprobs")


class CompletionRequest(Settings):
    prompt: Text | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: Text | None = None

    def check(self) -> None:
        super().check()
        for name in ("echo", "suffix"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported", param=name)


class OldMessage(BaseModel):
    role: Literal["user", "assistant"]
    content: Annotated[str, StringConstraints(min_length=1, max_length=8000)]


class OldRequest(BaseModel):
    """nanochat's own endpoint, with its limits."""

    model_config = ConfigDict(allow_inf_nan=False)

    messages: list[OldMessage] = Field(min_length=1, max_length=500)
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=200)
    max_tokens: int | None = Field(None, ge=1, le=4096)


def problem(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, in a sentence; where it may be of two kinds, what is wrong deepest."""
    found = []
    for one in error.errors(include_url=False, include_context=False):
        kept = [str(part) for part in one["loc"] if not str(part).startswith(("list[", "constrained-"))]
        found.append((kept, one["msg"][:300]))
    within = [(kept, words) for kept, words in found if kept[: len(found[0][0])] == found[0][0]]
    kept, words = max(within, key=lambda item: len(item[0]))
    where = ".".join(kept)
    return ApiError(400, f"{where or 'the body'}: {words}", param=where or None)
