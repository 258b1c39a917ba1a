"""Scripts that are killed: at their so-manieth file operation, or after some time.

`python tests/killed.py` imports everything and forks for each trial, which so begins in milliseconds. It has run no
backward itself, whose threads a fork would lose.
"""

import builtins
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
WRAPPED = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "fsync", "open", "scandir", "listdir")


def at_operation(number: int, folder: str) -> None:
    """This process dies of SIGKILL at its so-manieth file operation under `folder`: each counts before and after it."""
    from nanochat import checkpoint

    left = [number]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def ours(args: tuple, more: dict) -> bool:
        path = f"/proc/self/fd/{args[0]}" if isinstance(args[0], int) else args[0]
        return "dir_fd" in more or os.path.realpath(path).startswith(folder)

    def wrap(owner, name):
        plain = getattr(owner, name)

        def wrapped(*args, **more):
            if not args or not ours(args, more):
                return plain(*args, **more)
            count()
            result = plain(*args, **more)
            count()
            return result

        setattr(owner, name, wrapped)

    for name in WRAPPED:
        wrap(os, name)
    wrap(builtins, "open")
    wrap(checkpoint, "write_tensors")


def serve() -> None:
    """For each line of stdin (script, argv, env, operation or seconds): runs the script in a fork, and answers how it
    ended and what it said.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny
    import torch

    from nanochat import chat_stages, stages  # noqa: F401
    from profiling.recorded import record  # noqa: F401
    from scripts import base_train, chat_rl, chat_sft, mid_train  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        trial = json.loads(line)
        child = os.fork()
        if not child:
            os.environ.update(trial["env"])
            said = os.open(trial["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1), os.dup2(said, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.stdin = open(os.devnull)  # not the one that is read here
            if trial["operation"]:
                at_operation(trial["operation"], trial["folder"])
            code = 1
            try:
                code = tiny.call(trial["script"], *trial["argv"])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        end = time.monotonic() + (trial["seconds"] or 600)
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


class Scripts:
    """Runs scripts by `serve`, in the environment of now."""

    def __init__(self, place: Path):
        self.said = place / "said"
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )  # fmt: skip

    def ready(self) -> None:
        """Waits for the imports, which is no part of any trial."""
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def run(self, script: str, *argv: str, operation: int = 0, seconds: float = 0.0, folder: str = "") -> int:
        """The exit code, negative for a signal. operation, folder: see `at_operation`; seconds: until it is killed."""
        trial = dict(
            script=script, argv=argv, env=dict(os.environ), said=str(self.said), operation=operation, seconds=seconds,
            folder=os.path.realpath(folder),
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


if __name__ == "__main__":
    serve()
