"""Folders that are whole or not there, and reading folders that others made: no link out of them is followed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import json_of, sync_folder

LARGEST_JSON = 1 << 28  # bytes; a tokenizer.json of 200,000 tokens has 20 MB


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end; a failure leaves nothing. Raises UserError where `path` exists
    and is not an empty folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(f"{path} exists already; give another --out, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def inside(folder: Path, name: str) -> Path:
    """folder/name, a regular file. Raises UserError when it is missing, something else, or a link out of the folder."""
    path = folder / name
    if os.path.isabs(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} leads out of {folder} (a symbolic link?); nothing is read through it: copy the folder with "
            "cp -rL, look at it, and import the copy"
        )
    if not path.is_file():
        raise UserError(f"{path} is {'no file' if path.exists() else 'missing'}; fetch the folder again, whole")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for what is no JSON object, or too large for one of ours."""
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, which is too large for such a file")
    try:
        found = json_of(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return found
