"""From a body to what is asked, and to the prompts' ids. All of it takes as long as the body is long, so it runs in
threads (`aside`): the event loop never waits. No step may take much longer than the body is long, and no single call
of C much of a second, as it lets no other thread run: schema.py bounds what is checked.
"""

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError

from nanochat import chat
from nanochat.files import encodable, json_of
from nanochat.web.conversation import conversation
from nanochat.web.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    OldRequest,
    TokenizeRequest,
    problem,
)
from nanochat.web.served import Served

LONG = 64 << 10  # bytes of a body that takes some milliseconds
LONG_ONES = ThreadPoolExecutor(1, "long body")  # in turn: the event loop waits 5 ms for each thread that computes


async def aside(request: Request, work: Callable[..., Any], *args: Any) -> Any:
    """work(*args) in a thread, where a long body holds up no short one."""
    threads = LONG_ONES if len(await request.body()) > LONG else None
    return await asyncio.get_running_loop().run_in_executor(threads, partial(work, *args))


async def body(request: Request) -> Any:
    """What the body says. Raises ApiError when it is no JSON."""
    try:
        return await aside(request, parsed, await request.body())
    except ValueError:
        raise ApiError(400, "the body is no valid JSON") from None


def parsed(text: bytes) -> Any:
    """json_of, without looking for garbage: Python 3.11 does so within, at 600,000 lists for two seconds in all."""
    gc.disable()
    try:
        return json_of(text)
    finally:
        gc.enable()


def validated(content: Any, form: type[BaseModel]) -> Any:
    """A body as a `form`. Raises ApiError when it does not fit."""
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise problem(error) from None


# ---- each kind of request: what was asked, how many tokens an answer may have, the prompts. All raise ApiError.


def chat_asked(served: Served, content: Any) -> tuple[ChatRequest, int, list[int]]:
    asked: ChatRequest = validated(content, ChatRequest)
    served.known(asked.model)
    asked.check()
    limit = longest(served, asked.max_completion_tokens or asked.max_tokens, served.max_tokens)
    return asked, limit, chat_prompt(served, asked, limit)


def text_asked(served: Served, content: Any) -> tuple[CompletionRequest, int, list[tuple[list[int], str, list[int]]]]:
    asked: CompletionRequest = validated(content, CompletionRequest)
    served.known(asked.model)
    asked.check()
    few_enough(served, (asked.n or 1) * len(asked.prompts()))
    limit = longest(served, asked.max_tokens, 16)
    return asked, limit, text_prompts(served, asked, limit)


def old_asked(served: Served, content: Any) -> tuple[OldRequest, int, list[int]]:
    asked: OldRequest = validated(content, OldRequest)
    total = sum(len(message.content) for message in asked.messages)
    if total > 32_000:
        raise ApiError(400, f"messages: {total} characters in all, wanted at most 32,000", param="messages")
    messages = conversation([Message(role=message.role, content=message.content) for message in asked.messages])
    limit = asked.max_tokens or served.max_tokens
    return asked, limit, chat.prompt_within(served.tokenizer, messages, limit, served.context)


def longest(served: Served, asked: int | None, usual: int) -> int:
    """Tokens of an answer; what does not fit is not made. −1: as many as fit."""
    return served.context if asked == -1 else usual if asked is None else asked


def few_enough(served: Served, answers: int) -> None:
    if answers > served.pool.most:
        raise ApiError(400, f"these are {answers} answers, wanted at most {served.pool.most} at a time")


def chat_prompt(served: Served, asked: ChatRequest, limit: int) -> list[int]:
    messages = conversation(asked.messages)
    try:
        if asked.truncation == "auto":
            return chat.prompt_within(served.tokenizer, messages, limit, served.context)
        prompt = served.tokenizer.render_for_completion(messages)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    check_length(served, prompt, limit, "messages")
    return prompt


def text_prompts(served: Served, asked: CompletionRequest, limit: int) -> list[tuple[list[int], str, list[int]]]:
    """Of each prompt what the model reads, and what is repeated: its text and its ids. A text begins with <|bos|>, as
    every document does; ids are taken as they are.
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
        check_length(served, found[-1][0], limit, "prompt")
    return found


def check_length(served: Served, prompt: list[int], limit: int, param: str) -> None:
    """limit: 0 where no answer is asked for, which needs no room."""
    if len(prompt) >= served.context + (limit == 0):
        which = "is more than" if limit == 0 else "leaves no room for an answer in"
        raise ApiError(
            400, f"the prompt has {len(prompt)} tokens, which {which} the model's context of {served.context}",
            param=param, code="context_length_exceeded",
        )  # fmt: skip


# ---- the tokenizer, as vLLM serves it


def tokenized(served: Served, content: Any) -> Response:
    """A special token's name alone is that token; within a text it is letters, as everywhere."""
    asked: TokenizeRequest = validated(content, TokenizeRequest)
    tokenizer, special = served.tokenizer, served.tokenizer.special.get(asked.prompt)
    ids = [special] if special is not None else tokenizer.encode(asked.prompt)
    if asked.add_special_tokens and special is None:
        ids = [tokenizer.bos, *ids]
    return JSONResponse(dict(tokens=ids, count=len(ids), max_model_len=served.context))


def detokenized(served: Served, content: Any) -> Response:
    asked: DetokenizeRequest = validated(content, DetokenizeRequest)
    if max(asked.tokens, default=0) >= served.tokenizer.vocab_size:
        raise ApiError(400, f"tokens: {max(asked.tokens)} is not below {served.tokenizer.vocab_size}")
    return JSONResponse(dict(prompt=served.tokenizer.decode(asked.tokens)))
