"""Your own text for pretraining: parquet with a `text` column, JSONL with a "text" field, or plain text.

A path is one file or a folder of them. Everything is looked at before training begins: a broken line, a missing column
or an empty file is named with its place and nothing is trained. Files whose name begins with "val" are the validation
split; without any, the first of every 50 documents is held out. A plain text file is cut at blank lines into documents
of about 4,000 characters.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".txt")
HELD_OUT = 50  # one document in so many
LINES_PER_UNIT = 512
TEXT_DOCUMENT = 4_000  # characters
TEXT_UNIT = 1 << 20  # bytes of plain text read at a time


@dataclass(frozen=True)
class Unit:
    """A stretch of one file: a parquet row group, or `size` bytes from `offset` whose first line is `line`."""

    path: Path
    row_group: int = 0
    offset: int = 0
    size: int = 0
    line: int = 1


class Documents:
    """Text documents from files. Raises UserError for anything that cannot be trained on."""

    def __init__(self, path: Path, val: Sequence[Path] | None = None, train: Sequence[Path] | None = None):
        """`path` names the source; `train` and `val` list its files where the caller knows them (the hub's shards)."""
        self.name = str(path)
        files = list(train or []) + list(val or []) or find_files(path, SUFFIXES)
        if val is None:
            val = [f for f in files if f.stem.lower().startswith("val")]
        train_files = [f for f in files if f not in val]
        if not train_files:
            raise UserError(
                f"{path} has validation files only; a file whose name does not begin with val is for training"
            )
        self._held_out = not val
        self._units = {"train": [u for f in train_files for u in index(f)], "val": [u for f in val for u in index(f)]}
        if self._held_out:
            self._units["val"] = self._units["train"]
        self.fingerprint = fingerprint(files)
        if self._held_out and not any(self.load("train", unit) for unit in range(len(self._units["train"]))):
            raise UserError(f"{path} has one document only; at least two are needed, one to validate on")

    def units(self, split: str) -> int:
        return len(self._units[split])

    def load(self, split: str, unit: int) -> list[str]:
        texts = read_unit(self._units[split][unit])
        if not self._held_out:
            return texts
        return texts[::HELD_OUT] if split == "val" else [text for i, text in enumerate(texts) if i % HELD_OUT]


def find_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files at a path, sorted. Raises UserError when there are none of a kind that can be read."""
    wanted = ", ".join(suffixes)
    if not path.exists():
        raise UserError(f"--data {path} does not exist; give a file or a folder of {wanted} files")
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise UserError(f"--data {path} is not of a kind that can be read here; wanted {wanted}")
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes and f.is_file())
    if not files:
        raise UserError(f"--data {path} has no {wanted} file in it")
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """Of names, sizes, and the first and last 64 KB of each file."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as f:
            digest.update(f.read(1 << 16))
            f.seek(max(0, size - (1 << 16)))
            digest.update(f.read())
    return digest.hexdigest()[:16]


def index(path: Path) -> list[Unit]:
    """The units of a file, after checking that it can be trained on."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if path.suffix.lower() == ".parquet":
        return _index_parquet(path)
    units, line = [], 1
    for offset, block, lines in blocks(path, None if path.suffix.lower() == ".txt" else LINES_PER_UNIT):
        unit = Unit(path, offset=offset, size=len(block), line=line)
        if not _parse(unit, block):
            raise UserError(f"{path}, line {line}: nothing but blank lines")
        units.append(unit)
        line += lines
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
        return _read_row_group(unit)
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
        if text.strip():
            documents.append(text)
    return documents


def json_lines(path: Path, block: bytes, first_line: int) -> list[tuple[int, Any]]:
    """(line number, parsed JSON) of every line that is not blank. Raises UserError with the line that is no JSON."""
    rows = []
    for number, line in enumerate(block.split(b"\n"), first_line):
        if line.strip():
            try:
                rows.append((number, json.loads(_decode(line, path, number))))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
                ) from None
    return rows


def _decode(block: bytes, path: Path, line: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        line += block[: error.start].count(b"\n")
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte 0x{block[error.start]:02x})") from None


def _cut(text: str) -> list[str]:
    """Paragraphs joined into documents of about TEXT_DOCUMENT characters."""
    documents, current = [], ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        if current and len(current) + len(paragraph) > TEXT_DOCUMENT:
            documents.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    return [document for document in (*documents, current) if document.strip()]


def _pyarrow() -> Any:
    """pyarrow with its parquet module, where it is needed: other data does without. Raises UserError without it."""
    try:
        import pyarrow
        import pyarrow.parquet  # noqa: F401 (becomes pyarrow.parquet)
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install pyarrow (JSONL and plain text do without)") from None
    return pyarrow


def _index_parquet(path: Path) -> list[Unit]:
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema, groups, rows = file.schema_arrow, file.num_row_groups, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable parquet file ({str(error).splitlines()[0]})") from None
    if "text" not in schema.names:
        raise UserError(f"{path} has no `text` column; its columns are {', '.join(schema.names)}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the `text` column holds {kind}, wanted strings")
    if rows == 0:
        raise UserError(f"{path} has no rows")
    return [Unit(path, row_group=group) for group in range(groups)]


def _read_row_group(unit: Unit) -> list[str]:
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(unit.path) as file:
            texts = file.read_row_group(unit.row_group, columns=["text"])["text"].to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # the text may be no UTF-8 any more
        raise UserError(
            f"{unit.path}, row group {unit.row_group}: damaged ({str(error).splitlines()[0]}); replace the file"
        ) from None
    for row, text in enumerate(texts):
        if text is None:
            raise UserError(f"{unit.path}, row {row} of row group {unit.row_group}: the text is null")
    return [text for text in texts if text.strip()]
