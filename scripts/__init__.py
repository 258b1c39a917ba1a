"""Entry points. Ctrl-C while a script is still importing ends it with one sentence and the code of an interruption.

What torch reads when it starts is set here, and the folders that it makes are tried, before any script imports it.
"""

import os
import signal
import sys

from nanochat import threads

threads.wait_briefly()


def _stop(number: int, frame: object) -> None:
    print("\nStopped before it began.", file=sys.stderr, flush=True)
    os._exit(75)


def _find_folders() -> None:
    """Those that libraries want while they are imported; one that cannot be is an error in a sentence."""
    import tempfile  # only now: Ctrl-C is heeded

    from nanochat import oserrors

    try:
        os.getcwd()
        tempfile.gettempdir()  # on a full disk there is none
        if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(cache, exist_ok=True)
    except OSError as problem:
        gone = "the folder that this was started in is not there any more; change into another one"
        print(f"error: {oserrors.sentence(problem) or gone}", file=sys.stderr)
        sys.exit(2)


if sys.argv[0] == "-m":  # started as a script; nanochat.flags.run_script puts Python's own handler back
    signal.signal(signal.SIGINT, _stop)
    _find_folders()
