"""Python runs this file when it starts with this folder on PYTHONPATH: so child processes have the null device too."""

from profiling.compiled import null_device

null_device.install()
