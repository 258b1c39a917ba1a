"""--fresh: what is made again is moved aside, and removed only when what replaces it is there.

A folder NAME, a stage or a whole run, becomes NAME~old (no run has such a name). A process that is killed before the
new one is complete leaves both, and a call without --fresh puts the old one back. A checkpoint removes what was moved
aside for it (nanochat/checkpoint.py). Of a folder that is a link, to a larger disk say, the folder it leads to is
moved, and the link stays.
"""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanochat.files import sync_folder

STAGES = ("tokenizer", "base", "mid", "sft", "rl")  # folders within a run
FOLDERS = (*STAGES, "eval", "profile")  # in which there may be more than what is ours
OURS = re.compile(
    r"step_[0-9]+|\.(old|tmp)-step_[0-9]+-[0-9]+|\..+\.([0-9]+\.tmp|lock)|\.lock|log\.jsonl|"
    r"(summary|tokenizer|plan)\.json|report\.(md|html)|report_(chat|core|pass|reward)\.svg|"
    r"(base|mid|sft|rl)_failures\.jsonl|(base|mid|sft|rl|hf_.+)_core\.csv|"
    r"trace-rank0\.json\.gz|profile\.(json|html)"
)


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
            _remove(place, old(folder))
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
        _remove(place, old(folder))
    os.rename(old(folder), place)
    sync_folder(place.parent)
    return True


def forget(folder: Path) -> None:
    """Removes what was moved aside."""
    if old(folder).is_dir():
        with suppress(OSError):  # a reader may have a file open on a network disk
            _remove(old(folder), folder.resolve())


def _remove(folder: Path, other: Path) -> None:
    """Removes a folder; what is not ours in it moves to the other one, if that has nothing of the name."""
    for name in os.listdir(folder):
        if name in FOLDERS and (folder / name).is_dir():
            if not (folder / name).is_symlink():
                _remove(folder / name, other / name)
        elif not OURS.fullmatch(name):
            other.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(other / name):
                os.rename(folder / name, other / name)
    shutil.rmtree(folder)
