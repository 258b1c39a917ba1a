"""What was measured on the cards of this machine, kept between runs, in a file for each kind of card.

    $NANOCHAT_BASE_DIR/measured/<card>-<key>.json

has block sizes (`python -m kernels tune`, and what a first training tunes by itself) and whatever else a caller keeps
under a name of its own (nanochat/measure.py: which ops pay in a compiled training step). The key is made of the card,
driver, torch, Triton and this package's code: a change of any of them is another card. Nothing is written into the
checkout. A leaf.
"""

import errno
import hashlib
import json
import os
import re
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .triton_utils import INSTALLED, triton

Blocks = dict[str, list[dict[str, Any]]]  # rows by op, as in tuned/default.json


def folder() -> Path:
    """Raises FileNotFoundError for a user without a home directory (of a container, say)."""
    base = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat-kernels"
    try:
        return Path(base).expanduser() / "measured"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "no such home directory; set NANOCHAT_BASE_DIR", base) from None


@cache
def identity(index: int) -> dict[str, Any]:
    """What a measurement on a GPU is good for."""
    properties = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return dict(
        card=properties.name,
        memory=properties.total_memory,
        driver=torch.version.hip or driver,
        torch=torch.__version__,
        triton=triton.__version__ if INSTALLED else "",
        code=code(),
    )


@cache
def code() -> str:
    """A fingerprint of the kernels and their static block sizes."""
    here = Path(__file__).parent
    files = sorted(path for path in here.rglob("*") if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def path(index: int) -> Path:
    found = identity(index)
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    return folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', found['card']).strip('-')}-{key}.json"


def load(index: int) -> dict[str, Any]:
    """All that was measured on a GPU like this one; empty where nothing was, or where the file is damaged (warned)."""
    file: Path | None = None
    try:
        file = path(index)
        found = json.loads(file.read_bytes())
        if not _is_table(found):
            raise ValueError("it is no table")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as problem:
        warnings.warn(f"{file} is not used: {problem}; what it had is measured again", stacklevel=2)
        return {}


def _is_table(found: Any) -> bool:
    """Whether a file's content has what dispatch and a training read from it, in the right types."""
    if not isinstance(found, dict) or not isinstance(found.get("steps", {}), dict):
        return False
    blocks = found.get("blocks", {})
    if not isinstance(blocks, dict) or not all(isinstance(rows, list) for rows in blocks.values()):
        return False
    return all(
        isinstance(row, dict)
        and isinstance(row.get("dtype"), str)
        and isinstance(row.get("config"), dict)
        and all(type(size) is int for size in [row.get("up_to", 0), *row["config"].values()])
        for rows in blocks.values()
        for row in rows
    )


def store(index: int, **parts: Any) -> Path:
    """Puts parts beside what the file has, replacing those of the same name. Returns where."""
    file = path(index)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {**load(index), "machine": identity(index), **parts}
    replace(file, json.dumps(content, indent=1) + "\n")
    forget()
    return file


def replace(file: Path, text: str) -> None:
    """Writes a file whole, or leaves the one that is there. Raises OSError with the path."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(file)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


_adopted: Blocks | None = None  # block sizes that this process uses, whatever is in its file
_kept: dict[int, Blocks] = {}


def adopt(blocks: Blocks | None) -> None:
    """This process uses these block sizes, not those in the file: another rank's, or a checkpoint's. None: the file's.

    The caller lets dispatch decide anew (`dispatch.forget`).
    """
    global _adopted
    _adopted = blocks


def blocks(index: int) -> Blocks:
    """Measured block sizes for a GPU."""
    if _adopted is not None:
        return _adopted
    if index not in _kept:
        _kept[index] = load(index).get("blocks", {})
    return _kept[index]


def forget() -> None:
    """The file is read anew."""
    _kept.clear()
