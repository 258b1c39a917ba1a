"""Imported first: the folders that torch wants while it is imported, tried by `python -m kernels`.

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


if sys.argv[0] == "-m":
    find_folders()
