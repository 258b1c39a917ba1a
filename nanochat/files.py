"""Files that are whole or not there: written under a temporary name, flushed to disk, then renamed."""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nanochat.errors import UserError

STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")  # folders of /dev/stdout and the like, which may lead to a file


def base_dir() -> Path:
    """Where all artifacts live: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat-kernels. Raises UserError for one that cannot
    be: safetensors reads no path that is not UTF-8, so what is saved there would be lost.
    """
    given = os.environ.get("NANOCHAT_BASE_DIR")
    try:
        folder = (Path(given) if given else Path.home() / ".cache" / "nanochat-kernels").expanduser()
        str(folder).encode()
    except RuntimeError:
        said = f"NANOCHAT_BASE_DIR is {given!r}, and there" if given else "NANOCHAT_BASE_DIR is not set, and there"
        raise UserError(f"{said} is no such home directory; set it to a full path") from None
    except UnicodeEncodeError:
        raise UserError(f"NANOCHAT_BASE_DIR is {given!r}, which is no UTF-8; take another folder") from None
    return folder


def _at_once(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except BlockingIOError:  # a file, which another machine is about to give back
        return os.open(path, flags)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read. Raises OSError with the path, which the system does not name where a disk fails.

    A pipe, which would be waited for, raises too: of files that were looked at, one may have become one.
    """
    try:
        with open(path, "rb", opener=_at_once) as f:
            if stat.S_ISFIFO(os.fstat(f.fileno()).st_mode):
                raise OSError(errno.ESPIPE, "Is a pipe, where a file is wanted")
            yield f
    except OSError as error:
        if error.errno is None:  # of no system: a library's
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces path by content; a crash at any moment leaves the old file or the new one, never half of it.

    A device or a pipe stays what it is, and gets the content. Raises OSError with the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if str(path.parent) in STREAMS or (path.exists() and not (path.is_file() or path.is_dir())):
            with open(path, "wb") as f:
                f.write(content)
            return
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def clear_leftovers(folder: Path) -> None:
    """Removes what `write_atomically` leaves in a folder when it is killed. Only for whoever alone writes there."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes what was written to a file durable; nothing where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def file_name(text: str) -> str:
    """A file's name for any text: the text, or what can be kept of it and a hash, so that no two are one."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[:80]
    return name if name and name == text else f"{name or '_'}-{short_hash(text)}"


def json_of(text: str | bytes, parse_float: Callable[[str], Any] = float) -> Any:
    """The content of a JSON text, with or without a byte-order mark. parse_float: as json.loads has it.

    Raises ValueError with what is wrong: json's own, and also where Python itself gives up.
    """
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")
    try:
        return json.loads(text, parse_float=parse_float)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{error.msg.removesuffix(' at')} at {where}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError:
        raise ValueError("a number has more digits than Python reads") from None


def once(text: str, key: str) -> None:
    """Raises ValueError where an object of a JSON text has a key twice, of which readers take one or the other."""

    def seen(pairs: list[tuple[str, Any]]) -> None:
        if sum(name == key for name, _ in pairs) > 1:
            raise ValueError(f'an object has "{key}" twice')

    json.loads(text.removeprefix("\ufeff"), object_pairs_hook=seen)


def encodable(text: str) -> None:
    """Raises ValueError for what is no text although JSON can say it: half of a pair of surrogates ("\\ud83d")."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"it has half a surrogate pair, \\u{ord(text[error.start]):04x}, which is no character"
        ) from None
