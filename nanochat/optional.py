"""Packages that not everybody has installed, imported when they are asked for."""

import importlib
from typing import Any


def package(name: str, needed: str) -> Any:
    """The package. Raises ImportError where it is missing, and where something else has its name, without `needed`.

    A folder is enough for that: wandb makes one called wandb/, and many call theirs datasets/. Also where importing it
    fails otherwise: packages that do not fit each other raise whatever comes first.
    """
    try:
        found = importlib.import_module(name)
        there = hasattr(found, needed)
    except ImportError:
        raise
    except Exception as problem:
        said = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        raise ImportError(f"the {name} that is installed cannot be imported ({said})", name=name) from None
    if not there:
        at = getattr(found, "__file__", None) or ", ".join(getattr(found, "__path__", [])) or "nowhere"
        raise ImportError(f"what Python finds by the name {name} is something else, at {at}", name=name)
    return found
