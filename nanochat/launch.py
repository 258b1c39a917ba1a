"""Starts a script once for every GPU of this machine, and ends as its ranks ended.

That is what torchrun does on one machine, and ranks get torchrun's environment variables. But told to stop, torchrun
exits 1 with a traceback although its ranks have saved and exited 75, and told twice it tells them twice, which kills a
rank that is writing. On several machines torchrun itself starts the same scripts. Where this process is killed, its
ranks are told to stop (nanochat/processes.py).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch.distributed as dist

from nanochat.errors import EXIT_AFTER, EXIT_INTERRUPTED, EXIT_USAGE
from nanochat.processes import LAUNCHER

TO_SAVE = 600.0  # seconds that ranks have to finish a step and write a checkpoint once they are told to stop
TO_GIVE_UP = 30.0  # and to end when another rank has failed, for which they may be waiting
ONE_PRESS = 3.0  # signals that follow the first so closely are the same wish: of the terminal, the shell, a scheduler
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def launch(module: str, args: Sequence[str], ranks: int) -> int:
    """Runs `python -m module args` as so many ranks; returns the exit code for all of them.

    0: all are done. 75: they were told to stop and have saved. 2: wrong use, which the rank has explained. 1: the first
    rank that failed otherwise is named on stderr, and the others are ended. SIGINT, SIGTERM and SIGHUP are handed on
    once, as SIGINT; given again after some seconds they are handed on again, which stops ranks where they are.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here: no port to agree on, no race
    shared = dict(
        os.environ,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        **{LAUNCHER: str(os.getpid())},
    )
    shared.setdefault("OMP_NUM_THREADS", "1")
    signals: list[float] = []
    before = {number: signal.signal(number, lambda *_: signals.append(time.monotonic())) for number in stop_signals()}
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            own = dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            command = [sys.executable, "-m", module, *args]
            # In a session of its own a rank does not get the terminal's Ctrl-C, but ours, once.
            processes.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True))
        return watch(processes, signals)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> list[signal.Signals]:
    """The signals that tell a process to end; not SIGHUP where it is ignored, as under nohup."""
    hung_up = getattr(signal, "SIGHUP", None)
    return [s for s in SIGNALS if s != hung_up or signal.getsignal(s) is not signal.SIG_IGN]


def watch(processes: Sequence[subprocess.Popen], signals: list[float]) -> int:
    """Waits until all ranks have ended, handing on `signals` (times at which they came); returns the exit code."""
    passed_on: list[float] = []
    failed: int | None = None  # the first rank that ended badly
    late: set[int] = set()  # ranks that had to be killed
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        while signals:
            if not passed_on or signals[0] - passed_on[0] > ONE_PRESS:
                passed_on.append(signals[0])
                send_signal(processes, signal.SIGINT)
                deadline = min(deadline, now + TO_SAVE)
            signals.pop(0)
        codes = [process.poll() for process in processes]
        # One has saved or had nothing to save: the others save nothing any more either. Or one has failed and says so.
        if EXIT_INTERRUPTED in codes or EXIT_AFTER in codes:
            deadline = min(deadline, now + TO_GIVE_UP)
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if bad(code, bool(passed_on))), None)
            if failed is not None:
                send_signal(processes, signal.SIGTERM)
                deadline = min(deadline, now + TO_GIVE_UP)
        if now > deadline:
            late.update(rank for rank, code in enumerate(codes) if code is None)
            send_signal(processes, signal.SIGKILL)
        time.sleep(0.1)
    ended = [process.wait() for process in processes]
    if failed is None:
        waiting = late if EXIT_INTERRUPTED in ended else set()  # in a collective, for a rank that was interrupted
        failed = next((r for r, code in enumerate(ended) if bad(code, bool(passed_on)) and r not in waiting), None)
    if failed is None:
        return 1 if EXIT_AFTER in ended else EXIT_INTERRUPTED if any(ended) else 0
    if ended[failed] == EXIT_USAGE:
        return EXIT_USAGE
    how = f"with code {ended[failed]}" if ended[failed] > 0 else f"by {signal.Signals(-ended[failed]).name}"
    if failed in late:
        how = f"by SIGKILL, {TO_SAVE:.0f} s after it was told to stop"
    print(f"error: rank {failed} of {len(processes)} ended {how}; its own words are above", file=sys.stderr)
    return 1


def bad(code: int | None, stopped: bool) -> bool:
    """Whether a rank ended otherwise than it should; one that was told to stop may also die of the signal itself."""
    return code not in (None, 0, EXIT_INTERRUPTED, EXIT_AFTER) and not (stopped and code == -signal.SIGINT)


def send_signal(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
