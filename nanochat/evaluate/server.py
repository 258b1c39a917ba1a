"""A model behind an OpenAI-compatible server (ours, vLLM, llama.cpp, OpenAI's own) as one who writes answers.

Only the standard library: a POST to /chat/completions an answer, several at a time. What is worth another try (the
server is busy, away, or broken for a moment) is tried again, waiting twice as long each time or as long as it asks for.
The key is sent to the server's own address only, and never printed.
"""

import http.client
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from nanochat.engine import Sampling
from nanochat.errors import UserError, is_number
from nanochat.evaluate.generative import Tick, Written
from nanochat.files import json_of

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
PATIENCE = 120.0  # seconds for one answer
AGAIN = (408, 409, 425, 429)  # statuses, beside 500 and above, that another try may change


@dataclass(frozen=True)
class Server:
    """url: as OpenAI's clients take it, http://host:8000/v1; without a path, /v1 is added. at_once: requests under way.

    Raises UserError for a URL that is none, and for a key that cannot be sent.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    at_once: int = 16

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of brackets, or a port, that are none
            right = False
        if not right:
            raise UserError(f"--server is {self.url!r}, wanted an address like http://127.0.0.1:8000/v1")
        object.__setattr__(self, "key", self.key.strip())  # a file with Windows' line ends leaves one
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(
                "the server's key has a character that no header can have (a line end, a typographic quote?); set the "
                "variable that --api-key-env names again"
            )
        object.__setattr__(self, "url", self.url.rstrip("/") + ("" if parts.path.strip("/") else "/v1"))

    def check(self) -> None:
        """Raises UserError where nothing answers, the key is not taken, or the model is not among those listed."""
        try:
            listed = self._call("/models", None)
        except urllib.error.HTTPError as refusal:
            if refusal.code in (401, 403):
                raise UserError(f"{self.url} does not take the key ({refusal.code}); --api-key-env names it") from None
            return  # it lives, and lists nothing
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise UserError(f"nothing that speaks OpenAI's API answers at {self.url}: {reason(problem)}") from None
        data = listed.get("data") if isinstance(listed, dict) else None
        names = [str(one.get("id")) for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        if names and self.model not in names:
            raise UserError(f"{self.url} has no model {self.model!r}; it lists {', '.join(names[:20])}")

    def answer(
        self, conversations: Sequence[list[dict]], limit: int, samplings: Sequence[Sampling], tick: Tick
    ) -> list[Written]:
        """All answers. Raises UserError for what the server refuses, or fails at to the last try."""
        pool = ThreadPoolExecutor(self.at_once)
        try:
            under_way = [pool.submit(self.one, one, limit, own) for one, own in zip(conversations, samplings)]
            for done in as_completed(under_way):
                done.result()
                tick(1)
            return [done.result() for done in under_way]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def one(self, conversation: list[dict], limit: int, sampling: Sampling) -> Written:
        messages = [dict(role=one["role"], content=text_of(one["content"])) for one in conversation]
        body = dict(model=self.model, messages=messages, max_tokens=limit, temperature=sampling.temperature)
        if sampling.temperature:
            body["seed"] = sampling.seed
        for turn in range(TRIES):
            try:
                return written(self._call("/chat/completions", body)["choices"][0]["message"])
            except urllib.error.HTTPError as refusal:
                said = body_of(refusal)
                if "context_length" in said and refusal.code == 400:
                    return Written("", [], cropped=True)
                problem, wait = f"{refusal.code} {error_text(said)}", refusal.headers.get("retry-after", "")
                if refusal.code not in AGAIN and refusal.code < 500:
                    raise UserError(f"{self.url} refuses a question: {problem}") from None
            except (OSError, http.client.HTTPException) as lost:
                problem, wait = reason(lost), ""
            except (ValueError, LookupError, TypeError, AttributeError):
                problem, wait = "its answer is no chat completion", ""
            if turn + 1 < TRIES:
                time.sleep(pause(turn, wait))
        raise UserError(f"{self.url} has not answered a question in {TRIES} tries: {problem}")

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"content-type": "application/json"})
        if self.key:
            request.add_unredirected_header("authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json_of(response.read())


def pause(turn: int, asked_for: str) -> float:
    """Seconds until the next try: as long as the server asks for, else twice the last, not all clients at once."""
    if is_number(asked_for.strip()):
        return min(LONGEST_WAIT, float(asked_for))
    return min(LONGEST_WAIT, FIRST_WAIT * 2**turn) * random.uniform(0.5, 1.0)


def written(message: dict[str, Any]) -> Written:
    """An answer's text, and the calls that our server tells. Raises ValueError and the like where there is none."""
    content, events = message["content"], message.get("events") or []
    calls = [one["text"] for one in events if one["type"] == "python"]
    if not isinstance(content, str | list | None) or not all(isinstance(call, str) for call in calls):
        raise ValueError(f"content is {type(content).__name__}")
    return Written(text_of(content or ""), calls)


def body_of(refusal: urllib.error.HTTPError) -> str:
    """Its beginning, "" where it breaks off: what counts is the status."""
    try:
        return refusal.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def text_of(content: str | list[dict]) -> str:
    """A message's text; of parts, what a person reads."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def error_text(said: str) -> str:
    """What an error's body says, short."""
    try:
        error = json_of(said)["error"]
        said = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(str(said).split())[:200]


def reason(problem: Exception) -> str:
    return str(getattr(problem, "reason", "") or problem or type(problem).__name__)
