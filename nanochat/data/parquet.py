"""Parquet files with a `text` column: strings of any of Arrow's kinds, also as categories or as bytes without a type.

`check` looks at a file before training begins; `read` gives the texts of a row group.
"""

import os
import threading
from pathlib import Path
from typing import Any

from nanochat import optional
from nanochat.data.source import texts_of
from nanochat.errors import UserError
from nanochat.files import opened

MOST = 8  # files that stay open


class _Open(threading.local):
    """A thread's open files, the last used last, by path and what the system says of it. What a file of many row groups
    notes of them all takes a hundred times longer to read than one of a document. pre_buffer=False: else each would
    keep the bytes of the group read last.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[Any, ...], Any] = {}

    def get(self, path: Path) -> Any:
        """The file as it is now. Raises what opening it raises."""
        with opened(path) as f:
            found = os.fstat(f.fileno())
        key = str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        if key not in self.files:
            for other in [other for other in self.files if other[0] == key[0]] + list(self.files)[: 1 - MOST]:
                if other in self.files:
                    self.files.pop(other).close()
        file = self.files.pop(key, None) or pyarrow_module().parquet.ParquetFile(path, pre_buffer=False)
        self.files[key] = file
        return file


_OPEN = _Open()


def check(path: Path, thorough: bool = True) -> list[int]:
    """How many documents each row group has. Raises UserError for what cannot be trained on, with its place.

    thorough: read them all; else only the file's own notes are read, and rows are counted, blank ones too.
    """
    pa = pyarrow_module()
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: pyarrow opens no file whose path is not UTF-8; rename it") from None
    try:
        with opened(path), pa.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            rows = [metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            # Asked about a column that is encrypted, pyarrow aborts the process; reading one raises.
            if rows and not thorough:
                next(file.iter_batches(1, row_groups=[0], columns=["text"]), None)
    except (pa.ArrowException, OSError, ValueError) as error:
        if _encrypted(error):
            raise _unreadable(str(path), error) from None
        raise UserError(f"{path} is no readable parquet file ({_first_line(error)})") from None
    if "text" not in schema.names:
        raise UserError(f"{path} has no `text` column; its columns are {', '.join(schema.names) or 'none'}")
    if schema.names.count("text") > 1:
        raise UserError(f"{path} has several columns called `text`; leave one")
    kind = schema.field("text").type
    if not _holds_text(pa, kind):
        raise UserError(f"{path}: the `text` column holds {kind}, wanted strings")
    if not sum(rows):
        raise UserError(f"{path} has no rows")
    if not thorough:
        for group in range(len(rows)):
            if _nulls(metadata.row_group(group)):
                raise UserError(f"{path}, row group {group}: a text is null; get the file again")
        return rows
    with opened(path), pa.parquet.ParquetFile(path) as file:
        return [len(_texts(pa, file, path, group)) for group in range(len(rows))]


def read(path: Path, group: int) -> list[str]:
    """The texts of a row group that are not blank. Raises UserError for damage, nulls, and what is no UTF-8."""
    pa = pyarrow_module()
    try:
        return _texts(pa, _OPEN.get(path), path, group)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(str(path), error) from None


def _texts(pa: Any, file: Any, path: Path, group: int) -> list[str]:
    try:
        column = file.read_row_group(group, columns=["text"])["text"]
        if pa.types.is_dictionary(column.type):  # categories: as one text a row, of which each can be named
            column = pa.chunked_array([c.dictionary.take(c.indices) for c in column.chunks], column.type.value_type)
        texts = column.cast(pa.large_binary() if _binary(pa, column.type) else pa.large_string()).to_pylist()
    except UnicodeDecodeError:
        texts = column.cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(f"{path}, row group {group}", error) from None
    where = lambda row: f"{path}, row {row} of row group {group}"
    if None in texts:
        raise UserError(f"{where(texts.index(None))}: the text is null")
    for row, text in enumerate(texts):
        if isinstance(text, bytes):
            try:
                texts[row] = text.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{where(row)}: not UTF-8 text (byte 0x{text[error.start]:02x})") from None
    return texts_of(texts)


def _nulls(group: Any) -> int:
    """How many texts of a row group are null, as the file notes it; 0 where it does not."""
    columns = (group.column(i) for i in range(group.num_columns))
    noted = next((column.statistics for column in columns if column.path_in_schema == "text"), None)
    return noted.null_count if noted is not None and noted.has_null_count else 0


def _holds_text(pa: Any, kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(kind) for is_kind in kinds) or _binary(pa, kind)


def _binary(pa: Any, kind: Any) -> bool:
    """What older writers make of text: bytes whose type they do not note."""
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _encrypted(error: Exception) -> bool:
    return any(said in str(error) for said in ("encrypted metadata", "FileDecryption"))


def _unreadable(where: str, error: Exception) -> UserError:
    if _encrypted(error):
        return UserError(f"{where}: encrypted, and the key is not known here; write it again without")
    return UserError(f"{where}: damaged ({_first_line(error)}); replace the file")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def pyarrow_module() -> Any:
    """pyarrow with its parquet module, where it is needed: other data does without. Raises UserError without it."""
    try:
        optional.package("pyarrow.parquet", "ParquetFile")
        return optional.package("pyarrow", "parquet")
    except ImportError as missing:
        said = f"parquet files need pyarrow ({missing}): pip install pyarrow (JSONL and plain text do without)"
        raise UserError(said) from None
