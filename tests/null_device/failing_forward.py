"""small_step.py where the process that lowers forward fails."""

import runpy

from profiling.compiled import forked

forked._lowered = lambda *args: 1 // 0
runpy.run_module("tests.null_device.small_step", run_name="__main__")
