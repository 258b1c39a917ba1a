"""CustomJSON: conversations of your own, a line each, as a part of a mixture. See nanochat/data/conversations.py."""

from pathlib import Path

from nanochat.data.conversations import load


def conversations(path: Path) -> list[dict]:
    """All conversations of a JSONL file. Raises UserError naming the line of a malformed one."""
    return load(path)
