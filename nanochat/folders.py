"""Folders that libraries want while they are imported: one that cannot be is an error in a sentence, and code 2.

Tried by the packages whose modules are started with `python -m`, before these import torch.
"""

import os
import sys


def find() -> None:
    """Ends the process where one cannot be. Nothing where a package is only imported."""
    if sys.argv[0] != "-m":
        return
    import tempfile  # only now: Ctrl-C is handled

    from nanochat import oserrors

    try:
        os.getcwd()
        tempfile.gettempdir()  # on a full disk there is none
        if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            os.makedirs(cache, exist_ok=True)
    except OSError as problem:
        gone = "the folder that this was started in is not there any more; change into another one"
        print(f"error: {oserrors.sentence(problem) or gone}", file=sys.stderr)
        sys.exit(2)
    if any(name.startswith("TORCH") and name != "TORCHINDUCTOR_CACHE_DIR" for name in os.environ):
        import kernels  # noqa: F401  which tries torch's own variables first
