"""How the threads of a CPU wait for each other, set before torch starts: soon asleep, so that others have the cores.

OpenMP's threads end every parallel loop together. Waiting in a busy loop they keep a core from the very thread that
they wait for, as soon as another program wants one, and training falls to a fraction of its speed. Asleep at once, they
are woken again for each of thousands of small loops a second, which an idle machine pays for. So they spin briefly.
What each way costs, idle and beside another program, is what `python -m benchmarks.neighbour` measures.
"""

import os
import sys

# Those of GNU's libgomp and of Intel's and LLVM's libiomp, by which the user may have decided.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
BRIEFLY = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}  # turns of a loop; milliseconds


def wait_briefly() -> None:
    """Nothing where the user has set any of it, or where torch is there already, and has read it."""
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ.update(BRIEFLY)
