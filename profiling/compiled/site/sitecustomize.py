"""Python runs this file when it starts with this folder on PYTHONPATH: so child processes have the null device too."""

import os

from profiling.compiled import null_device

if os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # as for a card: nothing between the quotes hides it
    null_device.install()
