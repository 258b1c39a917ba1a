"""Python runs this when it starts: the null device, and a disk on which every run has room."""

import shutil
from types import SimpleNamespace

from profiling.compiled import null_device

null_device.install()
shutil.disk_usage = lambda path: SimpleNamespace(total=10**13, used=0, free=10**13)  # type: ignore[assignment]
