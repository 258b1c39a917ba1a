"""Run on the computing null device: what `scripts.plan --dry-run` prints on each card named, as one line of JSON.

Of the Hub's data, or of what a last word --data=… says (nothing: what the plan chooses).
"""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import tiny  # noqa: E402

from nanochat.plan import throughput  # noqa: E402
from profiling.compiled import null_device  # noqa: E402

shutil.disk_usage = lambda path: SimpleNamespace(total=10**13, used=0, free=10**13)  # type: ignore[assignment]
throughput.step_seconds = lambda *sizes, **more: 0.5  # an unknown card is measured: not on this one
words = sys.argv[1:]
data = [words.pop()] if words[-1].startswith("--") else ["--data=hub"]
data = [] if data == ["--data="] else data
found = {}
for word in words:
    name, _, gpus = word.partition(":")
    null_device.become(name, int(gpus or 1))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = tiny.call("plan", "--dry-run", *data)
    found[word] = said.getvalue() + (f"exit code {code}" if code else "")
print(json.dumps(found))
