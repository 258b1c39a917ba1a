"""Compiling the decode step beside the first answers, and ending a process that still does."""

import gc
import threading
from collections.abc import Callable

from nanochat import processes
from nanochat.engine.engine import Engine

COMPILER = "compiler"  # name of a thread


def compile_decoding(engine: Engine) -> None:
    """Starts it in a thread of its own; says why where it cannot be done."""

    def compile() -> None:
        if why := engine.compile():
            print(f"note: answers are written without compiled code, and so more slowly: {why}", flush=True)
        gc.freeze()  # the compiler's objects too: going through them would stop answers again and again

    threading.Thread(target=compile, name=COMPILER, daemon=True).start()


def end_at_once(run: Callable[[], None]) -> None:
    """Runs a script that ends by SystemExit, and ends as it does even while a thread is inside the compiler.

    When Python ends, it stops such a thread as soon as it comes back from C++, whose stack cannot be unwound: the
    process then dies of SIGABRT instead.
    """
    try:
        run()
    except SystemExit as ended:
        if any(thread.name == COMPILER for thread in threading.enumerate()):
            processes.end_at_once(ended)
        gc.unfreeze()  # or it is never taken apart, of which Triton's bindings complain when Python ends
        raise
