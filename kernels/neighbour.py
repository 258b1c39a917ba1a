"""Living beside Hugging Face's distribution that is called `kernels` too.

With it installed and this repository first on the path, `import kernels` finds us, and libraries that mean the other
one (transformers) fail to import names that we do not have. So its folder joins our `__path__`, where its submodules
are found, and what is asked of us that we do not have is looked up in its `__init__`. Without it, nothing of this is
noticed. Nor is it where the ops are installed by themselves, as `nanochat_kernels`: then `kernels` is the other one.
"""

import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = Path(__file__).parent


def folder() -> Path | None:
    """Where the other package is installed, or None."""
    if __package__ != "kernels":
        return None
    try:
        found = Path(str(importlib.metadata.distribution("kernels").locate_file("kernels")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if (found / "__init__.py").is_file() and found.resolve() != OURS.resolve() else None


@cache
def package() -> ModuleType | None:
    """The other package's `__init__`, under another name; its own `from kernels.x import` find its files by path."""
    found = folder()
    if found is None:
        return None
    spec = importlib.util.spec_from_file_location("kernels._huggingface", found / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attribute(name: str) -> Any:
    """A name of the other package. Raises AttributeError where there is none."""
    other = None if name.startswith("__") else package()
    if other is None or not hasattr(other, name):
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    return getattr(other, name)
