"""Training text as parquet files that nanochat reads: shard_00000.parquet, …, of which the last one validates.

Row groups of 1,024 documents, since each rank takes every so many of them; the column is `text`.
"""

from pathlib import Path
from typing import Any

from nanochat.data.parquet import pyarrow_module
from nanochat.data.source import Source
from nanochat.exchange.whole import new_folder
from nanochat.progress import Count

FOLDER = "base_data_climbmix"  # where nanochat looks for them, in its base folder
ROWS = 1024  # documents of a row group
CHARACTERS = 250_000_000  # of a shard


def export(source: Source, out: Path, most: int) -> str:
    """Writes out/base_data_climbmix, at most so many characters of training text; returns a sentence about it."""
    kept = {}
    with new_folder(out) as folder:
        (folder / FOLDER).mkdir()
        writer = Shards(folder / FOLDER)
        for split, limit in (("train", most), ("val", max(1, most // 10))):
            count = 0
            with Count(f"{split}, million characters", limit // 1_000_000, shown=True) as progress:
                for unit in range(source.units(split)):
                    texts = source.load(split, unit)
                    writer.add(texts)
                    before, count = count, count + sum(map(len, texts))
                    progress.tick(count // 1_000_000 - before // 1_000_000)
                    if count >= limit:
                        break
            writer.close()
            kept[split] = count
    return (
        f"{out / FOLDER}: {writer.number} files, {kept['train']:,} characters to train on and {kept['val']:,} to "
        f"validate on (the last file); nanochat reads them with NANOCHAT_BASE_DIR={out}"
    )


class Shards:
    """Files under one folder, one after another."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.writer: Any = None
        self.rows: list[str] = []
        self.characters = 0  # of the file that is being written

    def add(self, texts: list[str]) -> None:
        self.rows += texts
        while len(self.rows) >= ROWS:
            self._write(self.rows[:ROWS])
            self.rows = self.rows[ROWS:]
            if self.characters >= CHARACTERS:
                self._end()

    def close(self) -> None:
        """Ends the file, with what is left."""
        if self.rows:
            self._write(self.rows)
            self.rows = []
        self._end()

    def _write(self, texts: list[str]) -> None:
        pa = pyarrow_module()
        table = pa.table(dict(text=texts))
        if self.writer is None:
            path = self.folder / f"shard_{self.number:05d}.parquet"
            self.writer = pa.parquet.ParquetWriter(path, table.schema, compression="zstd")
        self.writer.write_table(table, row_group_size=ROWS)
        self.characters += sum(map(len, texts))

    def _end(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.number += 1
        self.writer, self.characters = None, 0
