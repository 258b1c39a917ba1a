"""Grades an answer to a HumanEval problem (Chen et al., 2021, arXiv:2107.03374) by running the problem's tests.

The answer's code and the tests run in two sandboxed processes that exchange plain values (sandbox/exchange.py): the
tests are never where the answer could read, patch or skip them. `check` is the place to start.
"""

import ast
import re
import textwrap
import warnings
from pathlib import Path

from nanochat import sandbox
from nanochat.sandbox import exchange

EXCHANGE = Path(exchange.__file__).read_text("utf-8")
# The tests call helpers of the prompt (encode_cyclic) and once the function itself (sort_third): the reference's.
JUDGE = """
names = dict(__name__="tests")
exec(compile({reference!r}, "<reference>", "exec"), names)
exec(compile({test!r}, "<tests>", "exec"), names)
candidate = Remote({name!r}, READ, WRITE)

def verdict():
    try:
        names["check"](candidate)
    except Failed as failed:
        return str(failed)
    except AssertionError:
        return f"wrong: {{candidate.last}}"
    except Exception as problem:
        return f"wrong: {{candidate.last}} ({{type(problem).__name__}}: {{problem}})"
    return "passed"

verdict()[:1000]
"""
JUDGED = """
names = dict(__name__="candidate")
exec(compile({code!r}, "<answer>", "exec"), names)
if not callable(names.get({name!r})):
    raise NameError("it does not define " + {name!r})
serve(names[{name!r}], READ, WRITE)
"""
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)  # an answer cut short: open
warnings.filterwarnings("ignore", module="<answer>")  # what Python thinks of a model's code

LONGEST = 20_000  # characters of an answer in which code is looked for
MOST_LEFT_OUT = 100  # lines after the code


def check(problem: dict[str, str], completion: str, timeout: float = 5.0, unsandboxed: bool = False) -> str:
    """ "" when an answer passes all tests, else one line that says why not.

    problem: a row with the Hub's columns prompt, test, entry_point, canonical_solution. timeout: seconds for all tests
    together. Raises UserError where code cannot be isolated, unless `unsandboxed`.
    """
    name = problem["entry_point"]
    reference = problem["prompt"] + problem["canonical_solution"]
    judge = EXCHANGE + JUDGE.format(reference=reference, test=problem["test"], name=name)
    judged = EXCHANGE + JUDGED.format(code=program(problem, completion), name=name)
    tests, answer = sandbox.judge(judge, judged, timeout, unsandboxed)
    if tests.outcome != "finished":
        return answer.problem if answer.outcome == "output limit" else tests.problem
    said = ast.literal_eval(tests.value)  # of our own program
    if said == "passed":
        return ""
    if said == "ended":
        return answer.problem or "it ended before the tests did"
    return sandbox.one_line(said)


def program(problem: dict[str, str], answer: str) -> str:
    """The Python program that an answer stands for, with the prompt's imports and helpers.

    The code is the first fenced block that defines the function, or the first at all, or the text itself. It either
    defines the function, or goes on where the prompt ends; a chat's answer may have lost its first indentation. Lines
    after it that are no code are left out.
    """
    prompt, name = problem["prompt"], problem["entry_point"]
    defines = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    blocks = FENCE.findall(answer) or [answer]
    flat = [*blocks, *map(textwrap.dedent, blocks)]
    code = next((block for block in flat if defines.search(block)), blocks[0])
    if defines.search(code):
        before = prompt[: start.start()] if (start := defines.search(prompt)) else ""
        begins = re.search(r"^(?:(?:from|import|def|class)\b|@|[A-Za-z_]\w* *=)", code, re.MULTILINE)
        return _compiling(before, code[begins.start() if begins else 0 :])[1]
    bodies = [code, "    " + code.lstrip(), textwrap.indent(textwrap.dedent(code), "    ")]
    return max((_compiling(prompt, body) for body in bodies), key=lambda found: found[0])[1]


def _compiling(before: str, code: str) -> tuple[int, str]:
    """As many first lines of `code` as make a program with `before`: (how many, that program); (0, all) if none do."""
    lines = code.rstrip().split("\n") if len(code) < LONGEST else []
    for count in range(len(lines), max(0, len(lines) - MOST_LEFT_OUT), -1):
        whole = before + "\n".join(lines[:count]) + "\n"
        try:
            compile(whole, "<answer>", "exec", dont_inherit=True)
            return count, whole
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return 0, before + code
