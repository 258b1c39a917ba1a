"""How the threads of a CPU wait for each other, set before torch starts: asleep, so that other programs have the cores.

OpenMP's threads end every parallel loop together. Waiting in a busy loop they keep a core from the very thread that
they wait for, as soon as another program wants one, and training falls to a fraction of its speed. How much is left,
and that it costs nothing on an idle machine, is what `python -m benchmarks.neighbour` measures.
"""

import os
import sys

# Those of GNU's libgomp and of Intel's and LLVM's libiomp, by which the user may have decided.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
ASLEEP = {"OMP_WAIT_POLICY": "passive"}  # read by both; to libiomp it means a KMP_BLOCKTIME of 0


def wait_asleep() -> None:
    """Nothing where the user has set any of it, or where torch is there already, and has read it."""
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ.update(ASLEEP)
