"""Which line and which module of the model a launch works for: from stack traces, and from Python's frames."""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

Frame = tuple[str, int]  # file, line
MODEL = ("GPT", "Block", "Attention", "MLP")  # classes whose work is shown by their names; others work for these
FILE = re.compile(r".*/(?:nanochat|compiled)/([\w/]+\.py)")  # of the model, ours or plain.py's


def of_model(path: str) -> str:
    """A file's name as it is shown; "" for one that is not the model's or the optimizer's."""
    found = FILE.fullmatch(path)
    return found[1] if found and ("/compiled/" not in path or found[1] == "plain.py") else ""


def frames(trace: str) -> list[Frame]:
    """Those of the model in a stack trace as traceback prints it, outermost first."""
    found = [(path, int(line)) for path, line in re.findall(r'File "([^"]+)", line (\d+)', trace)]
    return [frame for frame in found if of_model(frame[0])]


def innermost(traces: Sequence[str]) -> tuple[str, str]:
    """(line, module) that most traces of a kernel's operators end in."""
    ends = Counter(locate(found) for found in map(frames, traces) if found)
    return ends.most_common(1)[0][0] if ends else ("", "")


def locate(found: Sequence[Frame]) -> tuple[str, str]:
    """("gpt.py:211 › gpt.py:124", "MLP") of frames, outermost first: the last two lines, and the class of MODEL that is
    at work, of GPT with its method; else the function, "" where the file cannot be read.
    """
    line = " › ".join(f"{of_model(path)}:{number}" for path, number in found[-2:])
    names = [qualname(path, number) for path, number in found]
    ours = next((name for name in reversed(names) if name.split(".")[0] in MODEL), "")
    module = ours if ours.startswith("GPT.") else ours.split(".")[0]
    return line, module or names[-1]


def qualname(path: str, line: int) -> str:
    """Of the innermost function that a line is in."""
    within = [(end - start, name) for start, end, name in functions(path) if start <= line <= end]
    return min(within)[1] if within else ""


@cache
def functions(path: str) -> list[tuple[int, int, str]]:
    """(first line, last line, qualified name) of a file's functions."""
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{outer}{child.name}"
                if isinstance(child, ast.FunctionDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, name))
                visit(child, f"{name}.")
            else:
                visit(child, outer)

    if Path(path).exists():
        visit(ast.parse(Path(path).read_text("utf-8")), "")
    return found
