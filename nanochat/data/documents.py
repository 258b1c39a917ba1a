"""Your own text for pretraining: parquet with a `text` column, JSONL with a "text" field, or plain text.

A path is one file or a folder of them. Everything is looked at before training begins: a broken line, a missing column,
a null or an empty file is named with its place and nothing is trained. Files called val, valid or validation, or in a
folder of that name, are the validation split; without any, the first of every 50 documents is held out, counted through
all files. A plain text file is cut into documents of about 4,000 characters: at blank lines, and where there are none
at the ends of lines or of words. nanochat/data/folder.py finds the files, parquet.py reads those of that kind.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from nanochat.data import parquet
from nanochat.data.folder import check_content, find_files, fingerprint, validates
from nanochat.data.source import BOM, blank, texts_of
from nanochat.errors import UserError
from nanochat.files import encodable, json_of, once, opened
from nanochat.progress import Count

SUFFIXES = (".parquet", ".jsonl", ".txt")
HELD_OUT = 50  # one document in so many
FEW = 10  # documents: of fewer one is much
LINES_PER_UNIT = 512
TEXT_DOCUMENT = 4_000  # characters
TEXT_UNIT = 1 << 20  # bytes of plain text read at a time
MARKS = re.compile(rf"^(?:[^\S\n]*{BOM})+", re.MULTILINE)
BLANK_LINE = re.compile(rb"^[ \t\r\v\f]*\n", re.MULTILINE)
BETWEEN = re.compile(r"(?:\n\n)+")
MUCH = 1 << 28  # bytes to look at, from which on progress is shown


@dataclass(frozen=True)
class Unit:
    """A stretch of one file: a parquet row group, or `size` bytes from `offset` whose first line is `line`.

    It has `documents` documents, of which the first is the `first`-th of all training files (0: not counted).
    """

    path: Path
    row_group: int = 0
    offset: int = 0
    size: int = 0
    line: int = 1
    documents: int = 0
    first: int = 0


class Documents:
    """Text documents from files. Raises UserError for anything that cannot be trained on."""

    def __init__(self, path: Path, val: Sequence[Path] | None = None, train: Sequence[Path] | None = None):
        """`path` names the source; `train` and `val` list its files where the caller knows them (the hub's shards).

        Those are not read through before: they are many, and of one making.
        """
        self.name = str(path)
        known = list(train or []) + list(val or [])
        files = known or find_files(path, SUFFIXES)
        if val is None:
            val = [f for f in files if validates(f, path)]
        validating = set(val)
        train_files = [f for f in files if f not in validating]
        if not train_files:
            raise UserError(
                f"{path} has validation files only; a file whose name does not begin with val… is for training"
            )
        self._held_out = not val
        self.fingerprint = fingerprint(files, f"1 in {HELD_OUT} of all" if self._held_out else "")
        units = index_all(files, thorough=not known)
        self._units = {
            "train": [u for f in train_files for u in units[f]],
            "val": [u for f in val for u in units[f]],
        }
        if self._held_out:
            self._hold_out(numbered(self._units["train"]))

    def _hold_out(self, units: list[Unit]) -> None:
        """A split has the units that have a document of it. Raises UserError where there is one document only."""
        held = lambda unit: -(-(unit.first + unit.documents) // HELD_OUT) - -(-unit.first // HELD_OUT)
        self._units["train"] = [unit for unit in units if held(unit) < unit.documents]
        self._units["val"] = [unit for unit in units if held(unit)]
        if not self._units["train"]:
            raise UserError(f"{self.name} has one document only; at least two are needed, one to validate on")
        count = units[-1].first + units[-1].documents
        if count < FEW and os.environ.get("RANK", "0") == "0":
            said = f"note: {self.name} has {count} documents, of which one is held out to validate on; give more text"
            print(f"{said}, or a file called val… of your choice", file=sys.stderr, flush=True)

    def units(self, split: str) -> int:
        return len(self._units[split])

    def load(self, split: str, unit: int) -> list[str]:
        one = self._units[split][unit]
        texts = read_unit(one)
        if not self._held_out:
            return texts
        return [text for i, text in enumerate(texts, one.first) if (i % HELD_OUT == 0) == (split == "val")]


def numbered(units: list[Unit]) -> list[Unit]:
    """The same units, each with the number of its first document."""
    found, first = [], 0
    for unit in units:
        found.append(replace(unit, first=first))
        first += unit.documents
    return found


def index_all(files: Sequence[Path], thorough: bool) -> dict[Path, list[Unit]]:
    """The units of each file, with progress where there is much to look at."""
    megabytes = {path: path.stat().st_size >> 20 for path in files}
    shown = thorough and sum(megabytes.values()) << 20 >= MUCH and os.environ.get("RANK", "0") == "0"
    found = {}
    with Count("looking at the data, MB", sum(megabytes.values()), shown) as count:
        for path in files:
            found[path] = index(path, thorough)
            count.tick(megabytes[path])
    return found


def index(path: Path, thorough: bool = True) -> list[Unit]:
    """The units of a file that have documents, after checking that it can be trained on.

    thorough: of parquet read all texts, not only what is noted about them; without it documents are not counted.
    """
    check_content(path)
    if path.suffix.lower() == ".parquet":
        counts = parquet.check(path, thorough)
        units = [Unit(path, row_group=i, documents=count if thorough else 0) for i, count in enumerate(counts) if count]
    else:
        units = []
        for offset, block, line in blocks(path, None if path.suffix.lower() == ".txt" else LINES_PER_UNIT):
            unit = Unit(path, offset=offset, size=len(block), line=line)
            if documents := len(_parse(unit, block)):
                units.append(replace(unit, documents=documents))
    if not units:
        raise UserError(f"{path} has nothing but blank texts")
    return units


def blocks(path: Path, lines_per_block: int | None) -> Iterator[tuple[int, bytes, int]]:
    """Yields (offset, bytes, number of the first line) of whole lines that are not all blank: so many a block, or where
    None about TEXT_UNIT bytes.
    """
    with opened(path) as f:
        offset, line = 0, 1
        while block := b"".join(islice(f, lines_per_block)) if lines_per_block else _stretch(f):
            if block.strip():
                yield offset, block, line
            offset += len(block)
            line += block.count(b"\n")


def _stretch(f: BinaryIO) -> bytes:
    """TEXT_UNIT bytes or more: to a blank line, or, where there is none for long, wherever a character ends."""
    window = f.read(2 * TEXT_UNIT - 1)
    blank_line = BLANK_LINE.search(window, window.rfind(b"\n", 0, TEXT_UNIT - 1) + 1)
    end = blank_line.end() if blank_line else window.rfind(b"\n") + 1
    f.seek(end - len(window), os.SEEK_CUR)
    parts, size = [window[:end]], end
    for line in [] if blank_line else _lines(f, TEXT_UNIT):
        parts.append(line)
        size += len(line)
        if size >= 2 * TEXT_UNIT or (size >= TEXT_UNIT and not line.strip()):
            break
    return b"".join(parts)


def _lines(f: Any, most: int) -> Iterator[bytes]:
    """Lines; those of more than `most` bytes in parts, each of whole characters."""
    while line := f.readline(most):
        for _ in range(0 if line.endswith(b"\n") else 3):  # a character has four bytes at most
            if (following := f.peek(1)[:1]) and following[0] & 0xC0 == 0x80:
                line += f.read(1)
        yield line


def read_unit(unit: Unit) -> list[str]:
    """The documents of a unit. Raises UserError when the file has gone bad since it was indexed."""
    if unit.path.suffix.lower() == ".parquet":
        texts = parquet.read(unit.path, unit.row_group)
    else:
        with opened(unit.path) as f:
            f.seek(unit.offset)
            block = f.read(unit.size)
        texts = _parse(unit, block) if len(block) == unit.size else []
    if unit.documents and len(texts) != unit.documents:
        raise UserError(f"{unit.path} is not any more what it was when this began; put it back as it was")
    return texts


def _parse(unit: Unit, block: bytes) -> list[str]:
    if unit.path.suffix.lower() == ".txt":
        return _cut(_plain(_decode(block, unit.path, unit.line), unit))
    documents = []
    for number, row in json_lines(unit.path, block, unit.line):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{unit.path}, line {number}: wanted an object with a string "text"')
        try:
            encodable(text)
        except ValueError as problem:
            raise UserError(f"{unit.path}, line {number}: {problem}") from None
        documents.append(text)
    return texts_of(documents)


def json_lines(path: Path, block: bytes, first_line: int, key: str = "text") -> list[tuple[int, Any]]:
    """(line number, parsed JSON) of every line that is not blank. Raises UserError with the line that is no JSON, or
    that has `key` twice.
    """
    rows = []
    for number, line in enumerate(block.split(b"\n"), first_line):
        if "\0" in (text := _decode(line, path, number)) or not blank(text):
            try:
                rows.append((number, json_of(text)))
                if text.count(f'"{key}"') > 1:  # rarely, so that others are parsed once
                    once(text, key)
            except ValueError as problem:
                raise UserError(f"{path}, line {number}: not valid JSON ({problem})") from None
    return rows


def _decode(block: bytes, path: Path, line: int) -> str:
    """Text without the byte-order marks that begin its lines: of a file, or of several that were joined."""
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        line += block[: error.start].count(b"\n")
        what = f"not UTF-8 text (byte 0x{block[error.start]:02x})"
        if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
            what = "UTF-16 or UTF-32, not UTF-8 text; save it as UTF-8"
        raise UserError(f"{path}, line {line}: {what}") from None
    return MARKS.sub("", text) if BOM in text else text


def _plain(text: str, unit: Unit) -> str:
    """The text. Raises UserError for one with zero bytes: UTF-16 without its mark, and what is no text, have them."""
    if (at := text.find("\0")) >= 0:
        line = unit.line + text.count("\n", 0, at)
        raise UserError(f"{unit.path}, line {line}: a zero byte, so it is no UTF-8 text; UTF-16, perhaps, or damaged")
    return text


def _cut(text: str) -> list[str]:
    """Paragraphs joined, and long ones cut, into documents of about TEXT_DOCUMENT characters."""
    text = text.replace("\r\n", "\n")
    documents, begin, end = [], 0, 0  # of the document at work
    for start, stop in _paragraphs(text):
        if end > begin and (between := start - 2 - end) > 0:  # lines that are of it, while it is short
            end += min(between, max(0, TEXT_DOCUMENT + 2 - (end - begin)) // 2 * 2)
        if end == begin:
            begin = start
        elif end - begin + stop - start > TEXT_DOCUMENT or end < start - 2:
            documents.append(text[begin:end])
            begin = start
        if stop - start > 2 * TEXT_DOCUMENT:
            *whole, rest = _chunks(text[start:stop])
            documents += whole
            begin = stop - len(rest)
        end = stop
    return texts_of([*documents, text[begin:end]])


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """(start, stop) of what stands between blank lines."""
    start = 0
    for found in BETWEEN.finditer(text):
        yield start, found.start()
        start = found.end()
    yield start, len(text)


def _chunks(paragraph: str) -> Iterator[str]:
    """What a long paragraph is made of, in parts that end with a line, else with a word, else anywhere."""
    start = 0
    while len(paragraph) - start > TEXT_DOCUMENT:
        whole = paragraph[start : start + TEXT_DOCUMENT]
        end = max(whole.rfind("\n"), whole.rfind("\r")) + 1 or whole.rfind(" ") + 1 or len(whole)
        yield whole[:end]
        start += end
    yield paragraph[start:]
