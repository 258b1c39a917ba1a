"""What a complete checkpoint is: one answer for all who read them.

A folder is complete when its manifest names exactly the files that its metadata calls for, each of them is a regular
file that can be read and has the digest of the manifest, and the metadata has what readers need and agrees with the
folder's stage and step. `read` is the question; nanochat/checkpoint.py asks it for whoever resumes, chats or evaluates.

A file is hashed once in a process and remembered by size and times: a checkpoint of 10 GB takes seconds.
"""

import errno
import hashlib
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from nanochat import typed
from nanochat.files import json_of, sha256
from nanochat.gpt import GPTConfig

MANIFEST, META = "manifest.json", "meta.json"
TRAINED = ("base", "mid", "sft", "rl")  # stages that leave a model, in order; their folders' names
# A folder's name: its state and its step. Of one step, a complete temporary one is newer than the one in its place, and
# one that was moved aside is older.
FOLDER = re.compile(r"step_([0-9]+)|(\.old-|\.tmp-)step_([0-9]+)-[0-9]+")
NEEDED = dict(stage=str, step=int, finished=bool, config=dict[str, Any], tokenizer=str)
TO_RESUME = dict(  # with an optimizer
    data=str, plan=dict[str, Any], dtype=str, rates=dict[str, float], settings=dict[str, int], state=dict[str, Any],
    loader=dict[str, Any],
)  # fmt: skip
NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors that say nothing about a file


class Damaged(Exception):
    """What is wrong with a checkpoint, as a sentence without its subject. unreadable: it may be whole all the same."""

    def __init__(self, what: str, unreadable: bool = False):
        super().__init__(what)
        self.unreadable = unreadable


def read(folder: Path, verify: bool = True) -> dict[str, Any]:
    """The metadata of the complete checkpoint in a folder. Raises Damaged when there is none.

    verify=False: files other than meta.json are hashed only if that was done before.
    """
    digests = manifest(folder)
    content = _content(folder / META)
    if META not in digests:
        raise Damaged(f"its manifest does not name {META}")
    if hashlib.sha256(content).hexdigest() != digests.pop(META):
        raise Damaged(f"{META} does not match its checksum")
    meta = _object(content, META)
    _check(meta, folder)
    wanted = {f"{part}.safetensors" for part in parts(meta)}
    for name in sorted(wanted ^ set(digests)):
        raise Damaged(f"its manifest {'does not name' if name in wanted else 'names a file too many,'} {name}")
    for name, digest in sorted(digests.items()):
        if _digest(folder / name, verify) not in (digest, None):
            raise Damaged(f"{name} does not match its checksum")
    return meta


def manifest(folder: Path) -> dict[str, str]:
    """Digests by file name. Raises Damaged."""
    try:
        found = _object(_content(folder / MANIFEST), MANIFEST)
    except FileNotFoundError:
        raise Damaged("it has no manifest, so it was not written to the end") from None
    for name, digest in found.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise Damaged(f"its manifest has no SHA-256 of {name!r}")
    return found


def parts(meta: dict[str, Any]) -> list[str]:
    """Which tensors a checkpoint has, by its metadata; older versions did not write it down."""
    if "parts" in meta:
        return meta["parts"]
    fp8 = ["fp8"] if meta.get("plan", {}).get("fp8") == "delayed" else []
    return ["model", *(["optimizer", "loader", *fp8] if "state" in meta else [])]


def _check(meta: dict[str, Any], folder: Path) -> None:
    """Raises Damaged for metadata that lacks something, or belongs to another folder."""
    listed = meta.get("parts", ["model"])
    plain = isinstance(listed, list) and all(isinstance(part, str) and part.isidentifier() for part in listed)
    if not plain or "model" not in listed:
        raise Damaged(f"{META} does not say which parts there are, the model among them")
    if not isinstance(meta.get("plan", {}), dict):
        raise Damaged(f"{META} has no plan")
    resumable = "optimizer" in parts(meta)
    for key, kind in {**NEEDED, **(TO_RESUME if resumable else {})}.items():
        if not typed.fits(meta.get(key), kind):
            raise Damaged(f"{META} has {'another type of' if key in meta else 'no'} {key}, wanted {typed.said(kind)}")
    try:
        typed.made(GPTConfig, meta["config"])
    except (TypeError, ValueError) as problem:
        raise Damaged(f"the config in {META} is no model's ({problem})") from None
    named, stage = FOLDER.fullmatch(folder.name), folder.parent.name
    if named and int(named[1] or named[3]) != meta["step"]:
        raise Damaged(f"it is of step {meta['step']}")
    if stage in TRAINED and meta["stage"] != stage:
        raise Damaged(f"it is of stage {meta['stage']!r}, not {stage!r}")
    if resumable and meta["state"].get("step", meta["step"]) != meta["step"]:
        raise Damaged(f"it is of step {meta['step']}, and the state in it of {meta['state']['step']}")


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        found = json_of(content)
    except ValueError:
        raise Damaged(f"its {name.split('.')[0]} is damaged: {name} is no JSON") from None
    if not isinstance(found, dict):
        raise Damaged(f"its {name.split('.')[0]} is damaged: {name} is no JSON object")
    return found


def _content(path: Path) -> bytes:
    """Of a small file. Raises Damaged; FileNotFoundError for a manifest that is not there."""
    _status(path)
    try:
        with open(path, "rb") as f:
            return f.read()
    except MemoryError:
        raise Damaged(f"{path.name} is too large") from None
    except OSError as problem:
        raise _damaged(path, problem) from None


Stamp = tuple[int, int, int, int, int]
_known: dict[Path, tuple[Stamp, str]] = {}  # digests, with what the file was like when it was read
SETTLED = 2 * 10**9  # ns: a file younger than that may change again without a change of its time


def _digest(path: Path, verify: bool) -> str | None:
    """A file's SHA-256; without `verify` None where it is not known already."""
    before = _status(path)
    found = _known.get(path)
    if found and found[0] == before:
        return found[1]
    if not verify:
        return None
    try:
        digest = sha256(path)
    except OSError as problem:
        raise _damaged(path, problem) from None
    if _status(path) == before and time.time_ns() - max(before[3:]) > SETTLED:
        _known[path] = before, digest
    return digest


def _status(path: Path) -> Stamp:
    """What changes when a file does. Raises Damaged when it is not there or no regular file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if path.name == MANIFEST and path.parent.is_dir():
            raise
        raise Damaged(f"{path.name} is missing") from None
    except NotADirectoryError:
        raise Damaged("it is a file and no folder") from None
    except OSError as problem:
        raise _damaged(path, problem) from None
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path.name} is {'a folder' if stat.S_ISDIR(found.st_mode) else 'something else'} and no file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _damaged(path: Path, problem: OSError) -> Exception:
    if problem.errno in NOT_THE_FILES:
        return problem
    return Damaged(f"{path.name} cannot be read ({problem.strerror})", unreadable=True)
