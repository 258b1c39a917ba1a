"""Whether Triton can launch kernels here: its launchers are C, compiled at the first launch with Python's headers.

Found out before anything is trained, by compiling something tiny as Triton's runtime/build.py does.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NO_COMPILER = (
    "Triton compiles its launchers with a C compiler, and there is none (Debian, Ubuntu: apt install gcc; "
    "Fedora: dnf install gcc)"
)
NO_HEADERS = (
    "Triton compiles its launchers against Python's headers, and there is no Python.h in {folder} (Debian, Ubuntu: "
    "apt install python3-dev; Fedora: dnf install python3-devel)"
)
EAGERLY = "NANOCHAT_KERNELS=torch and TORCH_COMPILE_DISABLE=1"


def obstacle() -> str:
    """What is missing, with its package's name; "" when kernels can be launched."""
    if sys.platform == "win32":  # Triton for Windows brings a compiler of its own
        return ""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return NO_COMPILER
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton, for Debian's Python
    folder = Path(sysconfig.get_paths(scheme=scheme)["include"])
    if not (folder / "Python.h").exists():
        return NO_HEADERS.format(folder=folder)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "launcher.c"
        source.write_text("#include <Python.h>\nvoid *launch(void) { return PyLong_FromLong(0); }\n")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{folder}", "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as problem:
            return f"Triton compiles its launchers with {compiler}, which cannot be started ({problem.strerror})"
    said = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[0]
    return f"Triton compiles its launchers with {compiler}, which fails: {said}" if done.returncode else ""


def wanted() -> bool:
    """Whether anything will be launched through Triton: not with what EAGERLY names."""
    return not (os.environ.get("NANOCHAT_KERNELS") == "torch" and os.environ.get("TORCH_COMPILE_DISABLE") == "1")
