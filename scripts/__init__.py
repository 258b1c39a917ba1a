"""Entry points. Ctrl-C while a script is still importing ends it with one sentence and the code of an interruption.

What torch reads when it starts is set here, and the folders that it makes are tried, before any script imports it.
"""

import os
import signal
import sys

from nanochat import folders, threads

threads.wait_briefly()


def _stop(number: int, frame: object) -> None:
    print("\nStopped before it began.", file=sys.stderr, flush=True)
    os._exit(75)


if sys.argv[0] == "-m":  # started as a script; nanochat.flags.run_script puts Python's own handler back
    signal.signal(signal.SIGINT, _stop)
    folders.find()
