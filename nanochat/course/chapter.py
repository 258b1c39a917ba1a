"""What a chapter is, and how answers are read: numbers as expressions, code as a Python file."""

import ast
import json
import math
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Chapter:
    """picture() is a table or a drawing as text. check(answer) is "" when the answer is right, else a hint.

    check raises UserError for what cannot be read as an answer at all.
    """

    title: str
    question: str
    picture: Callable[[], str]
    check: Callable[[str], str]


class _FloatPowers(ast.NodeTransformer):
    """Powers by math.pow, which says at once that 9**9**9 is too large; of integers Python would compute for years."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        return ast.Call(ast.Name("pow", ast.Load()), [node.left, node.right], [])


def number(answer: str) -> float:
    """The value of an expression, with Python's `math` at hand: "12 * 512**2", "log(32768)", "27_000", "27,000".

    It is the reader's own command line, so Python may read it. Raises UserError for what has no value.
    """
    text = answer.strip().rstrip("%")
    if not any(letter.isalpha() for letter in text):
        text = text.replace(",", "")
    known = {
        "__builtins__": {},
        "round": round,
        "sum": sum,
        "range": lambda *ends: range(*map(int, ends)),
        **vars(math),
    }
    try:
        tree = ast.fix_missing_locations(_FloatPowers().visit(ast.parse(text, mode="eval")))
        value = float(eval(compile(tree, "answer", "eval"), known))
    except Exception as problem:
        raise UserError(f"{answer!r} is not a number, nor an expression of numbers ({problem})") from None
    if not math.isfinite(value):
        raise UserError(f"{answer!r} is {value}, wanted a finite number")
    return value


def near(value: float, right: float, relative: float = 5e-3) -> bool:
    """Whether a rounded answer is the right one: within half a percent where nothing else is said."""
    return math.isclose(value, right, rel_tol=relative)


def function(answer: str, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file. Raises UserError where there is none, or the file does not run."""
    path = Path(answer.strip()).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no file {path}; the answer is the path of a Python file that defines {name}")
    try:
        found = runpy.run_path(str(path)).get(name)
    except (Exception, SystemExit) as problem:
        raise UserError(f"{path} does not run: {_where(problem, path)}") from None
    if not callable(found):
        raise UserError(f"{path} defines no function {name}")
    return found


def attempt(call: Callable[[], Any], path: str) -> str:
    """Runs the reader's function; "" where it ran, else what it raised and in which line."""
    try:
        call()
    except (Exception, SystemExit) as problem:
        return f"It fails: {_where(problem, Path(path.strip()).expanduser())}."
    return ""


def _where(problem: BaseException, path: Path) -> str:
    """The exception, and the last line of the file that it passed through."""
    line, at = getattr(problem, "lineno", None), problem.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == str(path):
            line = at.tb_lineno
        at = at.tb_next
    first = (str(problem).splitlines() or [""])[0]
    return ": ".join(filter(None, (type(problem).__name__, first))) + (f", line {line}" if line else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line: the first one begins at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    pad = lambda cells: "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths)))
    return "\n".join(pad(cells).rstrip() for cells in (head, *rows))


def results(name: str) -> dict[str, Any]:
    """A committed result file of benchmarks/results."""
    return json.loads((RESULTS / name).read_text("utf-8"))
