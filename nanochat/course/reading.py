"""Where the code is that a chapter of LEARN.md wants read: its links name functions, as lines would be out of date."""

import ast
import re
from pathlib import Path

from nanochat.errors import UserError

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[(`?)([^\]]+)\1\]\(([^)#]+\.py)\)")


def places(path: Path) -> dict[str, tuple[int, int]]:
    """First and last line of what a Python file defines: functions, classes, constants, and Class.member."""
    found: dict[str, tuple[int, int]] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        targets = [*getattr(node, "targets", []), *([node.target] if isinstance(node, ast.AnnAssign) else [])]
        named = [(target.id, node) for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named.append((node.name, node))
        if isinstance(node, ast.ClassDef):
            named += [(f"{node.name}.{of.name}", of) for of in node.body if isinstance(of, ast.FunctionDef)]
        found |= {name: (there.lineno, there.end_lineno or there.lineno) for name, there in named}
    return found


def readings(chapter: int) -> list[str]:
    """A line for each link to code from a chapter's "Read" on to its exercise: file:line, the name, how many lines.

    Raises UserError where there is no LEARN.md: in an installation without a clone.
    """
    page = ROOT / "LEARN.md"
    if not page.exists():
        raise UserError(f"{page} is not there: call this in a clone of the repository")
    section = re.split(r"^## \d+\. ", page.read_text("utf-8"), flags=re.M)[chapter]
    lines = []
    for code, name, target in LINK.findall(section[section.index("**Read.**") : section.index("**Next.**")]):
        if not code:
            lines.append(target)
            continue
        first, last = places(ROOT / target)[name]
        size = "1 line" if first == last else f"{last - first + 1} lines"
        lines.append(f"{target}:{first}  {name}, {size}")
    return lines
