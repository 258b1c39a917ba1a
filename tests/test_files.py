"""JSON from elsewhere, wherever it is read: deep, with endless numbers, a byte-order mark, cut off, of other bytes; and
results that are written to what is no file.
"""

import json
import os
import re
import threading

import pytest

from benchmarks import compare
from nanochat import files, log, records
from nanochat.errors import UserError
from nanochat.evaluate import bundle
from nanochat.files import encodable, json_of
from nanochat.tokenizer import Tokenizer
from profiling.predicted import cards
from profiling.recorded import diff, trace

BAD = {
    "deep": "[" * 5000 + "]" * 5000,
    "a deep value": '{"traceEvents": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    "digits": '{"format": ' + "1" * 5000 + "}",
    "cut off": '{"format": 1',
    "no UTF-8": '{"name": "\udcff"}',
    "nothing": "",
}
READERS = {
    "records": lambda path: records.read(path, "again"),
    "rows": lambda path: records.rows(path, "again"),
    "diff": diff.load,
    "trace": trace.read,
    "calibration": cards.read,
    "benchmarks": lambda path: compare.load(str(path)),
    "tokenizer": lambda path: Tokenizer.load(path.parent),
    "bundle": lambda path: bundle._row("multiple_choice", path.read_text("utf-8", "replace"), "here"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_one_sentence(tmp_path, reader, name):
    if (reader, name) == ("rows", "nothing"):
        pytest.skip("no line is no row")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(BAD[name].encode(errors="surrogateescape"))
    with pytest.raises(UserError) as raised:
        READERS[reader](path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_line_of_a_log_is_counted(tmp_path, name, capsys):
    path, row = tmp_path / log.LOG, json.dumps(dict(step=1, loss=2.0)).encode()
    path.write_bytes(row + b"\n" + BAD[name].encode(errors="surrogateescape") + b"\n" + row + b"\n")
    assert len(log.read_log(path)) == 2
    assert ("1 damaged" in capsys.readouterr().err) == bool(BAD[name])


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert json_of('\ufeff{"a": 1}') == json_of(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert records.read(tmp_path / "a.json", "again") == {"a": 1}


def test_what_is_wrong_is_said():
    for text, said in (("[1,]", "at column 4"), ("[\n1,]", "at line 2, column 3"), (BAD["digits"], "more digits"),
                       (BAD["deep"], "nested too deep"), (b"\xff", "not UTF-8")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            json_of(text)


def test_half_a_surrogate_pair_is_no_text():
    encodable("whole 😀")
    with pytest.raises(ValueError, match=r"half a surrogate pair, \\ud83d"):
        encodable("a\ud83d")
    row = json.dumps(dict(query="a\ud83d", choices=["b", "c"], gold=0))
    with pytest.raises(UserError, match="half a surrogate pair"):
        bundle._row("multiple_choice", row, "here")


def test_a_pipe_stays_one_and_gets_the_content(tmp_path):
    """As /dev/null would be replaced, where the user is root."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    files.write_atomically(pipe, b"content")
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    reader.join(10)
    assert got == [b"content"]


def test_standard_output_by_its_name_is_written_to_and_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STREAMS", (str(tmp_path / "dev"),))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "stdout").symlink_to(tmp_path / "redirected")
    files.write_atomically(tmp_path / "dev" / "stdout", b"content")
    assert (tmp_path / "dev" / "stdout").is_symlink() and (tmp_path / "redirected").read_bytes() == b"content"


def test_a_name_of_a_file_tells_all_texts_apart():
    texts = ["模型一", "模型二", "..", ".", "", "_", "llama3:8b", "llama3/8b", "llama3_8b", "org/model", "org_model"]
    texts += [".x", "x", "a" * 300, "a" * 299, "\udcff"]
    names = [files.file_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) for name in names)
    assert files.file_name("llama3_8b") == "llama3_8b" and names[6].startswith("llama3_8b-")
