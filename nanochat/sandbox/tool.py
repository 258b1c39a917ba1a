"""The Python tool of the chat: what the model writes as a call runs in the sandbox, in the place of the calculator.

`chosen` is what a script asks. Calls run in threads, each with a child, so the engine goes on with other requests.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from nanochat.calculator import calculate
from nanochat.chat import Tool
from nanochat.errors import UserError
from nanochat.sandbox.parent import require, run

HELP = (
    "run the model's Python in a sandbox, instead of the calculator: 3 seconds, no files, network or processes; needs "
    "Linux with Landlock and seccomp (--allow-unsandboxed)"
)
HELP_UNSANDBOXED = "with --python-tool, where the system cannot isolate it: run it all the same, with your rights"
SECONDS = 3.0
AT_A_TIME = 4
LONGEST_WAIT = 10.0  # seconds for a turn, when many calls come at once
LONGEST = 400  # characters of an answer: it takes room in the model's context


class PythonTool:
    """Answers a call, later, with what it printed and the value of its last line, or with what went wrong."""

    def __init__(self, unsandboxed: bool = False):
        """Tries it once. Raises UserError where code cannot be isolated, unless `unsandboxed`."""
        self.isolation, self.unsandboxed = require(unsandboxed), unsandboxed
        run("", SECONDS, unsandboxed)
        self._threads = ThreadPoolExecutor(AT_A_TIME, "python-tool")

    def __call__(self, code: str) -> Future[str | None]:
        return self._threads.submit(self._answer, code, time.monotonic())

    def _answer(self, code: str, asked: float) -> str | None:
        if time.monotonic() - asked > LONGEST_WAIT:
            return "error: too many calls"
        try:
            result = run(code, SECONDS, self.unsandboxed)
        except (UserError, OSError):  # no process to be had, say: the answer goes on without one, as the calculator's
            return None
        said = "\n".join(part for part in (result.stdout.strip("\n"), result.value) if part)
        if result.problem:
            said = f"{said[: LONGEST // 2]}\nerror: {result.problem}".strip()
        return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


class Chosen(Protocol):
    """The flags of a script that has the tool."""

    python_tool: bool
    allow_unsandboxed: bool


def chosen(flags: Chosen) -> Tool:
    """The calculator, or the Python tool, which is announced. Raises UserError where code cannot be isolated."""
    if not flags.python_tool:
        return calculate
    tool = PythonTool(flags.allow_unsandboxed)
    print(f"The model's Python runs with: {tool.isolation}.", flush=True)
    return tool
