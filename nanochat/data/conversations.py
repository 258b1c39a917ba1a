"""Your own conversations for mid-training and SFT: JSONL, one conversation a line.

A line is a list of messages or {"messages": [...]}. All lines are checked before training begins; the first malformed
one is named by file and line. Splits as for documents: files named val…, or the first of every 50 held out.
"""

from pathlib import Path
from typing import Any

from nanochat.data.documents import HELD_OUT, LINES_PER_UNIT, blocks, json_lines
from nanochat.data.folder import check_content, find_files, fingerprint, validates
from nanochat.data.source import unmarked
from nanochat.errors import UserError
from nanochat.tokenizer import check_conversation

UNIT = 128  # conversations


class ConversationFiles:
    """Conversations from JSONL files, held in memory. Raises UserError naming file and line of a malformed one."""

    def __init__(self, path: Path):
        self.name = str(path)
        files = find_files(path, (".jsonl",))
        self.fingerprint = fingerprint(files)
        val = {f for f in files if validates(f, path)}
        rows = {f: load(f) for f in files}
        train_rows = [row for f in files if f not in val for row in rows[f]]
        if val:
            self._rows = {"train": train_rows, "val": [row for f in files if f in val for row in rows[f]]}
        else:
            kept = [row for i, row in enumerate(train_rows) if i % HELD_OUT]
            self._rows = {"train": kept, "val": train_rows[::HELD_OUT]}
        if not self._rows["train"]:
            raise UserError(f"{path} has no conversation to train on; at least two are needed, one to validate on")

    def units(self, split: str) -> int:
        return -(-len(self._rows[split]) // UNIT)

    def load(self, split: str, unit: int) -> list[dict]:
        return self._rows[split][unit * UNIT : (unit + 1) * UNIT]


def load(path: Path) -> list[dict]:
    """The conversations of a JSONL file. Raises UserError naming file and line of a malformed one."""
    check_content(path)
    conversations = []
    for _, block, line in blocks(path, LINES_PER_UNIT):
        for number, row in json_lines(path, block, line, "messages"):
            try:
                conversations.append(dict(messages=[_unmarked(message) for message in check_conversation(row)]))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not conversations:
        raise UserError(f"{path} is empty")
    return conversations


def _unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """The message without byte-order marks before its text."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message, content=unmarked(content))
    return dict(message, content=[dict(part, text=unmarked(part["text"])) for part in content])
