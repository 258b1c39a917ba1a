"""Imported first: what torch wants while it is imported, folders and variables, tried by whoever is started with -m.

Where one cannot be, it ends with a sentence and code 2. Who imports the package gets torch's own error.
"""

import os
import sys


def find_folders() -> None:
    import tempfile

    try:
        tempfile.gettempdir()  # on a full disk there is none
        if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(cache, exist_ok=True)
    except OSError as problem:
        where = problem.filename or "no folder for temporary files can be written to (TMPDIR names one)"
        print(f"error: {where}: {problem.strerror}; look at its disk and its permissions", file=sys.stderr)
        sys.exit(2)


def read_variables() -> None:
    """torch reads variables of its own while it is imported, and its compiler others."""
    names = sorted(name for name in os.environ if name.startswith("TORCH"))
    try:
        if names:
            import torch  # noqa: F401
        if any(name.startswith("TORCHINDUCTOR_") and name != "TORCHINDUCTOR_CACHE_DIR" for name in names):
            import torch._inductor.config  # noqa: F401
    except (ValueError, OSError) as problem:
        why = str(problem).strip().splitlines()[0]
        print(f"error: torch cannot use what the environment tells it ({', '.join(names)}): {why}", file=sys.stderr)
        sys.exit(2)


if sys.argv[0] == "-m":
    find_folders()
    read_variables()
