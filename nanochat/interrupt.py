"""SIGINT, SIGTERM and SIGHUP: noted while there is something to save, and otherwise the end within two seconds.

A terminal, a launcher and a scheduler may all hand on one wish, so signals that follow at once count as one; another,
some seconds later, is an end without saving. Such an end is a KeyboardInterrupt. But it may be lost (in a collector's
callback), held up (by whoever waits for a compiler, or for ranks that are gone), or followed by what Python does at its
end (it waits for threads, and they for compilers): so after GRACE seconds the process ends whatever it does, and what
it has started since ends too.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from nanochat import processes
from nanochat.errors import EXIT_INTERRUPTED
from nanochat.launch import ONE_PRESS, stop_signals

GRACE = 1.0
ending: threading.Timer | None = None  # ends the process; a test that lives on cancels it


class Interrupt:
    """Takes these signals until `restore`, or within `with`. to_save: whether an end would lose anything.

    received: whether a signal was noted, so that whoever computes saves and raises KeyboardInterrupt; at_once: whether
    the process ends without that.
    """

    def __init__(self, to_save: Callable[[], bool] = lambda: False) -> None:
        self.received = self.at_once = False
        self._to_save = to_save
        self._when = 0.0
        self._others = processes.descendants(os.getpid())  # they go on
        self._before = {s: signal.signal(s, self._note) for s in stop_signals()}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.at_once or (self.received and now - self._when < ONE_PRESS):
            return
        again, self.received, self._when = self.received, True, now
        if not again and self._to_save():
            say("\nStopping after this step; once more to stop at once.")
            return
        self.at_once = True
        if not again:
            say("\nStopping; there is nothing to save.")
        self._end_soon()
        raise KeyboardInterrupt

    def _end_soon(self) -> None:
        global ending

        def end_compilers() -> None:
            processes.end(processes.descendants(os.getpid()) - self._others)

        def end() -> None:
            end_compilers()
            os._exit(EXIT_INTERRUPTED)

        ending = threading.Timer(GRACE, end)
        ending.daemon = True
        ending.start()
        end_compilers()

    def restore(self) -> None:
        """Gives the signals back. After one was received they are ignored: the process ends already."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)

    def __enter__(self) -> "Interrupt":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.received |= kind is KeyboardInterrupt  # of one within this one
        self.restore()


def say(line: str) -> None:
    """On stderr, once for all ranks. That whoever reads it is gone (tee, a terminal) does not keep us from saving."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError, RuntimeError):  # and a signal may come in the middle of another print
            print(line, file=sys.stderr, flush=True)
