"""Which files of a data folder are data, and which of them validate.

What a system, an editor or a program of its own has left there is not read, and neither are files of other kinds: both
are counted on stderr. Nothing that a user may mean is passed over silently: a link to nothing, a pipe, a folder that
may not be read are errors. Links are followed, and a file that has several names is read once.
"""

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat.errors import UserError, one_line
from nanochat.files import opened

SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
VALIDATION = re.compile(r"val(id|idation)?(?![^\W\d_])", re.IGNORECASE)  # val_0 and validation-00000, but not Valencia
POINTER = b"version https://git-lfs.github.com/spec/"
# How packed files begin, whatever their names, and what unpacks them.
PACKED = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ\0": "unxz",
    b"BZh91AY&SY": "bunzip2",
    b"\x04\x22\x4d\x18": "unlz4",
    b"PK\x03\x04": "unzip",
    b"7z\xbc\xaf\x27\x1c": "7z x",
}


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files at a path, sorted. Raises UserError where there are none of a kind that can be read, OSError."""
    wanted = ", ".join(suffixes)
    if path.is_dir():
        return _in_folder(path, suffixes)
    if not path.exists():
        raise UserError(f"--data {path} does not exist; give a file or a folder of {wanted} files")
    if not path.is_file():
        raise UserError(f"--data {path} is neither a file nor a folder; save what comes from it as a file")
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--data {path} is not of a kind that can be read here; wanted {wanted}")
    return [path]


def validates(file: Path, path: Path) -> bool:
    """Whether a file at `path` is of the validation split, by its own name or by that of a folder within path."""
    parts = file.relative_to(path).parts if file != path else (file.name,)
    return any(VALIDATION.match(part) for part in parts)


def fingerprint(files: Sequence[Path], rule: str = "") -> str:
    """Of names, sizes, and the first and last 64 KB of each file, and of a rule by which they are split."""
    digest = hashlib.sha256(rule.encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
        with opened(path) as f:
            digest.update(f.read(1 << 16))
            f.seek(max(0, size - (1 << 16)))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def check_content(path: Path) -> None:
    """Raises UserError for an empty file, for git LFS's note of where it would be, and for one that is packed."""
    with opened(path) as f:
        beginning = f.read(len(POINTER))
    for start, tool in PACKED.items():
        if beginning.startswith(start):
            raise UserError(f"{path} is packed, whatever its name says; unpack it first: {tool}")
    if not beginning:
        raise UserError(f"{path} is empty")
    if beginning == POINTER:
        raise UserError(f"{path} is a pointer of git LFS, not the file itself; get it with git lfs pull")


def _in_folder(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files, left_out, others = [], [], []
    seen = set()  # by device and number, (0, 0) where a system has none
    for file, by_the_way in _all(path):
        said = str(file.relative_to(path))
        if by_the_way:
            left_out.append(said)
        elif file.suffix.lower() not in suffixes:
            others.append(said)
        elif not file.is_file():
            what = "a link to nothing" if file.is_symlink() else "no file"
            raise UserError(f"{file} is {what}; put the file there, or remove it")
        elif (at := (file.stat().st_dev, file.stat().st_ino)) in seen and any(at):
            left_out.append(said)
        else:
            seen.add(at)
            files.append(file)
    _note(path, left_out, "hidden, a system's, an editor's copies, or the same file again")
    if not files:
        raise UserError(f"--data {path} has no {', '.join(suffixes)} file in it")
    _note(path, others, f"not {', '.join(suffixes)}")
    return files


def _all(path: Path) -> list[tuple[Path, bool]]:
    """(what is in a folder, whether it is there by the way), sorted; a folder that is not is not looked into."""
    found, seen = [], set()

    def refused(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(path, onerror=refused, followlinks=True):
        at = os.path.realpath(here)
        if at in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(at)
        found += [(Path(here, name), by_the_way(name)) for name in names]
        found += [(Path(here, name), True) for name in folders if by_the_way(name, folder=True)]
        folders[:] = sorted(name for name in folders if not by_the_way(name, folder=True))
    return sorted(found)


def by_the_way(name: str, folder: bool = False) -> bool:
    """Whether something lies in a folder because of a system or a program: hidden, a copy, a lock, a table's log."""
    if folder and (name.startswith("_") or name.lower() in SYSTEM):  # _delta_log, _temporary
        return True
    copy = name.startswith(("~", "#")) or name.endswith(("~", "#")) or Path(name).stem.endswith("~")
    return name.startswith(".") or name.lower() in SYSTEM or copy


def _note(path: Path, names: list[str], why: str) -> None:
    if names and os.environ.get("RANK", "0") == "0":
        said = f"{len(names)} files or folders are" if len(names) > 1 else "1 file or folder is"
        more = ", …" if len(names) > 1 else ""
        print(one_line(f"note: {said} left out of {path}: {why} ({names[0]}{more})"), file=sys.stderr, flush=True)
