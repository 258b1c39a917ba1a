"""Notes that agree with their tables. A claim is a Markdown link to the table, whose title names the finding:

    Without QK norm the loss is [0.021 (0.015 to 0.027)](table.csv "QK norm") bits per byte higher.

The text in brackets must be what the table's findings say under that name, to the letter.
"""

import re
from collections.abc import Mapping
from pathlib import Path

CLAIM = re.compile(r"\[([^\]]*)\]\(([^)\s]*table\.csv)\s+\"([^\"]+)\"\)")


def wrong(note: Path, known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Sentences about what a note claims and `known` does not. known: {table as linked: {name: text}}."""
    if not note.exists():
        return []
    said = []
    for text, table, name in CLAIM.findall(note.read_text("utf-8").replace("\n", " ")):
        there = known.get(table, {}).get(name)
        if there is None:
            said.append(f"{table} has nothing called {name!r}")
        elif there != text:
            said.append(f"{name!r} is {text!r} in the note and {there!r} in {table}")
    return said
