"""Your own text for pretraining: parquet with a `text` column, JSONL with a "text" field, or plain text.

A path is one file or a folder of them. Everything is looked at before training begins: a broken line, a missing column,
a null or an empty file is named with its place and nothing is trained. Files whose name begins with "val" are the
validation split; without any, the first of every 50 documents is held out, counted through all files. A plain text
file is cut at blank lines into documents of about 4,000 characters. nanochat/data/parquet.py reads the parquet files.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.files import encodable, json_of
from nanochat.progress import Count

SUFFIXES = (".parquet", ".jsonl", ".txt")
HELD_OUT = 50  # one document in so many
LINES_PER_UNIT = 512
TEXT_DOCUMENT = 4_000  # characters
TEXT_UNIT = 1 << 20  # bytes of plain text read at a time
BOM = "\ufeff"  # the byte-order mark that Windows puts before a text
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
            val = [f for f in files if f.stem.lower().startswith("val")]
        train_files = [f for f in files if f not in val]
        if not train_files:
            raise UserError(
                f"{path} has validation files only; a file whose name does not begin with val is for training"
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


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files at a path, sorted. What no user means as data is left out, and said on stderr.

    Raises UserError when there are none of a kind that can be read.
    """
    wanted = ", ".join(suffixes)
    if not path.exists():
        raise UserError(f"--data {path} does not exist; give a file or a folder of {wanted} files")
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise UserError(f"--data {path} is not of a kind that can be read here; wanted {wanted}")
        return [path]
    every = sorted(f for f in path.rglob("*") if f.is_file())
    out = [f.relative_to(path) for f in every if by_the_way(f.relative_to(path))]
    if out and os.environ.get("RANK", "0") == "0":
        said = f"{len(out)} files are" if len(out) > 1 else "1 file is"
        print(f"note: {said} left out of {path}: hidden, or an editor's copies ({out[0]}"
              f"{', …' if len(out) > 1 else ''})", file=sys.stderr, flush=True)  # fmt: skip
    files = [f for f in every if f.suffix.lower() in suffixes and not by_the_way(f.relative_to(path))]
    if not files:
        raise UserError(f"--data {path} has no {wanted} file in it")
    return files


def by_the_way(path: Path) -> bool:
    """Whether a file lies in a folder because of a system or an editor: hidden, a copy, a lock, an archive's shadow.

    path: within the folder.
    """
    name = path.name
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return hidden or name.startswith(("~", "#")) or name.endswith(("~", "#")) or path.stem.endswith("~")


def fingerprint(files: Sequence[Path], rule: str = "") -> str:
    """Of names, sizes, and the first and last 64 KB of each file, and of a rule by which they are split."""
    digest = hashlib.sha256(rule.encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
        with open(path, "rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(max(0, size - (1 << 16)))
            digest.update(f.read())
    return digest.hexdigest()[:16]


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
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if path.suffix.lower() == ".parquet":
        counts = parquet.check(path, thorough)
        units = [Unit(path, row_group=group, documents=count) for group, count in enumerate(counts) if count]
    else:
        units, line = [], 1
        for offset, block, lines in blocks(path, None if path.suffix.lower() == ".txt" else LINES_PER_UNIT):
            unit = Unit(path, offset=offset, size=len(block), line=line)
            if documents := len(_parse(unit, block)):
                units.append(replace(unit, documents=documents))
            line += lines
    if not units:
        raise UserError(f"{path} has nothing but blank texts")
    return units


def blocks(path: Path, lines_per_block: int | None):
    """Yields (offset, bytes, lines) of whole lines: so many a block, or where None about TEXT_UNIT bytes."""
    with open(path, "rb") as f:
        offset, block = 0, []
        size = 0
        for line in f:
            block.append(line)
            size += len(line)
            if len(block) == lines_per_block or (lines_per_block is None and size >= TEXT_UNIT and not line.strip()):
                yield offset, b"".join(block), len(block)
                offset, block, size = offset + size, [], 0
        if block:
            yield offset, b"".join(block), len(block)


def read_unit(unit: Unit) -> list[str]:
    """The documents of a unit. Raises UserError when the file has gone bad since it was indexed."""
    if unit.path.suffix.lower() == ".parquet":
        return parquet.read(unit.path, unit.row_group)
    with open(unit.path, "rb") as f:
        f.seek(unit.offset)
        return _parse(unit, f.read(unit.size))


def _parse(unit: Unit, block: bytes) -> list[str]:
    if unit.path.suffix.lower() == ".txt":
        return _cut(_decode(block, unit.path, unit.line))
    documents = []
    for number, row in json_lines(unit.path, block, unit.line):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{unit.path}, line {number}: wanted an object with a string "text"')
        try:
            encodable(text)
        except ValueError as problem:
            raise UserError(f"{unit.path}, line {number}: {problem}") from None
        if text.strip():
            documents.append(text)
    return documents


def json_lines(path: Path, block: bytes, first_line: int) -> list[tuple[int, Any]]:
    """(line number, parsed JSON) of every line that is not blank. Raises UserError with the line that is no JSON."""
    rows = []
    for number, line in enumerate(block.split(b"\n"), first_line):
        if (text := _decode(line, path, number)).strip():
            try:
                rows.append((number, json_of(text)))
            except ValueError as problem:
                raise UserError(f"{path}, line {number}: not valid JSON ({problem})") from None
    return rows


def _decode(block: bytes, path: Path, line: int) -> str:
    """Text without the byte-order marks that begin its lines: of a file, or of several that were joined."""
    try:
        return block.decode("utf-8").removeprefix(BOM).replace(f"\n{BOM}", "\n")
    except UnicodeDecodeError as error:
        line += block[: error.start].count(b"\n")
        what = f"not UTF-8 text (byte 0x{block[error.start]:02x})"
        if block[:2] in (b"\xff\xfe", b"\xfe\xff"):
            what = "UTF-16, not UTF-8 text; save it as UTF-8"
        raise UserError(f"{path}, line {line}: {what}") from None


def _cut(text: str) -> list[str]:
    """Paragraphs joined into documents of about TEXT_DOCUMENT characters."""
    documents, current = [], ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if current and len(current) + len(paragraph) > TEXT_DOCUMENT:
            documents.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [document for document in (*documents, current) if document.strip()]
