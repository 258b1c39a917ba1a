"""--fresh: what is made again is moved aside, and removed only when what replaces it is there.

A folder NAME, a stage or a whole run, becomes NAME~old (no run has such a name). A process that is killed before the
new one is complete leaves both, and a call without --fresh puts the old one back. A checkpoint removes what was moved
aside for it (nanochat/checkpoint.py). Of a folder that is a link, to a larger disk say, the folder it leads to is
moved, and the link stays.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nanochat.files import sync_folder


def old(folder: Path) -> Path:
    """Where it is moved to."""
    place = folder.resolve()
    return place.with_name(f"{place.name}~old")


def set_aside(folder: Path, complete: Callable[[Path], bool]) -> bool:
    """Moves a folder aside; whether anything is there now. complete: whether a folder holds what it is for.

    Called again before there is anything new, it keeps what it had moved and removes what was begun.
    """
    place = folder.resolve()
    if place.is_dir():
        if old(folder).is_dir() and not complete(folder):
            shutil.rmtree(place)
        else:
            forget(folder)
            os.rename(place, old(folder))
            sync_folder(place.parent)
    if folder.is_symlink():
        place.mkdir(parents=True, exist_ok=True)
    return old(folder).is_dir()


def put_back(folder: Path, complete: Callable[[Path], bool]) -> bool:
    """Moves back what `set_aside` has moved, if what was to replace it is not complete; whether it did.

    complete raises UserError where it cannot tell: then neither is touched.
    """
    if not old(folder).is_dir():
        return False
    if complete(folder):
        forget(folder)
        return False
    place = folder.resolve()
    if place.is_dir():
        shutil.rmtree(place)
    os.rename(old(folder), place)
    sync_folder(place.parent)
    return True


def forget(folder: Path) -> None:
    """Removes what was moved aside."""
    if old(folder).is_dir():
        shutil.rmtree(old(folder), ignore_errors=True)  # a reader may have a file open on a network disk
