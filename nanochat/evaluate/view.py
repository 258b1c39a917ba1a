"""Pages through failing examples in the terminal; where nobody types, prints them all."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.chat import obeyed
from nanochat.errors import is_number

HELP = "Enter or n: next, p: previous, a number: that one, t NAME: only this task (t: all), q: quit"


def shown(row: dict[str, Any], at: int, count: int, width: int = 100) -> str:
    """One failing example."""
    title = f"── {at + 1} of {count} · {row.get('task', '')} · {row.get('id', '')} · {row.get('outcome', '')} "
    lines = [title + "─" * max(0, width - len(title))]
    for name in ("question", "expected", "answer"):
        lines.append(f"{name}:")
        lines += _wrapped(str(row.get(name) or "(nothing)"), width)
    if row.get("python"):
        lines.append("tool calls:")
        lines += [line for call in row["python"] for line in _wrapped(str(call), width)]
    if row.get("probabilities"):
        lines.append("  ".join(f"{letter} {p:.1%}" for letter, p in zip(row["letters"], row["probabilities"])))
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Indented, lines kept; control characters, which a terminal would obey, are shown as a dot."""
    plain = "".join("·" if obeyed(c) else c for c in text.replace("\t", "    "))
    wrap = textwrap.TextWrapper(width - 2, drop_whitespace=False, break_long_words=True)
    return ["  " + part for line in plain.split("\n") for part in (wrap.wrap(line) or [""])]


def page(
    rows: Sequence[dict[str, Any]],
    ask: Callable[[str], str] | None,
    out: Callable[[str], Any] = print,
    width: int = 100,
) -> None:
    """ask: as `input`, or None to print all. Ends at "q", at the end of the input, or by Ctrl-C."""
    if not rows:
        out("no failing examples")
        return
    if ask is None:
        for at, row in enumerate(rows):
            out(shown(row, at, len(rows), width))
        return
    chosen, at = list(rows), 0
    out(HELP)
    out(shown(chosen[at], at, len(chosen), width))
    while True:
        try:
            word, _, rest = ask("> ").strip().partition(" ")
        except (EOFError, KeyboardInterrupt):
            return
        before = at, chosen
        if word in ("q", "quit"):
            return
        if word in ("", "n"):
            at += 1
        elif word == "p":
            at -= 1
        elif is_number(word):
            at = int(word) - 1
        elif word == "t":
            name = rest.strip()
            chosen, at = [row for row in rows if not name or row.get("task") == name], 0
        else:
            out(HELP)
            continue
        if 0 <= at < len(chosen):
            out(shown(chosen[at], at, len(chosen), width))
            continue
        if not chosen:
            names = ", ".join(dict.fromkeys(str(row.get("task")) for row in rows))
            out(f"no failing examples of {rest.strip()!r}; the tasks are {names}")
        else:
            out(f"there are {len(chosen)}; {HELP}")
        at, chosen = before
