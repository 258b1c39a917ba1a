"""stdin, stdout and stderr, whatever they are: closed, a pipe whose reader has gone, a terminal of another encoding.

No print is to end a training, and no byte on stdin a chat. `prepare` is called once by every script (flags.run_script);
`live` says whether a terminal can show a line that changes.
"""

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from nanochat.errors import UserError

LATIN, PLAIN = "nanochat.latin1", "nanochat.plain"  # names of the error handlers below
ASCII: dict[str, str | int | None] = {
    "–": "-", "—": "-", "−": "-", "─": "-", "━": "-", "·": "-", "…": "...", "→": "->", "×": "x", "±": "+-", "µ": "u",
    "“": '"', "”": '"', "‘": "'", "’": "'", "≤": "<=", "≥": ">=",
}  # fmt: skip


def prepare(goes_on: bool = False) -> None:
    """goes_on: as in flags.run_script. A closed stream becomes the null device: its number is taken, or a checkpoint
    would get it, and with it what libraries print.
    """
    codecs.register_error(LATIN, _as_latin1)
    codecs.register_error(PLAIN, _in_ascii)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or (type(stream) is io.TextIOWrapper and not _open_for(mode, stream)):
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "r" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8-sig", errors=LATIN)
        elif type(stream) is io.TextIOWrapper and not _pipe(stream):  # not what tests put there
            setattr(sys, name, _outliving(stream, goes_on or name == "stderr"))


def _open_for(mode: str, stream: io.TextIOWrapper) -> bool:
    """Whether a descriptor can be read or written at all: a shell may open it the other way round (`0> file`)."""
    try:
        os.read(stream.fileno(), 0) if mode == "r" else os.write(stream.fileno(), b"")
    except OSError as error:
        return error.errno not in (errno.EBADF, errno.EISDIR)
    return True


def finish() -> None:
    """At the end of a script: what is still to be written is, and nobody complains where it cannot be."""
    for stream in (sys.stdout, sys.stderr):
        if stream and (pipe := _pipe(stream)):
            pipe.goes_on = True
            with suppress(OSError):
                stream.flush()


def live(stream: TextIO | None = None) -> bool:
    """Whether somebody watches a terminal that can write over a line: a dumb one (an editor's) cannot."""
    return (stream or sys.stdout).isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def decoded(word: str) -> str:
    """A word of the command line as text: bytes that are no UTF-8 are taken for Latin-1."""
    codecs.register_error(LATIN, _as_latin1)
    return os.fsencode(word).decode("utf-8", LATIN)


def read_line(prompt: str) -> str:
    """The next line of stdin without blanks around it, or a byte-order mark, as each of files joined may begin with.

    Raises EOFError at the end, UserError for what is no text.
    """
    line = input(prompt).lstrip("\ufeff").strip()
    if "\0" in line:
        raise UserError("stdin has NUL bytes, as UTF-16 has them; make it UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return line


class _Pipe(io.FileIO):
    """A descriptor that becomes the null device when whoever reads it has gone; the script ends then, or goes on."""

    goes_on = False

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        try:
            while left:
                if (done := super().write(left)) is None:  # somebody made it non-blocking
                    select.select([], [self], [])
                left = left[done or 0 :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and self.goes_on:
                return len(content)  # a full disk under `> file`: what is printed there is not worth a training
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise OSError(error.errno, error.strerror, "standard output") from None
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not self.goes_on:
                raise SystemExit(0) from None
        return len(content)


def _pipe(stream: Any) -> _Pipe | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    return raw if isinstance(raw, _Pipe) else None


def _outliving(stream: io.TextIOWrapper, goes_on: bool) -> TextIO:
    """The stream's descriptor, in its encoding, where anything can be printed."""
    stream.flush()
    pipe = _Pipe(stream.fileno(), "w", closefd=False)
    pipe.goes_on = goes_on
    at_once = stream.write_through  # python -u
    buffer: Any = pipe if at_once else io.BufferedWriter(pipe)
    return io.TextIOWrapper(buffer, stream.encoding, PLAIN, line_buffering=stream.line_buffering, write_through=at_once)


def _as_latin1(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What the terminal has no letters for: our own signs in ASCII, all else as Python writes it."""
    assert isinstance(error, UnicodeEncodeError)
    plain = error.object[error.start : error.end].translate(str.maketrans(ASCII))
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.end
