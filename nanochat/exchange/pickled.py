"""nanochat's tokenizer.pkl, read without running anything: only what such a file needs is let through.

A pickle is a program. Of all that it could call, this allows one name, tiktoken's Encoding, and gives it a stand-in
that keeps what it is handed. Used by scripts/import_model.py alone.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

LARGEST = 1 << 26  # bytes; 100,000 tokens take 2 MB


class StandIn:
    """In place of tiktoken.Encoding: its state, not looked at."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Forbidden(Exception):
    """What a pickle asked for."""


class OnlyEncoding(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return StandIn
        raise Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise Forbidden("a persistent object")


def read(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.pkl. Raises UserError for anything that is not just that."""
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, which is too large for a tokenizer")
    try:
        found = OnlyEncoding(io.BytesIO(path.read_bytes())).load()
    except Forbidden as asked:
        raise UserError(
            f"{path} asks for {asked} when it is loaded, which no tokenizer needs; nothing was run: do not use it"
        ) from None
    except Exception as problem:  # a damaged pickle raises what it likes
        raise UserError(f"{path} is no readable pickle ({type(problem).__name__}); fetch it again") from None
    state: Any = found.state if isinstance(found, StandIn) else None
    if isinstance(state, str):
        raise UserError(
            f"{path} is tiktoken's own tokenizer {state[:40]!r}; only tokenizers of nanochat's are known here"
        )
    try:
        if state["pat_str"] != SPLIT_PATTERN:
            raise UserError(f"{path} splits text by another pattern than nanochat's, so its ids would not be ours")
        ranks = state["mergeable_ranks"]
        merges = sorted(ranks, key=ranks.__getitem__)
        if [ranks[token] for token in merges] != list(range(len(merges))):
            raise ValueError("its ranks have gaps")
        if not all(isinstance(token, bytes) for token in merges) or not {bytes([i]) for i in range(256)} <= set(merges):
            raise ValueError("not every byte is a token")
        wanted = {name: len(merges) + i for i, name in enumerate(SPECIAL_TOKENS)}
        if state["special_tokens"] != wanted:
            raise UserError(
                f"{path} has other special tokens than nanochat's {', '.join(SPECIAL_TOKENS)}, in this order"
            )
    except (TypeError, AttributeError, LookupError, ValueError) as problem:
        raise UserError(f"{path} holds no tokenizer of nanochat's ({problem}); fetch it again") from None
    return Tokenizer(merges)
