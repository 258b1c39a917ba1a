"""Data files of millions of blank lines, that change while they are read, on disks that fail."""

import base64
import errno
import json
import os
import threading
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption
from test_documents import TEXTS, bad, everything, exchange, write_jsonl, write_parquet

from nanochat.data import documents, folder, parquet, source
from nanochat.data.conversations import ConversationFiles
from nanochat.data.documents import Documents
from nanochat.errors import UserError


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"one\n", b"one two three four\n", b"\xc3\xa9", b" "], ids=str)
def test_a_stretch_of_text_ends_with_a_blank_line_or_where_there_is_none_for_long(tmp_path, line, monkeypatch):
    monkeypatch.setattr(documents, "TEXT_UNIT", 40)
    content = (line * 57 + b"\n" + b"word\n" * 4 + b"\n \t\n") * 9
    found, end = list(documents.blocks(bad(tmp_path, "a.txt", content), None)), 0
    for offset, block, first in found:
        assert content[offset : offset + len(block)] == block and block.strip() and block.decode()
        assert not content[end:offset].strip() and first == content[:offset].count(b"\n") + 1
        end = offset + len(block)
        assert len(block) >= 40 or not content[end:].strip()
        assert len(block) >= 80 or not block[:-1].rpartition(b"\n")[2].strip()
    assert not content[end:].strip()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "chat.jsonl"])
def test_millions_of_blank_lines_are_passed_over_at_once(tmp_path, name, monkeypatch):
    looked_at, lines, decode = [], documents._lines, documents._decode
    monkeypatch.setattr(documents, "_lines", lambda *found: (looked_at.append(1) or line for line in lines(*found)))
    monkeypatch.setattr(documents, "_decode", lambda *found: looked_at.append(1) or decode(*found))
    row = json.dumps(exchange(0)).encode() if name == "chat.jsonl" else b'{"text": "one"}'
    path = bad(tmp_path, name, row + b"\n" * 2_000_000 + row + b"\n" * 2_000_000)
    source = (ConversationFiles if name == "chat.jsonl" else Documents)(path)
    assert len(everything(source, "train")) == len(everything(source, "val")) == 1
    assert len(looked_at) < 5000


def test_a_text_of_many_characters_that_show_nothing_is_looked_at_once(monkeypatch):
    asked = []
    category = source.unicodedata.category
    monkeypatch.setattr(source.unicodedata, "category", lambda c: asked.append(c) or category(c))
    assert source.blank("\u200b\x07" * 100_000) and not source.blank("\u200b" * 100_000 + "a") and len(asked) < 500


def test_blank_lines_between_paragraphs_are_of_a_document_as_far_as_it_goes(monkeypatch):
    monkeypatch.setattr(documents, "TEXT_DOCUMENT", 10)
    assert documents._cut("\n\n\n\none\n\n\n\ntwo\n\nthree\n\n\nfour") == ["one\n\n\n\ntwo", "three\n\n\nfour"]
    assert documents._cut("one" + "\n" * 99 + "two") == ["one" + "\n" * 8, "\ntwo"]
    assert documents._cut("x" * 25 + "\n\ny") == ["x" * 10, "x" * 10, "xxxxx\n\ny"]


def test_a_disk_that_fails_while_a_file_is_read_is_told_with_the_file(tmp_path, monkeypatch):
    """The system names no file then."""
    path = write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in TEXTS])

    def fail(*found):
        raise OSError(errno.EIO, "Input/output error")

    digest = types.SimpleNamespace(update=lambda text: fail() if len(text) > 100 else None)
    for room, name, failing in ((documents, "islice", fail), (folder.hashlib, "sha256", lambda start: digest)):
        with monkeypatch.context() as patched, pytest.raises(OSError) as raised:
            patched.setattr(room, name, failing)
            Documents(path)
        assert raised.value.filename == str(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("change", ["cut off", "cut off a little", "other text", "other text as long", "empty"])
def test_a_file_that_is_another_one_meanwhile_is_named(tmp_path, name, change):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, TEXTS)
    elif name == "a.jsonl":
        write_jsonl(path, [dict(text=text) for text in TEXTS])
    else:
        path.write_text("\n\n".join(TEXTS))
    source, size = Documents(path), path.stat().st_size
    if change == "other text" and name == "a.parquet":
        write_parquet(path, TEXTS[::-1][:-100], rows_per_group=49)
    elif change.startswith("other text"):
        path.write_text("\n" * (size if "long" in change else 7))
    else:
        os.truncate(path, {"cut off": size // 2, "cut off a little": size - 30, "empty": 0}[change])
    with pytest.raises(UserError, match=f"{name}: damaged|{name} is not any more what it was"):
        everything(source, "train"), everything(source, "val")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_file_that_is_a_pipe_meanwhile_is_not_waited_for(tmp_path, name):
    path, said = tmp_path / name, []
    write = dict(parquet=lambda: write_parquet(path, TEXTS), txt=lambda: path.write_text("\n\n".join(TEXTS)))
    write.get(path.suffix[1:], lambda: write_jsonl(path, [dict(text=text) for text in TEXTS]))()
    source = Documents(path)
    path.unlink()
    os.mkfifo(path)

    def read():
        with pytest.raises((UserError, OSError)) as raised:
            everything(source, "train")
        said.append(str(raised.value))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert said and "Is a pipe" in said[0] and str(path) in said[0]


def test_a_file_of_many_row_groups_is_opened_once_and_again_when_it_changes(tmp_path, monkeypatch):
    """What is noted of twenty thousand is read in a tenth of a second."""
    made, files, plain = [], {}, pq.ParquetFile

    def watched(path, **how):
        made.append(path.name)
        files[path.name] = plain(path, **how)
        return files[path.name]

    monkeypatch.setattr(pq, "ParquetFile", watched)
    monkeypatch.setattr(parquet, "_OPEN", parquet._Open())
    for number in range(10):
        write_parquet(tmp_path / f"{number}.parquet", TEXTS, rows_per_group=7)
    for name in ("0", "1", "0", "1"):
        for group in (3, 2):
            assert parquet.read(tmp_path / f"{name}.parquet", group) == TEXTS[7 * group : 7 * group + 7]
    assert made == ["0.parquet", "1.parquet"]
    before, total = files["0.parquet"], pa.total_allocated_bytes()
    for number in (2, 3, 4, 5, 6, 7, 0, 8):
        parquet.read(tmp_path / f"{number}.parquet", 0)
    assert files["1.parquet"].closed and not files["0.parquet"].closed and len(parquet._OPEN.files) == parquet.MOST
    assert pa.total_allocated_bytes() - total < 100_000
    write_parquet(tmp_path / "0.parquet", TEXTS[::-1], rows_per_group=7)
    assert parquet.read(tmp_path / "0.parquet", 1) == TEXTS[::-1][7:14]
    assert before.closed and not files["0.parquet"].closed


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("footer", [False, True])
def test_an_encrypted_file_is_said_to_be(tmp_path, footer, thorough):
    class Keys(encryption.KmsClient):
        def __init__(self, settings):
            super().__init__()

        def wrap_key(self, key, name):
            return base64.b64encode(key)

    table = pa.table(dict(text=TEXTS))
    factory = encryption.CryptoFactory(lambda settings: Keys(settings))
    how = encryption.EncryptionConfiguration(footer_key="f", column_keys=dict(c=["text"]), plaintext_footer=footer)
    sealed = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    (tmp_path / "crypt").mkdir()
    with pq.ParquetWriter(tmp_path / "crypt" / "a.parquet", table.schema, encryption_properties=sealed) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="a.parquet.*: encrypted, and the key is not known here"):
        parquet.check(tmp_path / "crypt" / "a.parquet", thorough)
    (tmp_path / "crypt" / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="no readable parquet file"):
        parquet.check(tmp_path / "crypt" / "b.parquet")


@pytest.mark.parametrize("count, said", [(2, True), (9, True), (10, False)])
def test_that_one_of_few_documents_is_held_out_is_said(tmp_path, capsys, count, said):
    Documents(write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in TEXTS[:count]]))
    error = capsys.readouterr().err
    assert (f"a.jsonl has {count} documents, of which one is held out to validate on" in error) == said
