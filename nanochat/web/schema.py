"""What requests look like, and what is wrong with them: OpenAI's bodies, plus a few fields of ours.

Every problem is an `ApiError` with OpenAI's error body. Fields that we do not know are ignored, as clients send many;
those that would change the answer and that we cannot honour are refused. Two megabytes of errors take pydantic 20
seconds to collect: every list fails at its first.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

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
Stop = Annotated[str, StringConstraints(max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
PARTS = 4096  # of all messages: each takes long to check, and more would hardly be meant
Longest = Annotated[int, Field(ge=-1)]  # tokens of an answer; -1, or more than fit: as many as fit


class Part(BaseModel):
    type: Literal["text", "refusal", "python", "python_output"]
    text: Text = ""
    refusal: Text = ""

    @model_validator(mode="after")
    def has_its_text(self) -> "Part":
        if ("refusal" if self.type == "refusal" else "text") not in self.model_fields_set:
            raise ValueError(f"a part of type {self.type!r} has no text")
        return self


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    refusal: Text | None = None

    def plain(self, where: str) -> str | list[dict[str, Any]] | None:
        """The content: text, or an assistant's parts where a tool was used; None for an assistant's that has none.

        Raises ApiError where there must be text.
        """
        if isinstance(self.content, list):
            if all(part.type in ("text", "refusal") for part in self.content):
                return "".join(part.text or part.refusal for part in self.content)
            if self.role == "assistant":
                return [dict(type=part.type, text=part.text or part.refusal) for part in self.content]
            raise ApiError(400, f"{where}.content: only the assistant calls a tool", param=f"{where}.content")
        if self.content is None and self.role != "assistant":
            raise ApiError(400, f"{where}.content: wanted text", param=f"{where}.content")
        return self.content or self.refusal or None if self.role == "assistant" else self.content


class Options(BaseModel):
    include_usage: bool = False


class Settings(BaseModel):
    """What chat completions and plain ones have in common."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: Annotated[str, StringConstraints(max_length=200)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000, description="candidates to draw from; 0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    n: int | None = Field(None, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="of the draw; -1: another one each time")
    stream: bool | None = None
    stream_options: Options | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None
    best_of: int | None = Field(None, ge=1)
    ignore_eos: bool | None = Field(None, description="go on to max_tokens whatever the model says")

    def stops(self) -> list[str]:
        return [self.stop] if self.stop and isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, temperature: float, top_k: int, seed: int, logprobs: int | None) -> Sampling:
        """The request's, with what it leaves open."""
        k = top_k if self.top_k is None else self.top_k
        return Sampling(
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=k if k > 0 else None,
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
        if isinstance(self.stop, list) and "" in self.stop:
            raise ApiError(400, "stop: an empty string would stop every answer at once", param="stop")
        if (self.best_of or 1) > (self.n or 1):
            raise ApiError(400, "best_of is not supported; use n", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream: true", param="stream_options")


def few_parts(messages: Any) -> Any:
    """What a client sent as messages, before it is checked. Raises for too many parts."""
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    count = sum(len(content) for content in contents if isinstance(content, list))
    if count > PARTS:
        raise PydanticCustomError(
            "too_long", "{count} parts in all, wanted at most {most}", dict(count=count, most=PARTS)
        )
    return messages


class ChatRequest(Settings):
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=2000, fail_fast=True), BeforeValidator(few_parts)
    ]  # fmt: skip
    max_tokens: Longest | None = None
    max_completion_tokens: Longest | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: drop the oldest turns when the context is full"
    )
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        for name, choice in (("tools", self.tool_choice), ("functions", self.function_call)):
            if getattr(self, name) and choice != "none":
                raise ApiError(400, f"{name} are not supported: the model calls its own calculator", param=name)
        if 0 in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "max_tokens is 0, wanted at least 1 (or -1: as many as fit)", param="max_tokens")
        if self.response_format and self.response_format.get("type") not in (None, "text"):
            raise ApiError(400, "response_format is not supported but for text", param="response_format")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs: true", param="top_logprobs")


class CompletionRequest(Settings):
    prompt: Text | Ids | Annotated[list[Text | Ids], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Longest | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: Text | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each a text or ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise ApiError(400, "suffix is not supported", param="suffix")


class TokenizeRequest(BaseModel):
    """As vLLM's, which lm-evaluation-harness knows."""

    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class OldMessage(BaseModel):
    role: Literal["user", "assistant"]
    content: Annotated[str, StringConstraints(min_length=1, max_length=8000)]


class OldRequest(BaseModel):
    """nanochat's own endpoint, with its limits."""

    model_config = ConfigDict(allow_inf_nan=False)

    messages: Annotated[list[OldMessage], Field(min_length=1, max_length=500, fail_fast=True)]
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=200)
    max_tokens: int | None = Field(None, ge=1, le=4096)


def problem(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, in a sentence; where it may be of several kinds, what is wrong
    deepest, and rather with something of the right kind.
    """
    found = []
    for one in error.errors(include_url=False, include_context=False):
        kept = [str(part) for part in one["loc"] if not str(part).startswith(("list[", "constrained-"))]
        found.append((kept, not one["type"].endswith("_type"), one["msg"][:300]))
    within = [each for each in found if each[0][: len(found[0][0])] == found[0][0]]
    kept, _, words = max(within, key=lambda item: (len(item[0]), item[1]))
    where = ".".join(kept)
    return ApiError(400, f"{where or 'the body'}: {words}", param=where or None)
