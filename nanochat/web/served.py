"""What a server serves, and with which settings where a request leaves them open."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import chat
from nanochat.calculator import calculate
from nanochat.tokenizer import Tokenizer
from nanochat.web.schema import ApiError
from nanochat.web.worker import Pool


@dataclass(frozen=True)
class Served:
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
